"""``linear_dx``: the gradient in x, (grad · row factors) · decode(W), from the words that ``linear`` reads.

The row factors belong to what is summed over here, so they go into the gradient before the product: exact, being powers
of two, unless there is a row scale. A tile of words gives a tile of columns in each slice of K: S accumulators.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ..format import Format
from . import checks, operands, storage, tiles
from .codec import DOT, Decoder, as_operand, decode, decoder, rounded, scaled, widened
from .launch import INTERPRETED, REGISTERS, cdiv, on_device_of
from .linear import aligned, lift


# The number of rows makes no other kernel: one less is compiled when it changes.
@triton.jit(do_not_specialize=["M"])
def linear_dx_kernel(
    grad, weight, weight_exp, weight_scale, out, M, N, K, words, stride_m, EXPONENT: tl.constexpr,
    HAS_SCALE: tl.constexpr, CODES: tl.constexpr, SHIFTS: tl.constexpr, MASK: tl.constexpr, FIELD: tl.constexpr,
    BASE: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr, SOURCE: tl.constexpr, ASSEMBLY: tl.constexpr,
    DOT: tl.constexpr, LIFT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """[BM, BK] tiles of dx, one in each slice of K. grad [M, N], rows stride_m apart; out [M, K].

    The weights are the right operand, which goes into tensor cores through shared memory: as the left one they would
    have to be transposed in registers, several instructions a weight.
    """
    pid = tl.program_id(0)
    m_tiles = tl.cdiv(M, BM)
    i = (pid // m_tiles) * BK + tl.arange(0, BK)
    m = (pid % m_tiles) * BM + tl.arange(0, BM)
    j = tl.arange(0, BN)
    # Rows and words past the end repeat the first ones: what they give is not stored.
    gradients = grad + (m % M).to(tl.int64)[:, None] * stride_m + j[None, :]
    weights = weight + j.to(tl.int64)[:, None] * words + (i % words)[None, :]
    step = tl.full((), BN, tl.int64) * words
    sum_a = tl.zeros((BM, BK), dtype=tl.float32)
    sum_b = tl.zeros((BM, BK), dtype=tl.float32)
    sum_c = tl.zeros((BM, BK), dtype=tl.float32)
    sum_d = tl.zeros((BM, BK), dtype=tl.float32)
    for start in tl.range(0, N, BN, num_stages=STAGES):
        n = start + j
        here = n < N
        q = tl.load(weights, mask=here[:, None], other=0)
        a, b, c, d = decode(q, CODES, SHIFTS, MASK, FIELD, BASE, UNIT, WIDTH, SOURCE, ASSEMBLY, INTERPRETED)
        g = widened(tl.load(gradients + start, mask=here[None, :], other=0), INTERPRETED)
        # 2^n1 alone, as in the definition: all of the factor would leave few bits of small weights.
        e = tl.load(weight_exp + n, mask=here, other=0).to(tl.int32)
        g = scaled(g, e[None, :])
        if HAS_SCALE:
            g = g * tl.load(weight_scale + n, mask=here, other=0)[None, :]
        if HAS_SCALE and PRECISION == "tf32":
            # A gradient times a row scale has more bits than TF32, whose tensor cores cut them off: nearest even here.
            bits = g.to(tl.int32, bitcast=True)
            g = ((bits + 0xFFF + ((bits >> 13) & 1)) & -8192).to(tl.float32, bitcast=True)
        if INTERPRETED and DOT == "bf16":
            g = rounded(g, tl.bfloat16, INTERPRETED)
        g = as_operand(g, DOT, 1, INTERPRETED)
        sum_a = tl.dot(g, as_operand(a, DOT, LIFT, INTERPRETED), sum_a, input_precision=PRECISION)
        sum_b = tl.dot(g, as_operand(b, DOT, LIFT, INTERPRETED), sum_b, input_precision=PRECISION)
        if CODES > 2:
            sum_c = tl.dot(g, as_operand(c, DOT, LIFT, INTERPRETED), sum_c, input_precision=PRECISION)
        if CODES > 3:
            sum_d = tl.dot(g, as_operand(d, DOT, LIFT, INTERPRETED), sum_d, input_precision=PRECISION)
        weights += step
    for s in tl.static_range(CODES):
        acc = sum_a if s == 0 else sum_b if s == 1 else sum_c if s == 2 else sum_d
        k = s * words + i
        inside = (m < M)[:, None] & ((i < words) & (k < K))[None, :]
        place = m.to(tl.int64)[:, None] * K + k[None, :]
        acc = scaled(acc, tl.full((), EXPONENT, tl.int32))
        tl.store(out + place, rounded(acc, out.dtype.element_ty, INTERPRETED), mask=inside)


# float16 gradients times 2^n1 leave float16's range, and not that of TF32, which holds their 11 bits: exact operands.
PRODUCTS = {torch.float32: ("fp32", "ieee"), torch.float16: ("fp32", "tf32"), torch.bfloat16: ("bf16", "ieee")}


def constants(made: Decoder, dtype: torch.dtype, tile: tiles.Tile, scale: bool) -> dict[str, Any]:
    """linear_dx_kernel's constants; ``scale``: there is a row scale."""
    dot, precision = PRODUCTS[dtype]
    lifted = lift(made, DOT[dtype])  # float16 gradients are small enough without
    return made.constants | {
        "EXPONENT": made.exponent - int(math.log2(lifted)),
        "LIFT": lifted,
        "HAS_SCALE": scale,
        "DOT": dot,
        "PRECISION": precision,
        "BM": tile.bm,
        "BN": tile.bn,
        "BK": tile.bk,
        "STAGES": tile.stages,
        "INTERPRETED": INTERPRETED,
    }


def linear_dx(grad, weight, weight_exp, weight_scale, k, bits, levels, layout, backend):
    fmt = Format(bits, levels)
    n = checks.packed("linear_dx", weight, weight_exp, weight_scale, k, fmt, layout)
    checks.rows("linear_dx", "grad", grad, n, tuple(DOT), weight)
    weight, layout = storage.ready(weight, n, k, fmt, layout, grad.dtype)
    g = operands.rows(grad)
    m = g.shape[0]
    out = torch.empty(m, k, dtype=grad.dtype, device=grad.device)
    if m and k:
        made, q = decoder(layout, fmt), operands.words(weight, layout)
        words = q.shape[1]
        table = tiles.current(operands.capability(g.device))
        choice = tiles.select("linear_dx", DOT[grad.dtype], m, n, words, operands.processors(g.device), table)
        tile, g, factors = choice.tile, aligned(g), weight_exp.contiguous()
        scale = factors if weight_scale is None else weight_scale.contiguous()
        with on_device_of(g):
            linear_dx_kernel[(cdiv(words, tile.bk) * cdiv(m, tile.bm),)](
                g, q, factors, scale, out, m, n, k, words,
                g.stride(0), **constants(made, grad.dtype, tile, weight_scale is not None),
                num_warps=tile.warps, maxnreg=REGISTERS,
            )  # fmt: skip
    return out.view(*grad.shape[:-1], k)
