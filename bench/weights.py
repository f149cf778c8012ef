"""Random packed weights and the same weights dense, made quickly: hundreds of millions in a second or two."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops, reference
from ..format import Format
from ..ops import PackedWeight
from .case import Context

# Every weight row is made of groups of 8 codes (``bits`` bytes) drawn from this many.
_POOL = 1 << 16


class RandomWeights:
    """[n, k] random canonical codes, all of them alike likely, with an exponent of its own for every row."""

    def __init__(self, n: int, k: int, fmt: Format, seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        self.n, self.k, self.fmt = n, k, fmt
        canonical = torch.tensor([c for c, level in enumerate(fmt.code_levels) if level is not None], dtype=torch.uint8)
        codes = canonical[torch.randint(len(canonical), (_POOL, 8), generator=g)]
        # The second half of the pool is for the last group of a row, whose padding is zero codes.
        last = codes.clone()
        last[:, k % 8 or 8 :] = 0
        self._pool = reference.pack_codes(torch.cat([codes, last]), fmt.bits)
        self._index = torch.randint(_POOL, (n, (k + 7) // 8), generator=g, dtype=torch.int32)
        self._index[:, -1] += _POOL
        self.n1 = torch.randint(-8, -3, (n, 1), generator=g).to(torch.int8)

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


def prepacked(packed: PackedWeight, backend: str) -> PackedWeight:
    """In the layout that ``backend`` multiplies from; the reference has the storage layout alone."""
    return packed if backend == "reference" else ops.prepack(packed)


def rotated(context: Context, n: int, k: int, bits: int) -> tuple[RandomWeights, PackedWeight, list[tuple]]:
    """Weights, packed for the context's backend, and (weight, weight_exp, weight_scale) of each rotated copy."""
    w = context.get(("weights", bits), lambda: RandomWeights(n, k, Format(bits)))
    packed = context.get(("packed", bits), lambda: prepacked(w.packed(), context.backend))
    codes = context.copies(("codes", bits), lambda: packed.weight)
    return w, packed, [(each, packed.weight_exp, None) for each in codes]


def bits_in_use(packed: PackedWeight) -> float:
    """Bits a weight that a layer keeps in memory, row exponents not counted."""
    n, k = packed.shape[0], packed.k
    return 8 * packed.weight.numel() / (n * k)
