"""Every kernel as it can be launched: what ``inq bench static`` compiles for each kind of GPU, without one.

For products these are the tiles that ``tiles.select`` can return on that GPU, with each codec that a product type meets
and each value of each constant. A module that has its own kernels has a function ``configurations()`` beside them,
which yields what this one yields.

A type in a signature that ends with ``:16`` says that launches pass a multiple of 16, as Triton finds out by itself
when it launches. Pointers always are.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from .. import slices
from ..format import Format
from . import linear as linear_module
from . import linear_dx, tiles
from .codec import decoder
from .dense import _BK, _BN, dense_kernel
from .linear import _REDUCE_M, _REDUCE_N, linear_kernel, reduce_kernel
from .linear_dx import linear_dx_kernel
from .linear_fp8 import _BLOCK, FIRST_E4M3, quantize_rows_kernel

# Modules beside this one that may have configurations of their own.
MODULES = ("partition", "quantize", "masked_steps", "storage", "conv2d")
KINDS = {
    "paper4": Format(4, "paper"),
    "dense4": Format(4, "dense"),
    "paper5": Format(5, "paper"),
    "dense5": Format(5, "dense"),
}
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_POINTERS = {"fp16": "*fp16", "bf16": "*bf16", "fp32": "*fp32", "e4m3": "*fp8e4nv"}
# What launchers leave to Triton, which asks for this many; loops here say their own.
_STAGES = 3


class Configuration(NamedTuple):
    """A kernel and what Triton makes one compiled kernel of.

    ``signature``: the type of every argument by name, "constexpr" for constants.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


def configuration(name: str, kernel, types: dict[str, str], constants: dict[str, Any], warps: int = 4) -> Configuration:
    """With the signature in the kernel's order. ValueError if an argument has no type and no value, or is unknown.

    Launches make a constant of a number that is 1: such an argument is among ``constants`` instead.
    """
    types = {argument: kind for argument, kind in types.items() if argument not in constants}
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument, "") for argument in kernel.arg_names
    }
    unknown = {*types, *constants} - set(kernel.arg_names)
    missing = [argument for argument, kind in signature.items() if not kind]
    if unknown or missing:
        raise ValueError(f"{name}: arguments without a type {missing}, and unknown ones {sorted(unknown)}")
    return Configuration(name, kernel, signature, constants, warps, _STAGES)


def configurations(capability: int = 90) -> Iterator[Configuration]:
    """All there are on a kind of GPU, names unique."""
    table = tiles.defaults(capability)
    yield from _linear(table, capability)
    yield from _reduce()
    yield from _linear_dx(table)
    yield from _dense()
    for dtype in _DTYPES:
        types = {"x": _POINTERS[dtype], "values": "*u8", "exponents": "*i32", "K": "i32:16", "stride_m": "i32:16"}
        constants = {"BLOCK": _BLOCK, "INTERPRETED": False}
        yield configuration(f"quantize_rows {dtype}", quantize_rows_kernel, types, constants)
        types |= {"K": "i32", "stride_m": "i32"}
        yield configuration(f"quantize_rows {dtype} ragged", quantize_rows_kernel, types, constants)
    for module in MODULES:
        name = f"{__package__}.{module}"
        if importlib.util.find_spec(name) is not None:
            found = getattr(importlib.import_module(name), "configurations", None)
            yield from (Configuration(*each) for each in (found() if found else ()))


def layout_for(dot: str, fmt: Format) -> str:
    """The layout that products of this type are made from, unless a weight is in another one already."""
    if dot == "e4m3":
        return slices.E4M3 if slices.has(slices.E4M3, fmt) else slices.FP16
    return slices.best(_DTYPES[dot], fmt)


Table = Mapping[str, Mapping[int, tiles.Tile]]


def _tiles(row: Mapping[int, tiles.Tile]) -> Iterator[tuple[int, tiles.Tile]]:
    """(rows, tile) of a table's row, each tile once."""
    seen = set()
    for rows, tile in row.items():
        if tile not in seen:
            seen.add(tile)
            yield rows, tile


def _codecs(dot: str) -> Iterator[tuple[str, Format, str, str]]:
    """(kind, format, layout, what a name says of it): the words that products of a type decode, their own first.

    Weights stay in the layout that a module was given; words of e4m3 alone are for e4m3's products alone.
    """
    for kind, fmt in KINDS.items():
        own = layout_for(dot, fmt)
        for layout in (own, *(each for each in (slices.FP16, slices.BF16) if each != own)):
            if slices.has(layout, fmt):
                yield kind, fmt, layout, "" if layout == own else f" from {layout}"


# Of linear_kernel's constants and sizes. ``masked``: not all of K is whole steps; ``ragged``: N is no multiple of 16.
_VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    " masked scale bias": {"masked": True, "scale": True, "bias": True, "ragged": True},
    " split": {"split": True},
    " masked split": {"masked": True, "split": True, "ragged": True},
}
# What is added after the loop has no part in what the loop has: the first tile stands for others.
_EPILOGUES: dict[str, dict[str, Any]] = {
    " masked": {"masked": True},
    " scale": {"scale": True},
    " bias": {"bias": True},
    " scale bias": {"scale": True, "bias": True},
}


def _linear(table: Table, capability: int) -> Iterator[Configuration]:
    # Before sm_89 rows of e4m3 numbers are multiplied as float16: kernels of fp16 but for their epilogue.
    e4m3 = capability >= FIRST_E4M3
    for dot, rows_exp in (("fp16", False), ("bf16", False), ("fp32", False), ("e4m3" if e4m3 else "fp16", True)):
        for kind, fmt, layout, words in _codecs(dot):
            source = decoder(layout, fmt).constants["SOURCE"]
            for rows, tile in _tiles(table[f"linear {tiles.product(dot, source)}"]):
                name = f"linear {'e4m3 as fp16' if rows_exp and not e4m3 else dot} {kind} m{rows}{words}"
                first = rows == tiles.ROWS[0]
                for variant, facts in (_VARIANTS | (_EPILOGUES if first and not words else {})).items():
                    if e4m3 or not (rows_exp and facts.get("split")):
                        yield _linear_one(f"{name}{variant}", dot, fmt, layout, tile, rows_exp, **facts)
                for out in ("fp16", "fp32") if rows_exp and first else ():
                    yield _linear_one(f"{name} to {out}", dot, fmt, layout, tile, rows_exp, out=out)


def _linear_one(
    name: str,
    dot: str,
    fmt: Format,
    layout: str,
    tile: tiles.Tile,
    rows_exp: bool,
    masked: bool = False,
    ragged: bool = False,
    split: bool = False,
    scale: bool = False,
    bias: bool = False,
    out: str = "",
) -> Configuration:
    made = decoder(layout, fmt)
    words = 16 * tile.bk
    constants = linear_module.constants(made, dot, tile, made.codec.codes * words - 16 * masked, words)
    constants["SPLIT"] = split
    # Sums that are parts have no epilogue yet.
    rows_exp = rows_exp and not split
    constants |= {"HAS_SCALE": scale, "HAS_BIAS": bias, "HAS_ROWS": rows_exp}
    out = out or ("bf16" if rows_exp else "fp32" if split else dot)
    types = {
        "x": _POINTERS[dot],
        "weight": "*i8" if made.codec.width == 8 else "*i16",
        "weight_exp": "*i8",
        "weight_scale": "*fp32" if scale else "*i8",
        "bias": _POINTERS[out] if bias else "*i8",
        "rows_exp": "*i32" if rows_exp else "*i8",
        "out": "*fp32" if split else _POINTERS[out],
        "M": "i32",
        "N": "i32" if ragged else "i32:16",
        "K": "i32:16",
        "words": "i32:16",
        "stride_m": "i32:16",
        "steps": "i32",
    }
    return configuration(name, linear_kernel, types, constants, tile.warps)


def _reduce() -> Iterator[Configuration]:
    for out in _DTYPES:
        for rows, scale, bias in itertools.product((False, True), (False, True), (False, True)):
            constants = {"EXPONENT": -3, "HAS_SCALE": scale, "HAS_BIAS": bias, "HAS_ROWS": rows}
            constants |= {"BM": _REDUCE_M, "BN": _REDUCE_N, "INTERPRETED": False}
            types = dict(parts="*fp32", weight_exp="*i8", weight_scale="*fp32" if scale else "*i8")
            types |= dict(bias=_POINTERS[out] if bias else "*i8", rows_exp="*i32" if rows else "*i8")
            types |= dict(out=_POINTERS[out], M="i32", N="i32", splits="i32")
            words = " rows" * rows + " scale" * scale + " bias" * bias
            yield configuration(f"reduce {out}{words}", reduce_kernel, types, constants)


def _linear_dx(table: Table) -> Iterator[Configuration]:
    for dtype in ("fp16", "bf16", "fp32"):
        for kind, fmt, layout, words in _codecs(dtype):
            made = decoder(layout, fmt)
            for rows, tile in _tiles(table[f"linear_dx {dtype}"]):
                for variant in ("", " scale ragged"):
                    scale, size = "scale" in variant, "i32" if "ragged" in variant else "i32:16"
                    constants = linear_dx.constants(made, _DTYPES[dtype], tile, scale)
                    types = dict(grad=_POINTERS[dtype], weight="*i16", weight_exp="*i8", out=_POINTERS[dtype])
                    types |= dict(weight_scale="*fp32" if scale else "*i8")
                    types |= dict(M="i32", N=size, K=size, words="i32:16", stride_m="i32:16")
                    name = f"linear_dx {dtype} {kind} m{rows}{words}{variant}"
                    yield configuration(name, linear_dx_kernel, types, constants, tile.warps)


def _dense() -> Iterator[Configuration]:
    for dtype in ("fp16", "bf16"):
        for kind, fmt, layout, words in _codecs(dtype):
            made = decoder(layout, fmt)
            constants = made.constants | {"BN": _BN, "BK": _BK, "INTERPRETED": False}
            for name, size in (("", "i32:16"), (" ragged", "i32")):
                types = {"weight": "*i16", "out": _POINTERS[dtype], "N": size, "K": size, "words": "i32:16"}
                yield configuration(f"dense {dtype} {kind}{words}{name}", dense_kernel, types, constants)
