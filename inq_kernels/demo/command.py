"""``inq demo``: INQ at 5, 4, 3 and 2 bits on the handwritten digits that scikit-learn carries, from training to a file.

``train`` has the experiment, ``check`` compares the saved files in a new process, ``report`` draws.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from .. import files
from .train import BY_KEY, FLOAT, QUICK, QUICK_ROWS, ROWS, Digits, Recipe, Row, run_row

TEST_IMAGES = 600  # of 1797, so one image is 0.17 points
SPLIT_SEED = 0
_PACKAGE = Path(__file__).resolve().parent.parent
# What the demo needs beyond the core: module → what pip calls it.
_NEEDED = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}


class DemoError(RuntimeError):
    """The demo cannot run, or found that a saved network is not what was trained."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``inq demo``."""
    parser.add_argument("--seeds", type=_positive, default=5, metavar="N", help="repetitions (default: 5)")
    parser.add_argument("--seed", type=int, default=0, metavar="BASE", help="the first seed (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="output folder (default: demo)")
    parser.add_argument(
        "--quick", action="store_true", help="one seed and too few epochs: shows that it works, not how well"
    )
    parser.add_argument(
        "--processes", type=_positive, metavar="N", help="at a time, one thread each (default: one a core)"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def run(args: argparse.Namespace) -> int:
    """Run the demo: the table on stdout; report.html, results.json and the packed networks under ``args.out``.

    Returns:
        0; 1 with a message on stderr, and no table, if something is missing or a saved network is not what was trained.
    """
    try:
        _demo(args)
    except (DemoError, OSError) as error:
        print(f"inq demo: {error}", file=sys.stderr)
        return 1
    return 0


def _demo(args: argparse.Namespace) -> None:
    if missing := [name for module, name in _NEEDED.items() if importlib.util.find_spec(module) is None]:
        raise DemoError(f"needs {' and '.join(missing)}: pip install 'inq_kernels[demo]'")
    from . import report

    began = time.perf_counter()
    rows, recipe, count = (QUICK_ROWS, QUICK, 1) if args.quick else (ROWS, Recipe(), args.seeds)
    seeds = range(args.seed, args.seed + count)
    digits = load_digits()
    _prepare(args.out, digits.test_images)
    with _progress(len(seeds) * len(rows)) as advance:
        outcomes = train(rows, seeds, digits, recipe, args.out, args.processes or _cores(), advance)
    summary = check_in_new_process(args.out)
    results = {
        "quick": args.quick,
        "seeds": list(seeds),
        "recipe": dataclasses.asdict(recipe),
        "images": {"train": len(digits.train_labels), "test": len(digits.test_labels), "split_seed": SPLIT_SEED},
        "rows": report.summarize(outcomes),
        "check": summary,
        "software": _software(),
        "machine": _machine(),
        "timing": {
            "wall_s": round(time.perf_counter() - began, 1),
            "training_cpu_s": round(sum(o["cpu_s"] for o in outcomes), 1),
        },
    }
    files.write_text(args.out / "results.json", json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False))
    report.write_html(args.out, results)
    report.print_table(results)
    seconds = time.perf_counter() - began
    print(
        f"\n{summary['networks']} saved networks, loaded in a new process: logits equal bit for bit.\n"
        f"{args.out / 'report.html'} has the pictures. {seconds:.0f} s"
    )


def load_digits() -> Digits:
    """The 1797 images, split once into training and test images with the same share of every digit."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    data = datasets.load_digits()
    images = torch.from_numpy(data.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(data.target).long()
    train, test = train_test_split(
        range(len(labels)), test_size=TEST_IMAGES, stratify=data.target, random_state=SPLIT_SEED
    )
    return Digits(images[train], labels[train], images[test], labels[test])


def _prepare(out: Path, test_images: Tensor) -> None:
    """Folders without the networks of an earlier demo, which the check would take for ours."""
    for folder in (out / "models", out / "expected"):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*-seed*.safetensors"):
            old.unlink()
    files.write_safetensors(out / "expected" / "images.safetensors", {"test_images": test_images}, {})


# --- processes --------------------------------------------------------------------------------------------------------

_digits: Digits  # in a worker process


def _start_worker(arrays: Sequence) -> None:
    global _digits
    # One thread: networks this small gain nothing from more, and no result depends on how many there are.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    _digits = Digits(*map(torch.from_numpy, arrays))


def _work(key: str, seed: int, recipe: Recipe, out: Path) -> dict:
    return run_row(BY_KEY[key], seed, _digits, recipe, out)


def train(
    rows: Sequence[Row],
    seeds: Sequence[int],
    digits: Digits,
    recipe: Recipe,
    out: Path,
    processes: int,
    advance: Callable[[], None] = lambda: None,
) -> list[dict]:
    """``run_row`` for every row and seed, in ``processes`` processes; float32 first, since the others start from it.

    Args:
        advance: called after each.

    Returns:
        What ``run_row`` returned, in the order of ``rows``, then ``seeds``: the same for any number of processes.
    """
    # Arrays are pickled; tensors would go through shared memory, which containers often have little of.
    arrays = [getattr(digits, field.name).numpy() for field in dataclasses.fields(Digits)]
    # The longest first, so that the processes finish together.
    others = sorted((row for row in rows if row != FLOAT), key=lambda row: -len(row.portions))
    outcomes = {}
    # Not fork: torch's threads do not survive it.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start_worker, (arrays,)) as pool:
        try:
            starts = {pool.submit(_work, FLOAT.key, seed, recipe, out): seed for seed in seeds}
            pending = {}
            for future in as_completed(starts):
                seed = starts[future]
                outcomes[FLOAT.key, seed] = future.result()
                advance()
                pending |= {pool.submit(_work, row.key, seed, recipe, out): (row.key, seed) for row in others}
            for future in as_completed(pending):
                outcomes[pending[future]] = future.result()
                advance()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [outcomes[row.key, seed] for row in rows for seed in seeds]


def check_in_new_process(out: Path) -> dict:
    """Load and compare every saved network in a new process.

    Raises:
        DemoError: with all that is wrong.
    """
    # The same package, whether it is installed or not.
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    }
    command = [sys.executable, "-m", "inq_kernels.demo.check", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DemoError(f"a saved network is not what was trained:\n{done.stderr.strip()}")
    return json.loads(done.stdout)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on a terminal that rich can draw on; elsewhere silence."""
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("training and quantizing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)


# --- where the numbers come from --------------------------------------------------------------------------------------


def _software() -> dict:
    """Versions, and the commit, "-dirty" if files were changed since, where this is a git checkout."""
    names = ("torch", "numpy", "scikit-learn", "matplotlib", "safetensors")
    versions = {name: importlib.metadata.version(name) for name in names}
    from .. import __version__

    commit = None
    # Not the commit of some other repository that the package is installed inside of.
    if (_PACKAGE.parent / ".git").exists():
        command = ["git", "--no-optional-locks", "-C", str(_PACKAGE)]
        command += ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        with suppress(OSError):  # no git
            commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    return {"inq_kernels": __version__, "commit": commit, "python": platform.python_version(), **versions}


def _machine() -> dict:
    """What the numbers may depend on; no name of the machine, no path."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": _cores(),
    }


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
