"""Kernels as they can be launched: what ``inq bench static`` compiles for each kind of GPU, without one.

For products these are the tiles that ``tiles.select`` can return on that GPU, of every type, with the words that it
meets. Every pair of constants would be ten thousand kernels, so some stand for others (``COVERED`` says so in words).
A module that has its own kernels has a function ``configurations()`` beside them, which yields what this one yields.

A type in a signature that ends with ``:16`` says that launches pass a multiple of 16, as Triton finds out by itself
when it launches. Pointers always are.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch

from .. import slices
from ..format import Format
from . import linear as linear_module
from . import linear_dx, tiles
from .codec import decoder
from .dense import _BK, _BN, dense_kernel
from .launch import REGISTERS, Configuration, configuration
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


# Where all that differs is compiled: the GPU of the bars.
_ALL = 90
# What the head of the table says of all this.
COVERED = (
    "Compiled on every kind of GPU: each tile that `select` can return for `linear`, of each type of product, from "
    "the 4-bit words of the paper's levels that are its own (e4m3 also from 16-bit words, of 5 bits, with K masked), "
    "with K in whole steps and masked, N a multiple of 16 and not, and for sums that are parts; for `linear_dx`, with "
    "a row scale; for `conv2d`, with 3×3 windows that leave the image, and for sums that are parts. On sm_90 all of "
    "`linear` from the words of every format, masked also from words of the other type; `linear_dx` from all; "
    "`conv2d` with other windows, words and memory with its largest tile. On sm_80 16-bit products also from the "
    "words of `dense` levels and of 5 bits. Epilogues have all they can have: row exponents, scale, bias. Kernels "
    "without products: on sm_90 every variant of those for training, elsewhere one of each kernel and type. Not "
    "compiled: the remaining combinations of these; epilogues that have less; `dense` levels of 2 and 3 bits, which "
    "differ from 4 in numbers alone; arguments that are 1, or multiples of 16, where those of no configuration are; "
    "tiles of a tuned file."
)


def configurations(capability: int = 90) -> Iterator[Configuration]:
    """All that are compiled on a kind of GPU, names unique."""
    table = tiles.defaults(capability)
    yield from _linear(table, capability)
    yield from _linear_dx(table, capability)
    others = itertools.chain(_reduce(), _dense(), _quantize_rows(), *map(_of_module, MODULES))
    seen = set()
    for each in others:
        key = each.name if capability == _ALL else _kind(each)
        if key not in seen:
            seen.add(key)
            yield each


def _kind(each: Configuration) -> tuple:
    """What one kernel of each stands for the others: tiles, parts and types of convolutions; types of others."""
    constants = each.constexprs
    names = ("DOT", "BN", "BM", "SPLIT") if "KH" in constants else ("DTYPE",)
    pointers = [given for given in each.signature.values() if given.startswith("*")]
    return (each.kernel.__name__, *(str(constants.get(name)) for name in names), *pointers)


def _of_module(module: str) -> Iterator[Configuration]:
    name = f"{__package__}.{module}"
    if importlib.util.find_spec(name) is not None:
        found = getattr(importlib.import_module(name), "configurations", None)
        yield from found() if found else ()


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
_VARIANTS: dict[str, dict[str, bool]] = {
    "": {},
    " ragged": {"ragged": True},
    " masked": {"masked": True, "ragged": True},
    " split": {"split": True},
    " masked split": {"masked": True, "split": True, "ragged": True},
}


def _variants(dot: str, kind: str, own: bool, capability: int) -> Sequence[str]:
    """Which of them are compiled for each tile; ``own``: from the words that are a product's own."""
    if own and (kind == "paper4" or capability == _ALL):
        return list(_VARIANTS)
    if capability == _ALL or (dot == "e4m3" and own and kind == "paper5"):
        return (" masked",)
    return ("", " masked") if own and capability == 80 and dot in ("fp16", "bf16") else ()


def _linear(table: Table, capability: int) -> Iterator[Configuration]:
    # Before sm_89 rows of e4m3 numbers are multiplied as float16: kernels of fp16 but for the rows' exponents.
    e4m3 = capability >= FIRST_E4M3
    for dot in ("fp16", "bf16", "fp32", "e4m3")[: 4 if e4m3 else 3]:
        rows_exp = dot == "e4m3" or (dot == "fp16" and not e4m3)
        decoders = []
        for kind, fmt, layout, words in _codecs(dot):
            made = decoder(layout, fmt)
            # Formats that are decoded alike are one kernel.
            variants = () if made.constants in decoders else _variants(dot, kind, not words, capability)
            decoders.append(made.constants)
            product = f"linear {tiles.product(dot, made.constants['SOURCE'])}"
            for (rows, tile), variant in itertools.product(_tiles(table[product]), variants):
                facts = dict(_VARIANTS[variant])
                if facts.get("ragged") and tile not in tiles.row(table, product, 1).values():
                    if variant == " ragged":
                        continue
                    facts["ragged"] = False
                yield _linear_one(
                    f"linear {dot} {kind} m{rows}{words}{variant}", dot, fmt, layout, tile, rows_exp, **facts
                )


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
) -> Configuration:
    made = decoder(layout, fmt)
    words = 16 * tile.bk
    constants = linear_module.constants(made, dot, tile, made.codec.codes * words - 16 * masked, words)
    constants["SPLIT"] = split
    # Sums that are parts have no epilogue yet.
    rows_exp = rows_exp and not split
    constants |= {"HAS_SCALE": not split, "HAS_BIAS": not split, "HAS_ROWS": rows_exp}
    out = "fp32" if split else "bf16" if dot == "e4m3" else dot
    types = {
        "x": _POINTERS[dot],
        "weight": "*i8" if made.codec.width == 8 else "*i16",
        "weight_exp": "*i8",
        "weight_scale": "*i8" if split else "*fp32",
        "bias": "*i8" if split else _POINTERS[out],
        "rows_exp": "*i32" if rows_exp else "*i8",
        "out": _POINTERS[out],
        "M": "i32",
        "N": "i32" if ragged else "i32:16",
        "K": "i32:16",
        "words": "i32:16",
        "stride_m": "i32:16",
        "steps": "i32",
    }
    return configuration(name, linear_kernel, types, constants, tile.warps, registers=REGISTERS)


def _reduce() -> Iterator[Configuration]:
    for out in _DTYPES:
        constants = {"EXPONENT": -3, "HAS_SCALE": True, "HAS_BIAS": True, "HAS_ROWS": True}
        constants |= {"BM": _REDUCE_M, "BN": _REDUCE_N, "INTERPRETED": False}
        types = dict(parts="*fp32", weight_exp="*i8", weight_scale="*fp32", bias=_POINTERS[out], rows_exp="*i32")
        types |= dict(out=_POINTERS[out], M="i32", N="i32", splits="i32")
        yield configuration(f"reduce {out}", reduce_kernel, types, constants)


def _linear_dx(table: Table, capability: int) -> Iterator[Configuration]:
    for dtype in _DTYPES:
        for kind, fmt, layout, words in _codecs(dtype):
            first = kind == "paper4" and not words
            made = decoder(layout, fmt)
            for rows, tile in _tiles(table[f"linear_dx {dtype}"]) if capability == _ALL or first else ():
                for variant in ("", " scale ragged") if first and capability in (80, _ALL) else (" scale ragged",):
                    scale, size = bool(variant), "i32" if variant else "i32:16"
                    constants = linear_dx.constants(made, _DTYPES[dtype], tile, scale)
                    types = dict(grad=_POINTERS[dtype], weight="*i16", weight_exp="*i8", out=_POINTERS[dtype])
                    types |= dict(weight_scale="*fp32" if scale else "*i8")
                    types |= dict(M="i32", N=size, K=size, words="i32:16", stride_m="i32:16")
                    name = f"linear_dx {dtype} {kind} m{rows}{words}{variant}"
                    yield configuration(name, linear_dx_kernel, types, constants, tile.warps, registers=REGISTERS)


def _dense() -> Iterator[Configuration]:
    for dtype in ("fp16", "bf16"):
        for kind, fmt, layout, words in _codecs(dtype):
            made = decoder(layout, fmt)
            constants = made.constants | {"BN": _BN, "BK": _BK, "INTERPRETED": False}
            for name, size in (("", "i32:16"), (" ragged", "i32")) if not words else ((" ragged", "i32"),):
                types = {"weight": "*i16", "out": _POINTERS[dtype], "N": size, "K": size, "words": "i32:16"}
                yield configuration(f"dense {dtype} {kind}{words}{name}", dense_kernel, types, constants)


def _quantize_rows() -> Iterator[Configuration]:
    for dtype in _DTYPES:
        for name, size in (("", "i32:16"), (" ragged", "i32")):
            types = {"x": _POINTERS[dtype], "values": "*u8", "exponents": "*i32", "K": size, "stride_m": size}
            constants = {"BLOCK": _BLOCK, "INTERPRETED": False}
            yield configuration(f"quantize_rows {dtype}{name}", quantize_rows_kernel, types, constants)
