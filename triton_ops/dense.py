"""Many rows: decode once to 16 bits and call torch's product, whose cost hides that of decoding (KERNELS.md)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..format import Format
from . import operands
from .codec import decode, decoder
from .launch import INTERPRETED, cdiv, on_device_of

# A program decodes 64 rows × 64 words, 8 KB: enough in flight, little to waste on small weights.
_BN, _BK = 64, 64


@triton.jit
def dense_kernel(
    weight, out, N, K, words, CODES: tl.constexpr, SHIFTS: tl.constexpr, MASK: tl.constexpr, FIELD: tl.constexpr,
    BASE: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr, SOURCE: tl.constexpr, ASSEMBLY: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Numbers ±2^(BASE + i) [N, K] of words [N, words]."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    i = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = (n < N)[:, None] & (i < words)[None, :]
    q = tl.load(weight + n.to(tl.int64)[:, None] * words + i[None, :], mask=inside, other=0)
    a, b, c, d = decode(q, CODES, SHIFTS, MASK, FIELD, BASE, UNIT, WIDTH, SOURCE, ASSEMBLY, INTERPRETED)
    for j in tl.static_range(CODES):
        k = j * words + i
        w = a if j == 0 else b if j == 1 else c if j == 2 else d
        tl.store(
            out + n.to(tl.int64)[:, None] * K + k[None, :], w.to(out.dtype.element_ty), mask=inside & (k < K)[None, :]
        )


def dense(weight: Tensor, k: int, fmt: Format, layout: str, dtype: torch.dtype) -> tuple[Tensor, int]:
    """(w, e): numbers [N, K] of a 16-bit ``dtype`` that it holds exactly; times 2^(n1 + e) they are the weights."""
    made, q = decoder(layout, fmt), operands.words(weight, layout)
    n, words = q.shape
    out = torch.empty(n, k, dtype=dtype, device=weight.device)
    if n and k:
        with on_device_of(weight):
            dense_kernel[cdiv(n, _BN), cdiv(words, _BK)](
                q, out, n, k, words, **made.constants, BN=_BN, BK=_BK, INTERPRETED=INTERPRETED
            )
    return out, made.exponent


def product(x: Tensor, w: Tensor) -> Tensor:
    """x · wᵀ in float32, of 16-bit operands: torch.mm, with the sums as they are."""
    if x.is_cuda:
        return torch.mm(x, w.T, out_dtype=torch.float32)
    return x.float() @ w.float().T
