"""What a product on a GPU would run, by the same choices as the launchers: ``inq doctor --plan --device cuda``."""

from __future__ import annotations

import torch

from .. import slices
from ..format import Format
from . import conv2d, tiles
from .codec import DOT, SOURCE
from .linear_fp8 import product_of

OPS = ("linear", "linear_fp8", "linear_dx", "conv2d")


def plan(
    op: str, m: int, n: int, k: int, dtype: torch.dtype, fmt: Format, capability: int, processors: int
) -> tuple[str, str]:
    """(the kernel and its tile in words, the layout of the weights). ``capability``: 90 for sm_90.

    Weights in the layout that a module gives them for x of ``dtype``; of ``linear_fp8`` in the one that is best for it.
    Of ``conv2d`` m counts pixels, n outputs, and k the weights of an output, in one group.
    """
    layout = slices.best(dtype, fmt)
    dot = DOT[dtype]
    if op == "linear_fp8":
        layout = slices.E4M3 if slices.has(slices.E4M3, fmt) else layout
        dot, layout = product_of(layout, capability)
    words = slices.words_of_slice(slices.codec(layout, fmt), k)
    if op == "conv2d":
        codes = slices.codec(layout, fmt).codes
        choice = conv2d.select(dot, m, n, 1, k, codes, True, processors)
    else:
        product = tiles.product(dot, SOURCE[layout])
        kernel = "linear_dx" if op == "linear_dx" else "linear"
        choice = tiles.select(kernel, product, m, n, words, processors, tiles.current(capability))
    return described(choice), layout


def described(choice: tiles.Choice | conv2d.Choice) -> str:
    """A choice in words: outputs × rows × words of a step."""
    if choice.kernel == "dense":
        return "decode once, then the library's product"
    tile = choice.tile
    name = "no tensor cores, " if choice.kernel == "direct" else ""
    parts = f", {choice.splits} parts of K" if choice.splits > 1 else ""
    return f"{name}tile {tile.bn}×{tile.bm}×{tile.bk}, {tile.warps} warps, {tile.stages} stages{parts}"
