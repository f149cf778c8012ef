"""``inq export`` and ``inq import``: their arguments, and what they print. Heavy imports happen when used."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

from ..format import BITS, GRANULARITIES, LEVELS
from ..table import render

_DTYPES = ("float64", "float32", "bfloat16", "float16")
_TARGETS = ("mxfp4", "fp8", "dense", "pt2")
_SHOWN = 12


def add_export_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="SRC", help="a packed .safetensors file or directory")
    command.add_argument(
        "target",
        metavar="OUT",
        help="mxfp4, fp8: a new directory; dense: or a .safetensors file; pt2: a .pt2 file",
    )
    command.add_argument(
        "--to", choices=_TARGETS, required=True,
        help="mxfp4, fp8: compressed-tensors' layouts, which transformers and vLLM load without this package; dense: "
        "ordinary safetensors, float weights; pt2: compiled by torch.export and AOTInductor",
    )  # fmt: skip
    command.add_argument("--dtype", choices=_DTYPES, help="dense: of the unpacked weights (default: as before packing)")
    command.add_argument(
        "--model", metavar="MODULE:FUNCTION", help="pt2: your function that makes the model that SRC is loaded into"
    )
    command.add_argument(
        "--input", action="append", metavar="[DTYPE:]SHAPE",
        help="pt2: an example input such as 2x64 or int64:2x16, the batch first; once for each input",
    )  # fmt: skip


def export(args: argparse.Namespace, progress: Callable[[str, int, int], None] | None) -> Iterator[str]:
    """Do what ``inq export`` was asked for; the lines to print."""
    for option, target in (("dtype", "dense"), ("model", "pt2"), ("input", "pt2")):
        if getattr(args, option) is not None and args.to != target:
            raise ValueError(f"--{option}: expected with --to {target} alone, got --to {args.to}")
    if args.to == "dense":
        yield from _export_dense(args, progress)
    elif args.to == "pt2":
        yield from _export_pt2(args)
    else:
        from .exports import EXPORTS

        report = EXPORTS[args.to](args.source, args.target, progress)
        for name, reason in report.as_float:
            yield f"{name}: written as floats: {reason}"
        if report.not_copied:
            yield "Not copied: " + ", ".join(f"{name} ({reason})" for name, reason in report.not_copied)
        if args.to == "mxfp4" and {str(dtype) for dtype in report.dtypes} != {"torch.bfloat16"}:
            yield (
                "compressed-tensors computes MXFP4 with bfloat16 weights: load a model of another dtype in transformers"
                " with quantization_config=CompressedTensorsConfig(dequantize=True)"
            )
        yield (
            f"{args.target}: {len(report.quantized)} weights in {args.to}, {report.bits_a_weight:.2f} bits a weight, "
            "bit-exact"
        )


def _export_dense(args: argparse.Namespace, progress: Callable[[str, int, int], None] | None) -> Iterator[str]:
    import torch

    from ..transcode import export_dense

    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    count = export_dense(args.source, args.target, dtype, progress)
    yield f"{args.target}: {count} weights unpacked, bit-exact"


def _export_pt2(args: argparse.Namespace) -> Iterator[str]:
    if not args.model or not args.input:
        raise ValueError("--to pt2: expected --model MODULE:FUNCTION and --input [DTYPE:]SHAPE, got them not both")
    from ..checkpoint import load
    from . import pt2

    inputs = [pt2.example_input(text) for text in args.input]
    model = load(args.source, pt2.load_factory(args.model)().eval())
    calls = pt2.save_pt2(model, inputs, args.target)
    shown = ", ".join(f"{name} {count} times" for name, count in sorted(calls.items()))
    yield f"{args.target}: compiled for any batch; {shown}. Load {pt2.library_path()} first"


def add_import_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "source", metavar="SRC", help="a .safetensors file of float weights, or a directory (also MXFP4 and FP8)"
    )
    command.add_argument("target", metavar="OUT", help="a new .safetensors file or directory")
    command.add_argument("--bits", type=int, choices=BITS, help="default: the smallest format that holds the most")
    command.add_argument("--levels", choices=LEVELS)
    command.add_argument("--granularity", choices=GRANULARITIES, help="one exponent a tensor or an output channel")
    add_pattern_arguments(command)


def add_pattern_arguments(command: argparse.ArgumentParser) -> None:
    """Which modules to pack: of ``inq quantize`` and ``inq import``."""
    command.add_argument(
        "--skip", nargs="+", action="extend", default=[], metavar="PATTERN",
        help="modules that stay float, besides the default ones (embeddings by name); * and ? match as in a shell",
    )  # fmt: skip
    command.add_argument(
        "--only", nargs="+", action="extend", default=[], metavar="PATTERN", help="the only modules to pack"
    )
    command.add_argument("--no-default-skip", action="store_true", help="pack what looks like an embedding, too")


def import_(args: argparse.Namespace, progress: Callable[[str, int, int], None] | None) -> Iterator[str]:
    """Do what ``inq import`` was asked for; the lines to print."""
    from ..transcode import DEFAULT_SKIP
    from .imports import import_packed

    report = import_packed(
        args.source, args.target, bits=args.bits, levels=args.levels, granularity=args.granularity, skip=args.skip,
        only=args.only, default_skip=() if args.no_default_skip else DEFAULT_SKIP, progress=progress,
    )  # fmt: skip
    floats = [row for row in report.rows if row.format is None]
    if floats:
        yield from _first(("stayed float", "because"), [(row.name, row.reason) for row in floats])
    if zeros := sum(row.negative_zeros for row in report.packed):
        yield f"{zeros} negative zeros became +0."
    if report.not_copied:
        yield "Not copied: " + ", ".join(f"{name} ({reason})" for name, reason in report.not_copied)
    yield f"{args.target}: {len(report.packed)} of {len(report.rows)} weights packed, bit-exact, {report.format}"


def _first(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield render(headers, rows[:_SHOWN])
    if len(rows) > _SHOWN:
        yield f"… and {len(rows) - _SHOWN} more"
    yield ""
