"""A portion of INQ for many tensors at once: exponents, thresholds and freezing, reference.freeze_portion_.

W is read four times in float32, three times in bfloat16 and float16, and written once, whatever the rule, the
granularity, the masks and the ties; fewer times in a random partition (partition.py). Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..format import Format
from . import partition, quantize


def freeze_portions_(
    ws: Sequence[Tensor],
    masks: Sequence[Tensor],
    n1s: Sequence[Tensor],
    keeps: Sequence[Tensor | None],
    counts: Sequence[int],
    derive: bool,
    fmt: Format,
    random: bool = False,
    seeds: Sequence[int] | None = None,
) -> Tensor:
    """Freezes ``counts`` more of each weight: arguments as ``torch.ops.inq.freeze_portion_``'s.

    Returns:
        int64 [T] on the device: how many weights of each are frozen now.
    """
    if not ws:
        return torch.empty(0, dtype=torch.int64)
    quantize.check("freeze_portion_", ws, masks, n1s, keeps)
    if derive:
        rows, thresholds, keys = partition.decide(ws, masks, keeps, counts, fmt, random, seeds)
        torch._foreach_copy_(list(n1s), rows)
    else:
        rows, keys = n1s, partition.Keys(ws, masks, keeps, random, seeds)
        thresholds = keys.thresholds(counts)
    return quantize.freeze_(ws, masks, rows, thresholds, keeps, fmt, random, seeds, keys.ties_before())


def freeze_portion_(
    ws, masks, n1s, keeps, counts, derive, bits, levels, granularity, exponent, random, seeds
):  # fmt: skip
    """torch.ops.inq.freeze_portion_ for float32, bfloat16 and float16 weights of one dtype."""
    freeze_portions_(ws, masks, n1s, keeps, counts, derive, Format(bits, levels, granularity, exponent), random, seeds)
