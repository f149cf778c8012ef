"""``inq bench``: arguments, one process for each set of instructions, files and exit status."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..backends import BACKENDS
from ..format import BITS
from ..table import render
from . import bars, compare, gpu, machine, report
from .case import DTYPES, Op, Request
from .registry import ALL, BY_DEVICE

_PACKAGE = Path(__file__).resolve().parent
# Options that a process for another set of instructions gets as they are.
_PASSED = ("quick", "shape", "m", "bits", "dtype", "threads", "seconds_per_case", "backend", "device")
# Kinds of GPU for static: those of triton_ops.tiles, which is not imported for a command line's help.
CAPABILITIES = (80, 86, 89, 90, 100, 120)


class BenchError(RuntimeError):
    """The benchmark cannot run as asked."""


def _positive(kind: type) -> Callable[[str], float]:
    def parse(text: str):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"expected more than 0, got {text}")
        if value == math.inf:
            raise argparse.ArgumentTypeError(f"expected a finite number, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse's messages name it
    return parse


def _shape(text: str) -> tuple[int, int]:
    try:
        k, n = (int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected K,N, for example 14336,4096, got {text!r}") from None
    if k < 1 or n < 1:
        raise argparse.ArgumentTypeError(f"expected K and N of at least 1, got {text!r}")
    return k, n


def _isas(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in machine.ISA_ENVIRONMENT]:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(machine.ISA_ENVIRONMENT)}, got {unknown[0]!r}")
    return names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``inq bench``."""
    many = {"nargs": "+", "action": "extend", "default": []}
    parser.add_argument(
        "what", nargs="?", choices=("static", "tune", "compress"), metavar="static|tune|compress",
        help="static: compile the Triton kernels for every kind of GPU and count their instructions; needs no GPU. "
        "tune: time the tiles of products on this GPU (--device cuda), and write tiles.json for INQ_TRITON_TILES. "
        "compress: entropy-coded files beside the entropy of their codes and other coders",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a small grid, about a minute")
    parser.add_argument("--op", choices=ALL, metavar="NAME", help=f"only these: {' '.join(ALL)}", **many)
    parser.add_argument("--shape", type=_shape, metavar="K,N", help="of weights, instead of the grid's", **many)
    parser.add_argument("--m", type=_positive(int), metavar="M", help="rows of x, or images of a batch", **many)
    parser.add_argument("--bits", type=int, choices=BITS, help="instead of the grid's", **many)
    parser.add_argument("--dtype", choices=DTYPES, help="of x or of the float weights", **many)
    parser.add_argument(
        "--isa", type=_isas, default=["native"], metavar="LIST",
        help="of native, avx512, avx2: what we and torch are held down to, a process for each (default: native)",
    )  # fmt: skip
    parser.add_argument("--backend", choices=BACKENDS, help="default: the best for each operator", **many)
    parser.add_argument("--device", choices=BY_DEVICE, default="cpu", help="what computes (default: cpu)")
    parser.add_argument("--threads", type=_positive(int), metavar="N", help="default: torch's")
    parser.add_argument("--seconds-per-case", type=_positive(float), metavar="S", help="default: 2; 0.4 with --quick")
    parser.add_argument(
        "--within",
        type=_positive(float),
        metavar="S",
        help="begin no case after so many seconds",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: bench/results/<machine>-<commit>")
    parser.add_argument("--no-plots", action="store_true", help="no pictures")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="only compare two results")
    parser.add_argument(
        "--bars", nargs="?", type=Path, const=True, metavar="FILE",
        help="hold results (default: of this run) against the speeds that must be reached; exit 1 if one is missed",
    )  # fmt: skip
    parser.add_argument("--sm", type=int, choices=CAPABILITIES, help="of static: only these GPUs (90: Hopper)", **many)
    parser.add_argument("--only", metavar="WORD", help="of static and tune: only names with one of these words", **many)
    parser.add_argument(
        "--check", action="store_true",
        help="of static: write nothing; compile the extremes of the committed table again and compare",
    )  # fmt: skip
    parser.add_argument("--jobs", type=_positive(int), default=2, metavar="N", help="of static: processes (default: 2)")
    parser.add_argument(
        "--library", action="store_true", help="of static: the compiled CUDA library's kernels, instead of Triton's"
    )
    parser.add_argument("--model", type=Path, metavar="FILE", help="of compress: the layers of a packed checkpoint")
    parser.add_argument("--section", nargs=2, metavar=("ISA", "FILE"), help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Run what was asked for: rows on stdout; results.json and pictures under ``args.out``.

    Returns:
        0; 1 with a message on stderr if a check is red, a bar is missed, or the benchmark cannot run.
    """
    try:
        if args.what == "static":
            from . import static, static_cuda

            if args.library:
                return static_cuda.run(args.out)
            return static.run(args.out, args.sm or CAPABILITIES, args.only, args.jobs, args.check)
        if args.what == "tune":
            return _tune(args)
        if args.what == "compress":
            from . import compress

            return compress.run(args.out, args.model, args.quick)
        if args.compare:
            files = [report.read(path) for path in args.compare]
            with _whole(*args.compare):
                print(compare.compare(*files))
            return 0
        if args.bars not in (None, True):
            results = report.read(args.bars)
            with _whole(args.bars):
                return _bars(results)
        if args.section:
            isa, path = args.section
            Path(path).write_text(json.dumps(_section(args, isa)))
            return 0
        return _bench(args)
    except (BenchError, OSError, ValueError, ImportError) as error:
        print(f"inq bench: {error}", file=sys.stderr)
        return 1


@contextmanager
def _whole(*paths: Path) -> Iterator[None]:
    """Sections and rows are read as they are used: what is missing there, or of another type, is the file's mistake."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ZeroDivisionError) as error:
        names = " or ".join(map(str, paths))
        raise BenchError(f"{names}: expected rows of inq bench, got others: {type(error).__name__}: {error}") from error


def _tune(args: argparse.Namespace) -> int:
    if args.device != "cuda" or not torch.cuda.is_available():
        raise BenchError("tune: expected --device cuda and a CUDA device here: what is fastest is measured")
    from . import tune

    names = [name for name in tune.KINDS if not args.only or any(word in name for word in args.only)]
    if not names:
        raise BenchError(f"--only: expected a word of {', '.join(tune.KINDS)}, got {args.only[0]!r}")
    return tune.run(args.out or _default_out(gpu.slug()), args.shape, names, args.within)


def _default_out(described: str) -> Path:
    commit = machine.software()["commit"]
    return Path("bench", "results", described + (f"-{commit}" if commit else ""))


def _bench(args: argparse.Namespace) -> int:
    if not args.no_plots and importlib.util.find_spec("matplotlib") is None:
        raise BenchError("pictures need matplotlib: pip install 'inq_kernels[bench]', or --no-plots")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device cuda: expected a CUDA device, and torch finds none here")
    if args.device == "cuda" and args.isa != ["native"]:
        raise BenchError(f"--isa is about CPUs: expected native with --device cuda, got {','.join(args.isa)}")
    software = machine.software()
    described = gpu.slug() if args.device == "cuda" else machine.slug(machine.describe())
    out = args.out or _default_out(described)
    out.mkdir(parents=True, exist_ok=True)
    began = datetime.datetime.now(datetime.timezone.utc)
    sections = []
    for isa in args.isa:
        print(f"== {isa} ==", flush=True)
        sections.append(_section_of(args, isa))
    results = {
        "schema": report.SCHEMA,
        "created": began.isoformat(timespec="seconds"),
        "seconds": round((datetime.datetime.now(datetime.timezone.utc) - began).total_seconds(), 1),
        "arguments": {name: getattr(args, name) for name in ("op", *_PASSED)},
        "software": software,
        "sections": sections,
    }
    report.write(out / "results.json", results)
    if not args.no_plots:
        from . import plots

        plots.draw(results, out)
    rows = [row for section in sections for row in section.get("rows", ())]
    red = [row for row in rows if row["error"]]
    if left_out := sum(section.get("left_out", 0) for section in sections):
        print(f"{left_out} cases were left out: --within {args.within:g} seconds were over")
    print(f"{out / 'results.json'}: {len(rows)} cases in {results['seconds']:.0f} s, {len(red)} red")
    for row in red:
        print(f"inq bench: {report.label(row)} [{row['backend']}] is red: {row['error']}", file=sys.stderr)
    if not rows:
        raise BenchError("no case is like that: see --op, --shape, --m, --bits, --dtype")
    missed = _bars(results) if args.bars is not None else 0
    return 1 if red else missed


def _section_of(args: argparse.Namespace, isa: str) -> dict:
    """A process for each operator in a full run on the CPU: gigabytes of another operator's weights, given back, leave
    memory so scattered that a step over a model's weights ran up to a third slower."""
    if args.quick or args.device != "cpu" or len(_ops(args)) == 1:
        return _section(args, isa) if isa == "native" else _section_in_new_process(args, isa, args.op, args.within)
    began = time.monotonic()
    sections = []
    for op in _ops(args):
        if next(iter(op.cases(_request(args, isa))), None) is None:
            continue
        left = None if args.within is None else max(args.within - (time.monotonic() - began), 1e-9)
        sections.append(_section_in_new_process(args, isa, [op.name], left))
        if "skipped" in sections[-1]:
            return sections[-1]
    from . import measure

    return measure.joined(sections) if sections else {"isa": isa, "rows": []}


def _request(args: argparse.Namespace, isa: str) -> Request:
    few = (tuple(args.shape), tuple(args.m), tuple(args.bits), tuple(args.dtype))
    return Request(args.quick, isa, *few, device=args.device)


def _ops(args: argparse.Namespace) -> list[Op]:
    known = BY_DEVICE[args.device]
    return [known[name] for name in dict.fromkeys(args.op or known) if name in known]


def _section(args: argparse.Namespace, isa: str) -> dict:
    from . import measure

    measure.thread_count(args.threads)
    seconds = args.seconds_per_case or (0.4 if args.quick else 2.0)

    def emit(row: dict) -> None:
        print(*report.row_lines(row), sep="\n", flush=True)

    return measure.run_section(
        _request(args, isa), _ops(args), args.backend or [""], seconds, emit, args.device, args.within
    )


def _section_in_new_process(args: argparse.Namespace, isa: str, ops: list[str], within: float | None) -> dict:
    """Libraries read what they may use when they are loaded, so a set of instructions takes a process."""
    if reason := machine.lacks(isa):
        print(f"skipped: {reason}")
        return {"isa": isa, "skipped": reason}
    environment = os.environ | machine.ISA_ENVIRONMENT[isa]
    # The same package, whether it is installed or not.
    places = filter(None, [str(_PACKAGE.parent), os.environ.get("PYTHONPATH")])
    environment["PYTHONPATH"] = os.pathsep.join(places)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "section.json")
        words = [sys.executable, "-m", "inq_kernels.cli", "bench", *_words(args, ops, within)]
        words += ["--section", isa, str(path)]
        done = subprocess.run(words, env=environment, check=False)
        if done.returncode or not path.exists():
            raise BenchError(f"{isa}: the process for it ended with status {done.returncode}")
        return json.loads(path.read_text())


def _words(args: argparse.Namespace, ops: list[str], within: float | None) -> list[str]:
    words = ["--op", *ops] if ops else []
    words += [] if within is None else ["--within", str(within)]
    for name in _PASSED:
        value, option = getattr(args, name), f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif isinstance(value, list) and value:
            words += [option, *(",".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in value)]
        elif value and not isinstance(value, list):
            words += [option, str(value)]
    return words


def _bars(results: dict) -> int:
    found = bars.evaluate(results)

    def number(value: float | None, unit: str) -> str:
        return "-" if value is None else f"{value:.3g} {unit}".strip()

    cells = [
        (b["name"], number(b["limit"], b["unit"]), number(b["value"], b["unit"]), str(b["rows"]), b["status"])
        for b in found
    ]
    print(render(("bar", "limit", "worst", "rows", "status"), cells))
    counts = {word: sum(b["status"].startswith(word) for b in found) for word in ("pass", "fail", "open")}
    print(", ".join(f"{count} {word}" for word, count in counts.items()))
    return 1 if counts["fail"] else 0
