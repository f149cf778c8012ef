"""The command: run what is not done yet, then write README.md and results.json."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

from inq_kernels import files

from .. import language_model as example
from . import jobs, language, page, tasks
from .networks import NETWORKS
from .tables import methods_of

NAMES = [*NETWORKS, jobs.LANGUAGE_MODEL]


def arguments() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m examples.tables", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="output folder (default: tables, or tables/quick)")
    parser.add_argument("--quick", action="store_true", help="shows that it works, and nothing else; two seeds")
    parser.add_argument("--seeds", type=_positive, metavar="N", help="repetitions (default: 5)")
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=NAMES,
        default=NAMES,
        metavar="NAME",
        help=f"of {', '.join(NAMES)} (default: all)",
    )
    parser.add_argument(
        "--processes", type=_positive, metavar="N", help="at a time, one thread each (default: one a core)"
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    args = arguments().parse_args(argv)
    began = time.perf_counter()
    # Of the code that runs: the checkout may be another commit by the end.
    software = example.software() | {k: v for k, v in jobs.fingerprint().items() if k != "code"}
    out = args.out or (Path("tables", "quick") if args.quick else Path("tables"))
    seeds = list(range(args.seeds or (2 if args.quick else 5)))
    processes = args.processes or example.cores()
    recipes = {"digits": tasks.QUICK if args.quick else tasks.Recipe()}
    if jobs.LANGUAGE_MODEL in args.networks:
        recipes[jobs.LANGUAGE_MODEL] = language.QUICK if args.quick else language.Recipe()
    todo = jobs.jobs({network: methods_of(network) for network in args.networks}, seeds)
    again = 0

    def say(job: jobs.Job, result: dict, taken_over: bool) -> None:
        nonlocal again
        again += taken_over
        what = "taken over" if taken_over else f"{result['cpu_s']:.1f} s"
        print(f"{job.name}: {what}", file=sys.stderr, flush=True)

    done = jobs.run_all(jobs.Store(out, recipes), todo, processes, say)
    results = {
        "quick": args.quick,
        "seeds": seeds,
        "command": _command(args),
        "machine": example.machine(),
        "software": software,
        "processes": processes,
        "recipes": {name: dataclasses.asdict(recipe) for name, recipe in recipes.items()},
        "wall_s": round(time.perf_counter() - began, 1),
        "cpu_s": round(sum(result["cpu_s"] for result in done.values()), 1),
        "taken_over": again,
        "jobs": [{**dataclasses.asdict(job), **_without_key(done[job])} for job in todo],
    }
    files.write_text(out / "results.json", json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    text = page.text(json.loads((out / "results.json").read_text(encoding="utf-8")))
    files.write_text(out / "README.md", text)
    print(text)
    return 0


def _command(args: argparse.Namespace) -> str:
    """How to run it again; without the output folder, which is of one machine."""
    words = ["python -m examples.tables"]
    words += ["--quick"] * args.quick + ([f"--seeds {args.seeds}"] if args.seeds else [])
    words += [] if args.networks == NAMES else ["--networks", *args.networks]
    return " ".join(words)


def _without_key(result: dict) -> dict:
    return {name: value for name, value in result.items() if name not in ("key", "left")}


if __name__ == "__main__":
    sys.exit(main())
