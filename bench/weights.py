"""Random packed weights and the same weights dense, made quickly: hundreds of millions in a second or two."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cuda, fragments, ops, reference, slices
from ..format import Format
from ..ops import PackedWeight
from .case import DTYPES, Context

# Every weight row is made of groups of 8 codes (``bits`` bytes) drawn from this many.
_POOL = 1 << 16


class RandomWeights:
    """[n, k] random canonical codes, all of them alike likely, with an exponent of its own for every row."""

    def __init__(self, n: int, k: int, fmt: Format, seed: int = 0, device: str = "cpu"):
        g = torch.Generator().manual_seed(seed)
        self.n, self.k, self.fmt = n, k, fmt
        canonical = torch.tensor([c for c, level in enumerate(fmt.code_levels) if level is not None], dtype=torch.uint8)
        codes = canonical[torch.randint(len(canonical), (_POOL, 8), generator=g)]
        # The second half of the pool is for the last group of a row, whose padding is zero codes.
        last = codes.clone()
        last[:, k % 8 or 8 :] = 0
        self._pool = reference.pack_codes(torch.cat([codes, last]), fmt.bits).to(device)
        # Hundreds of millions of weights are drawn where they are used.
        g = g if device == "cpu" else torch.Generator(device).manual_seed(seed)
        self._index = torch.randint(_POOL, (n, (k + 7) // 8), generator=g, dtype=torch.int32, device=device)
        self._index[:, -1] += _POOL
        self.n1 = torch.randint(-8, -3, (n, 1), generator=g, device=device).to(torch.int8)

    def packed(self) -> PackedWeight:
        """In the storage layout."""
        weight = self._pool[self._index].view(self.n, -1)
        return PackedWeight(weight, self.n1, None, self.fmt, (self.n, self.k))

    def dense(self, dtype: torch.dtype, rows: Tensor | slice = slice(None), groups: Tensor | slice = slice(None)):
        """The decoded weights, exact in ``dtype``; of some ``rows``, or of some ``groups`` of 8 columns."""
        values = reference.relative_values(self._pool, 8, self.fmt, dtype)
        index = self._index[rows][:, groups]
        w = values[index].view(index.shape[0], -1)
        w *= torch.exp2(self.n1[rows].to(dtype))
        return w[:, : self.k] if groups == slice(None) else w


def prepacked(packed: PackedWeight, backend: str, layout: str | None = None) -> PackedWeight:
    """In the layout that ``backend`` multiplies from; the reference has the storage layout alone.

    ``layout``: the one that a GPU's kernels want for what they are given.
    """
    return packed if backend == "reference" else ops.prepack(packed, layout)


def _layout(backend: str, dtype: str, fmt: Format) -> str | None:
    """What a GPU's kernels multiply x of ``dtype`` from; None: the CPU's choice."""
    if backend == "cuda":
        return fragments.E4M3 if dtype == "e4m3" else cuda.LAYOUTS[DTYPES[dtype]]
    if backend != "triton":
        return None
    layout = slices.best(DTYPES[dtype], fmt) if dtype in DTYPES else slices.E4M3
    return layout if slices.has(layout, fmt) else slices.FP16


def rotated(
    context: Context, n: int, k: int, bits: int, dtype: str = "bfloat16"
) -> tuple[RandomWeights, PackedWeight, list[tuple]]:
    """Weights, packed for the context's backend and x of ``dtype``, and (weight, weight_exp, weight_scale) of each
    rotated copy."""
    fmt = Format(bits)
    w = context.get(("weights", bits), lambda: RandomWeights(n, k, fmt, device=context.device))
    layout = _layout(context.backend, dtype, fmt)
    kept = (bits, layout)
    packed = context.get(("packed", *kept), lambda: prepacked(w.packed(), context.backend, layout))
    codes = context.copies(("codes", *kept), lambda: packed.weight)
    return w, packed, [(each, packed.weight_exp, None) for each in codes]


def bits_in_use(packed: PackedWeight) -> float:
    """Bits a weight that a layer keeps in memory, row exponents not counted."""
    n, k = packed.shape[0], packed.k
    return 8 * packed.weight.numel() / (n * k)
