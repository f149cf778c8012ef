"""The command line: ``inq demo | quantize | save | inspect | verify | bench | export | import | doctor``.

Heavy imports happen when used.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence

from .format import BITS, EXPONENT_RULES, GRANULARITIES, LEVELS, Format
from .integrations import conversions
from .table import bytes_text, render

_ERROR, _INTERRUPTED, _BROKEN_PIPE = 1, 130, 141
_DTYPES = ("float64", "float32", "bfloat16", "float16")
_ISAS = ("portable", "avx2", "avx512", "amx")
_PLANNED = {"cpu": ("linear", "linear_dx", "conv2d"), "cuda": ("linear", "linear_fp8", "linear_dx", "conv2d")}

_NOT_LOSSLESS = (
    "One-shot rounding to powers of two is not lossless: its SQNR saturates near 14 to 15 dB, however many bits. "
    "Retraining with inq.INQ is what makes it lossless."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (None: the process's); the exit status: 0, 1 error, 2 usage, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # A terminal without × or … shows ? instead of ending in an error.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        args = _parser(argv).parse_args(argv)
        status = args.run(args)
        if sys.stdout is not None:  # closed: a daemon, or `>&-`
            sys.stdout.flush()
        return status
    except SystemExit as stop:  # argparse has printed its message
        return stop.code if isinstance(stop.code, int) else _ERROR
    except BrokenPipeError:
        _silence_stdout()
        return _BROKEN_PIPE
    except KeyboardInterrupt:
        print("inq: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError) as error:
        print(f"inq: error: {_one_line(error)}", file=sys.stderr)
        return _ERROR


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


def _silence_stdout() -> None:
    """The reader has gone: let the interpreter's last flush go nowhere instead of complaining."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --- arguments --------------------------------------------------------------------------------------------------------


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="inq", description="Incremental Network Quantization: weights as powers of two at 2 to 5 bits."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.set_defaults(run=run)
        return command

    demo = add("demo", _demo, "train, quantize and retrain a small network, and show that nothing is lost")
    if argv[:1] == ["demo"]:
        from .demo import add_arguments

        add_arguments(demo)
    bench = add("bench", _bench, "time the operators beside torch's, after checking that they are right")
    if argv[:1] == ["bench"]:
        from .bench import add_arguments

        add_arguments(bench)
    _quantize_arguments(add("quantize", _quantize, "pack the weights of a model's files in one shot"))
    save = add("save", _save, "write a packed checkpoint again, entropy-coded or plain, bit for bit the same model")
    save.add_argument("source", metavar="SRC", help="a packed .safetensors file or directory")
    save.add_argument("target", metavar="OUT", help="a new .safetensors file or directory")
    save.add_argument("--compress", action="store_true", help="entropy-code the codes; needs inq_kernels[compress]")
    inspect = add("inspect", _inspect, "show the layers of a packed checkpoint, after checking all of it")
    inspect.add_argument("file", metavar="FILE", help="a .safetensors file or a directory")
    verify = add("verify", _verify, "check a packed checkpoint: structure, checksums, codes, exponents")
    verify.add_argument("file", metavar="FILE", help="a .safetensors file or a directory")
    conversions.add_export_arguments(add("export", _export, "write a packed checkpoint in another form, exactly"))
    conversions.add_import_arguments(add("import", _import, "pack weights that are powers of two already, exactly"))
    doctor = add("doctor", _doctor, "show versions, devices and backends, and why a backend cannot run")
    doctor.add_argument("--plan", action="store_true", help="show which kernel each product would run, and stop")
    doctor.add_argument("--op", nargs="+", choices=_PLANNED["cuda"], help="with --plan; default: all that --device has")
    for name, default in (("m", [1, 4, 16, 64, 256, 4096]), ("n", [4096]), ("k", [14336]), ("bits", [4])):
        doctor.add_argument(f"--{name}", nargs="+", type=int, default=default, help="with --plan; default: %(default)s")
    doctor.add_argument("--dtype", nargs="+", choices=_DTYPES, default=["bfloat16", "float32"], help="with --plan")
    doctor.add_argument("--isa", nargs="+", choices=_ISAS, help="with --plan; default: this machine's")
    doctor.add_argument("--levels", choices=LEVELS, default="paper", help="with --plan; default: %(default)s")
    doctor.add_argument("--device", choices=_PLANNED, default="cpu", help="with --plan; default: %(default)s")
    doctor.add_argument(
        "--capability", type=int, default=90, metavar="SM",
        help="with --plan --device cuda: the kind of GPU, which need not be here; default: %(default)s (Hopper)",
    )  # fmt: skip
    doctor.add_argument("--processors", type=int, default=132, help="of that GPU; default: %(default)s (H100, H200)")
    return parser


def _quantize_arguments(command: argparse.ArgumentParser) -> None:
    default = Format(5)
    command.add_argument("source", metavar="SRC", help="a .safetensors file, or a directory of a transformers model")
    command.add_argument("target", metavar="OUT", help="a new .safetensors file or directory")
    command.add_argument("--bits", type=int, choices=BITS, default=default.bits, help="default: %(default)s")
    command.add_argument("--levels", choices=LEVELS, default=default.levels, help="default: %(default)s")
    command.add_argument(
        "--granularity", choices=GRANULARITIES, default=default.granularity,
        help="one exponent a tensor or an output channel; default: %(default)s",
    )  # fmt: skip
    command.add_argument("--exponent", choices=EXPONENT_RULES, default=default.exponent, help="default: %(default)s")
    conversions.add_pattern_arguments(command)


# --- commands ---------------------------------------------------------------------------------------------------------


def _demo(args: argparse.Namespace) -> int:
    from .demo import run

    return run(args)


def _bench(args: argparse.Namespace) -> int:
    from .bench import run

    return run(args)


def _quantize(args: argparse.Namespace) -> int:
    from .transcode import DEFAULT_SKIP, quantize

    fmt = Format(args.bits, args.levels, args.granularity, args.exponent)
    default_skip = () if args.no_default_skip else DEFAULT_SKIP
    with _progress("quantizing") as progress:
        report = quantize(args.source, args.target, fmt, args.skip, args.only, default_skip, progress)
    rows = []
    for row in report.packed:
        result = "exact" if row.sqnr_db == float("inf") else "rounded"
        bits = 8 * row.bytes_after / _numel(row.shape)
        rows.append(
            (row.name, _shape(row.shape), f"{bits:.2f}", result, f"{row.sqnr_db:.1f}", f"{100 * row.zeros:.1f}")
        )
    _print_table(("tensor", "shape", "bits/weight", "result", "SQNR dB", "zeros %"), rows, str(fmt))
    _print_float(report.rows)
    if default_skip:
        print(f"Default skip: {' '.join(default_skip)} (--skip adds to it, --no-default-skip empties it)")
    if report.not_copied:
        print("Not copied: " + ", ".join(f"{name} ({reason})" for name, reason in report.not_copied))
    before, after = sum(r.bytes_before for r in report.rows), sum(r.bytes_after for r in report.rows)
    fraction = sum(r.bytes_before for r in report.packed) / before
    print(
        f"{args.target}: {bytes_text(before)} -> {bytes_text(after)}, {before / after:.2f} times smaller; "
        f"{fraction:.0%} of the bytes were packed"
    )
    if all(row.sqnr_db == float("inf") for row in report.packed):
        print("All packed weights were powers of two of this format already: nothing was lost.")
    else:
        print(_NOT_LOSSLESS)
    return 0


def _print_float(rows: Sequence) -> None:
    """What stayed float, a line for each reason: every norm of a large model would be a long list."""
    by_reason: dict[str, list] = {}
    for row in rows:
        if row.format is None:
            by_reason.setdefault(row.reason, []).append(row)
    lines = []
    for reason, group in by_reason.items():
        names = ", ".join(row.name for row in group[:3]) + (", …" if len(group) > 3 else "")
        lines.append((reason, len(group), bytes_text(sum(row.bytes_before for row in group)), names))
    if lines:
        _print_table(("stayed float because", "tensors", "size", "names"), lines)


def _save(args: argparse.Namespace) -> int:
    from .transcode import rewrite

    with _progress("writing") as progress:
        before, after = rewrite(args.source, args.target, args.compress, progress)
    print(f"{args.target}: {bytes_text(before)} -> {bytes_text(after)}, bit-exact")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from .checkpoint import inspect

    summary = inspect(args.file)
    rows = []
    for layer in summary.layers:
        low, high = layer.exponents
        rows.append(
            (
                layer.name or "(model)", _shape(layer.shape), layer.format, layer.coding, bytes_text(layer.bytes),
                f"{layer.bits:.2f}",
                f"{low}" if low == high else f"{low} to {high}", f"{100 * layer.zeros:.1f}", f"{layer.entropy:.2f}",
            )
        )  # fmt: skip
    headers = ("layer", "shape", "format", "codes", "size", "bits/weight", "exponents", "zeros %", "entropy bits")
    _print_table(headers, rows)
    print(
        f"packed weights: {bytes_text(sum(layer.bytes for layer in summary.layers))}, {summary.bits:.3f} bits a weight "
        f"with exponents and scales; entropy of the codes {summary.entropy:.3f}"
    )
    print(
        f"float32 {bytes_text(summary.float32_bytes)}, in {summary.files} file(s) {bytes_text(summary.file_bytes)}: "
        f"{summary.ratio:.2f} times smaller"
    )
    return 0


def _verify(args: argparse.Namespace) -> int:
    from .checkpoint import verify

    print(f"{args.file}: ok, {verify(args.file)} tensors")
    return 0


def _export(args: argparse.Namespace) -> int:
    with _progress("exporting") as progress:
        lines = list(conversions.export(args, progress))
    print(*lines, sep="\n")
    return 0


def _import(args: argparse.Namespace) -> int:
    with _progress("importing") as progress:
        lines = list(conversions.import_(args, progress))
    print(*lines, sep="\n")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from . import __version__, backends

    if args.plan:
        return _plan(args)

    def line(name: str, value: object) -> None:
        print(f"{name:<18} {value}")

    line("inq_kernels", __version__)
    line("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in ("torch", "triton", "safetensors", "numpy", "zstandard", "transformers", "rich"):
        try:
            line(package, version(package))
        except PackageNotFoundError:
            line(package, "not installed")
    line("cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            memory = bytes_text(torch.cuda.get_device_properties(index).total_memory)
            line(f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}, {memory}")
    else:
        line("cuda", "no device" if torch.version.cuda else "torch is built without CUDA")
    for name, reason in backends.availability().items():
        detail = f": {backends.cpu.summary()}" if name == "cpu" and reason is None else ""
        line(f"backend {name}", f"available{detail}" if reason is None else f"not available: {reason}")
    line(backends.ENVIRONMENT, os.environ.get(backends.ENVIRONMENT) or "not set")
    return 0


def _plan(args: argparse.Namespace) -> int:
    """What ``select`` and the compiled library, or on a GPU its tables, would choose. Nothing is computed, so any
    ``--isa`` or ``--capability`` may be asked for."""
    import itertools

    import torch

    from . import backends

    ops, rows = args.op or _PLANNED[args.device], []
    for name in ("m", "n", "k", "processors", "capability"):
        values = getattr(args, name)
        if (least := min(values if isinstance(values, list) else [values])) < 1:
            raise ValueError(f"--{name}: expected at least 1, got {least}")
    if args.device == "cuda":
        if args.isa:
            raise ValueError(f"--isa is about CPUs: expected none with --device cuda, got {args.isa[0]}")
        for op, dtype, bits, n, k, m in itertools.product(ops, args.dtype, args.bits, args.n, args.k, args.m):
            fmt = Format(bits, args.levels)
            found = backends.plan(op, m, n, k, getattr(torch, dtype), fmt, args.capability, args.processors)
            rows.append((op, dtype, bits, m, n, k, *found))
        title = f"sm_{args.capability}, {args.processors} processors"
        _print_table(("op", "x", "bits", "M", "N", "K", "backend", "kernel", "layout"), rows, title)
        return 0
    if missing := [op for op in ops if op not in _PLANNED["cpu"]]:
        raise ValueError(f"--op: expected one of {_PLANNED['cpu']} with --device cpu, got {missing[0]!r}")
    requested, available = os.environ.get(backends.ENVIRONMENT, ""), backends.availability()
    cases = itertools.product(ops, args.dtype, args.bits, args.n, args.k, args.m, args.isa or [None])
    for op, dtype, bits, n, k, m, isa in cases:
        backend = backends.select(op, requested, available, "cpu", getattr(torch, dtype))
        kernel = "decode, then torch's dense product"
        if backend == "cpu":
            kernel = backends.cpu.plan(op, m, n, k, dtype, isa)
        rows.append((op, dtype, bits, m, n, k, backend, kernel))
    _print_table(("op", "x", "bits", "M", "N", "K", "backend", "kernel"), rows)
    return 0


# --- output -----------------------------------------------------------------------------------------------------------


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _rich_on(stream: object) -> bool:
    if stream is None or not stream.isatty():
        return False
    try:
        import rich  # noqa: F401
    except ImportError:
        return False
    return True


def _print_table(headers: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> None:
    if not _rich_on(sys.stdout):
        print(*([title] if title else []), render(headers, rows), "", sep="\n")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    Console(markup=False, highlight=False).print(table)  # [Ee] in a pattern is no markup


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[str, int, int], None] | None]:
    """A progress bar on a terminal that rich can draw on, else nothing."""
    if not _rich_on(sys.stderr):
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what)
        yield lambda name, done, total: bar.update(task, completed=done, total=total, description=f"{what} {name}")


if __name__ == "__main__":
    sys.exit(main())
