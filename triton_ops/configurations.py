"""Every kernel as it can be launched: what ``inq bench static`` compiles for each kind of GPU, without one.

For products these are the tiles that ``tiles.select`` can return, with each codec that a product type meets. A module
that has its own kernels has a function ``configurations()`` beside them, which yields what this one yields.

A type in a signature that ends with ``:16`` says that launches pass a multiple of 16, as Triton finds out by itself
when it launches. Pointers always are.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping

import torch

from .. import slices
from ..format import Format
from . import linear as linear_module
from . import linear_dx, tiles
from .codec import decoder
from .dense import _BK, _BN, dense_kernel
from .launch import Configuration, configuration
from .linear import _REDUCE_M, _REDUCE_N, linear_kernel, reduce_kernel
from .linear_dx import linear_dx_kernel
from .linear_fp8 import _BLOCK, quantize_rows_kernel

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


def configurations(capability: int = 90) -> Iterator[Configuration]:
    """All there are on a kind of GPU, names unique."""
    yield from _linear(tiles.defaults(capability))
    yield from _reduce()
    yield from _linear_dx(tiles.defaults(capability))
    yield from _dense()
    for dtype in _DTYPES:
        types = {"x": _POINTERS[dtype], "values": "*u8", "exponents": "*i32", "K": "i32:16", "stride_m": "i32:16"}
        yield configuration(
            f"quantize_rows {dtype}", quantize_rows_kernel, types, {"BLOCK": _BLOCK, "INTERPRETED": False}
        )
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


def _linear(table: Table) -> Iterator[Configuration]:
    for dot in ("fp16", "bf16", "e4m3", "fp32"):
        for kind, fmt in KINDS.items():
            layout = layout_for(dot, fmt)
            # Three codes a word: no usual K is a multiple of 3·32, so products of 5 bits are masked.
            whole = decoder(layout, fmt).codec.codes != 3
            for rows, tile in _tiles(_row(table, dot, layout, fmt)):
                name = f"linear {dot} {kind} m{rows}"
                yield _linear_one(name, dot, fmt, layout, tile, whole=whole)
                if kind == "paper4":
                    yield _linear_one(f"{name} masked", dot, fmt, layout, tile, whole=False, ragged=True)
                    yield _linear_one(f"{name} split", dot, fmt, layout, tile, split=True)
                    yield _linear_one(f"{name} scale bias", dot, fmt, layout, tile, epilogue=True)
                    if rows == tiles.ROWS[0]:
                        yield _linear_one(f"{name} one row split", dot, fmt, layout, tile, split=True, one_row=True)
            # Weights stay in the layout that a module was given, whatever is multiplied with them.
            for other in slices.LAYOUTS:
                if slices.has(other, fmt) and other != layout:
                    whole = decoder(other, fmt).codec.codes != 3
                    rows, tile = next(_tiles(_row(table, dot, other, fmt)))
                    name = f"linear {dot} {kind} m{rows} from {other}"
                    yield _linear_one(name, dot, fmt, other, tile, whole=whole)


def _row(table: Table, dot: str, layout: str, fmt: Format) -> Mapping[int, tiles.Tile]:
    return table[f"linear {tiles.product(dot, decoder(layout, fmt).constants['SOURCE'])}"]


def _linear_one(
    name: str,
    dot: str,
    fmt: Format,
    layout: str,
    tile: tiles.Tile,
    whole: bool = True,
    ragged: bool = False,
    split: bool = False,
    epilogue: bool = False,
    one_row: bool = False,
) -> Configuration:
    """linear_kernel. ``whole``: nothing is masked along K; ``ragged``: N is no multiple of 16, as K always is."""
    made = decoder(layout, fmt)
    words = 16 * tile.bk
    constants = linear_module.constants(made, dot, tile, made.codec.codes * words, words)
    constants |= {"WHOLE_K": whole, "WHOLE_WORDS": whole, "SPLIT": split}
    constants |= {"HAS_SCALE": epilogue, "HAS_BIAS": epilogue, "HAS_ROWS": dot == "e4m3"}
    constants |= {"M": 1} if one_row else {}
    out = "bf16" if dot == "e4m3" else dot
    types = {
        "x": _POINTERS[dot],
        "weight": "*i8" if made.codec.width == 8 else "*i16",
        "weight_exp": "*i8",
        "weight_scale": "*fp32" if epilogue else "*i8",
        "bias": _POINTERS[out] if epilogue else "*i8",
        "rows_exp": "*i32" if dot == "e4m3" else "*i8",
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
        for rows in (False, True):
            constants = {"EXPONENT": -3, "HAS_SCALE": True, "HAS_BIAS": True, "HAS_ROWS": rows}
            constants |= {"BM": _REDUCE_M, "BN": _REDUCE_N, "INTERPRETED": False}
            types = dict(parts="*fp32", weight_exp="*i8", weight_scale="*fp32", bias=_POINTERS[out])
            types |= dict(rows_exp="*i32" if rows else "*i8", out=_POINTERS[out])
            types |= dict(M="i32", N="i32:16", splits="i32")
            yield configuration(f"reduce {out}{' rows' if rows else ''}", reduce_kernel, types, constants)
            if not rows:
                for name, ones in (("one row", {"M": 1}), ("one part", {"splits": 1})):
                    yield configuration(f"reduce {out} {name}", reduce_kernel, types, constants | ones)


def _linear_dx(table: Table) -> Iterator[Configuration]:
    for dtype in ("fp16", "bf16", "fp32"):
        for rows, tile in _tiles(table[f"linear_dx {dtype}"]):
            for kind, fmt in KINDS.items():
                made = decoder(slices.best(_DTYPES[dtype], fmt), fmt)
                for variant in ("", " scale", " ragged") if kind == "paper4" else ("",):
                    scale, size = variant == " scale", "i32" if variant == " ragged" else "i32:16"
                    constants = linear_dx.constants(made, _DTYPES[dtype], tile, scale)
                    types = dict(grad=_POINTERS[dtype], weight="*i16", weight_exp="*i8", out=_POINTERS[dtype])
                    types |= dict(weight_scale="*fp32" if scale else "*i8")
                    types |= dict(M="i32", N=size, K=size, words="i32:16", stride_m=size)
                    name = f"linear_dx {dtype} {kind} m{rows}{variant}"
                    yield configuration(name, linear_dx_kernel, types, constants, tile.warps)


def _dense() -> Iterator[Configuration]:
    for dtype in ("fp16", "bf16"):
        for kind, fmt in KINDS.items():
            made = decoder(slices.best(_DTYPES[dtype], fmt), fmt)
            constants = made.constants | {"BN": _BN, "BK": _BK, "INTERPRETED": False}
            types = {"weight": "*i16", "out": _POINTERS[dtype], "N": "i32:16", "K": "i32:16", "words": "i32:16"}
            yield configuration(f"dense {dtype} {kind}", dense_kernel, types, constants)
