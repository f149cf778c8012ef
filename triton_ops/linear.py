"""``linear``: y = (x · decode(W)ᵀ) · row factors + bias, from the words of inq_kernels.slices.

The weights are the left operand of tl.dot and the rows of x its columns, so that few rows waste little of a tensor
core's tile, and decoded weights go into it from registers (HGMMA's register operand on Hopper). A step of the loop
loads a [BN, BK] tile of words once and uses it for S products, each with the x of another slice of K: no join, no
shuffle, no second load. Where there are fewer tiles than processors, programs share out K and a second kernel adds
their sums in ascending order: the same bits in every run.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..format import Format
from . import checks, operands, storage, tiles
from .codec import DOT, Decoder, as_operand, decode, decoder, rounded, scaled, widened
from .dense import dense, product
from .launch import INTERPRETED, REGISTERS, cdiv, on_device_of


@triton.jit
def finish(
    acc,
    weight_exp,
    weight_scale,
    bias,
    rows_exp,
    n,
    m,
    N,
    M,
    EXPONENT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Sums [BN, BM] of decoded weights times the row factors, plus bias, in float32."""
    e = tl.load(weight_exp + n, mask=n < N, other=0).to(tl.int32) + EXPONENT
    if HAS_ROWS:
        t = tl.load(rows_exp + m, mask=m < M, other=0).to(tl.int32)
        y = scaled(acc, e[:, None] - t[None, :])
    else:
        y = scaled(acc, e[:, None])
    if HAS_SCALE:
        y = y * tl.load(weight_scale + n, mask=n < N, other=0)[:, None]
    if HAS_BIAS:
        y = y + widened(tl.load(bias + n, mask=n < N, other=0), INTERPRETED)[:, None]
    return y


@triton.jit
def add_products(
    acc, weights, rows, word, K, words, CODES: tl.constexpr, SHIFTS: tl.constexpr, MASK: tl.constexpr,
    FIELD: tl.constexpr, BASE: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr, SOURCE: tl.constexpr,
    ASSEMBLY: tl.constexpr, LIFT: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SKIP: tl.constexpr, MASKED: tl.constexpr, PROMOTE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """acc [BN, BM] and the products of words ``word + SKIP`` of each row.

    weights, rows: pointers to a row's first word, and to the x of its first slice. Offsets have 32 bits, whose sum with
    a pointer is one instruction; SKIP is added behind them, since load instructions have room for a constant.
    """
    inside = word < words - SKIP
    pointers = weights + word[None, :] + SKIP
    if MASKED:
        q = tl.load(pointers, mask=inside[None, :], other=0)
    else:
        q = tl.load(pointers)
    a, b, c, d = decode(q, CODES, SHIFTS, MASK, FIELD, BASE, UNIT, WIDTH, SOURCE, ASSEMBLY, INTERPRETED)
    for j in tl.static_range(CODES):
        pointers = rows + (word + j * words)[:, None] + SKIP
        if MASKED:
            xs = tl.load(pointers, mask=(inside & (word < K - j * words - SKIP))[:, None], other=0.0)
        else:
            xs = tl.load(pointers)
        w = a if j == 0 else b if j == 1 else c if j == 2 else d
        left, right = as_operand(w, DOT, LIFT, INTERPRETED), as_operand(xs, DOT, 1, INTERPRETED)
        if PROMOTE:
            # Sums of e4m3 products keep 14 bits in the tensor core: they begin anew after PROMOTE slices of a part.
            if j % PROMOTE == 0:
                part = tl.zeros((BN, BM), dtype=tl.float32)
            part = tl.dot(left, right, part, input_precision="ieee")
            if j % PROMOTE == PROMOTE - 1 or j == CODES - 1:
                acc = acc + part
        else:
            acc = tl.dot(left, right, acc, input_precision="ieee")
    return acc


# Values of these arguments make no other kernel: one less is compiled when M changes, and what is compiled is known.
@triton.jit(do_not_specialize=["M", "steps"])
def linear_kernel(
    x, weight, weight_exp, weight_scale, bias, rows_exp, out, M, N, K, words, stride_m, steps,
    EXPONENT: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ROWS: tl.constexpr,
    CODES: tl.constexpr, SHIFTS: tl.constexpr, MASK: tl.constexpr, FIELD: tl.constexpr, BASE: tl.constexpr,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, SOURCE: tl.constexpr, ASSEMBLY: tl.constexpr, LIFT: tl.constexpr,
    DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PART: tl.constexpr,
    MASKED: tl.constexpr, SPLIT: tl.constexpr, PROMOTE: tl.constexpr, STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A [BN, BM] tile of yᵀ; with SPLIT, sums over ``steps`` tiles of words to out[split, m, n], float32.

    weight: words [N, words]; x [M, K], rows stride_m apart; out [M, N]. MASKED: 0 if K is CODES·words, and words a
    multiple of BK; 1: a second loop, with masks, does what is left behind whole steps; 2: masks in the only loop.
    A step reads its BK words in parts of PART, whose addresses are the same but for a constant.
    """
    pid = tl.program_id(0)
    m_tiles = tl.cdiv(M, BM)
    # Programs of one block of weights run next to each other and share it in the second-level cache.
    n = (pid // m_tiles) * BN + tl.arange(0, BN)
    m = (pid % m_tiles) * BM + tl.arange(0, BM)
    i = tl.arange(0, PART)
    # Rows past the end repeat the first ones: what they give is not stored.
    weights = weight + (n % N).to(tl.int64)[:, None] * words
    rows = x + (m % M).to(tl.int64)[None, :] * stride_m
    # Without SPLIT 0, too, but the compiler must not know: it would keep an address of 64 bits for each row of words,
    # and add to each at every step, where the sum of a pointer and an offset of 32 bits is one instruction.
    first = tl.program_id(1) * steps
    # Steps without masks.
    whole = words // BK if MASKED == 0 else tl.maximum(K - (CODES - 1) * words, 0) // BK if MASKED == 1 else 0
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    word = first * BK + i
    last = tl.minimum(first + steps, tl.cdiv(words, BK))
    for _ in tl.range(first, last if MASKED == 2 else tl.minimum(last, whole), num_stages=STAGES):
        for part in tl.static_range(BK // PART):
            acc = add_products(
                acc, weights, rows, word, K, words, CODES, SHIFTS, MASK, FIELD, BASE, UNIT, WIDTH, SOURCE, ASSEMBLY,
                LIFT, DOT, BM, BN, part * PART, MASKED == 2, PROMOTE, INTERPRETED,
            )  # fmt: skip
        word += BK
    if MASKED == 1:
        # Small pieces: these loads wait in registers.
        PIECE: tl.constexpr = 32 if PART > 32 else PART
        first = tl.maximum(first, whole) * (BK // PIECE)
        word = first * PIECE + tl.arange(0, PIECE)
        for _ in tl.range(first, tl.minimum(last * (BK // PIECE), tl.cdiv(words, PIECE)), num_stages=1):
            acc = add_products(
                acc, weights, rows, word, K, words, CODES, SHIFTS, MASK, FIELD, BASE, UNIT, WIDTH, SOURCE, ASSEMBLY,
                LIFT, DOT, BM, BN, 0, True, PROMOTE, INTERPRETED,
            )  # fmt: skip
            word += PIECE
    inside = (n < N)[:, None] & (m < M)[None, :]
    # A tile's offsets have 32 bits: where N is no multiple of 16, sums have addresses of their own, which spilled.
    place = tl.arange(0, BM)[None, :] * N + tl.arange(0, BN)[:, None]
    out += (pid % m_tiles * BM).to(tl.int64) * N + (pid // m_tiles) * BN
    if SPLIT:
        tl.store(out + tl.program_id(1).to(tl.int64) * M * N + place, acc, mask=inside)
    else:
        y = finish(
            acc,
            weight_exp,
            weight_scale,
            bias,
            rows_exp,
            n,
            m,
            N,
            M,
            EXPONENT,
            HAS_SCALE,
            HAS_BIAS,
            HAS_ROWS,
            INTERPRETED,
        )
        tl.store(out + place, rounded(y, out.dtype.element_ty, INTERPRETED), mask=inside)


@triton.jit(do_not_specialize=["M", "splits"])
def reduce_kernel(
    parts, weight_exp, weight_scale, bias, rows_exp, out, M, N, splits, EXPONENT: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A [BN, BM] tile of yᵀ from parts [splits, M, N], added in ascending order, and the epilogue."""
    # Rows come first: a grid has 2^31 programs that way, and 65535 the other.
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (n < N)[:, None] & (m < M)[None, :]
    place = m.to(tl.int64)[None, :] * N + n[:, None]
    plane = tl.full((), 1, tl.int64) * M * N
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    # M is a Python number where it is 1, and so is a loop's where it is interpreted: neither has ``.to``.
    part = parts + place
    for _ in range(splits):
        acc += tl.load(part, mask=inside, other=0)
        part += plane
    y = finish(
        acc, weight_exp, weight_scale, bias, rows_exp, n, m, N, M, EXPONENT, HAS_SCALE, HAS_BIAS, HAS_ROWS, INTERPRETED
    )
    tl.store(out + place, rounded(y, out.dtype.element_ty, INTERPRETED), mask=inside)


# The tile of reduce_kernel: memory bound, a few KB a program.
_REDUCE_M, _REDUCE_N = 4, 256
# Products of e4m3 that tensor cores add up by themselves; 256 in parts of 128 words, where registers spilled otherwise.
_PROMOTE_K = 128
# Small fp16 numbers of dense levels, 2^-14 and up, come into e4m3's range by this.
_LIFT = 256
# What Triton takes a multiple of for granted where it loads whole vectors, of elements and of bytes.
_ALIGN = 16


def lift(decode: Decoder, dot: str) -> float:
    """By what decoded numbers are multiplied before they become operands: a power of two.

    float32 products have weights of 1 at most, so that they overflow where the dense product does, not eight octaves
    before it. In 16 bits that would cost an instruction for every two weights, in float32 it is little.
    """
    if dot == "fp32":
        return 2.0**decode.exponent
    return _LIFT if dot == "e4m3" and decode.codec.base == -14 else 1


def aligned(x: Tensor) -> Tensor:
    """x [M, K] with rows of whole 16 elements at multiples of 16, zeros behind the last; itself where it is so.

    A copy costs less than loads of single elements, for whose addresses a kernel has not the registers.
    """
    m, k = x.shape
    if k % _ALIGN == 0 and x.stride(0) % _ALIGN == 0 and x.data_ptr() % _ALIGN == 0:
        return x
    padded = x.new_zeros(m, -(-k // _ALIGN) * _ALIGN)
    padded[:, :k] = x
    return padded


def masks(decode: Decoder, tile: tiles.Tile, k: int, words: int) -> int:
    """What linear_kernel masks along K, as its MASKED.

    At 5 bits, three codes a word, hardly any K is whole: masks cost them less than a loop whose loads are waited for.
    Beside a loop of long parts, on Hopper, a second one made registers spill in the first.
    """
    if decode.codec.codes * words == k and words % tile.bk == 0:
        return 0
    return 2 if decode.codec.codes == 3 or (decode.codec.width == 16 and tile.part > 32) else 1


def constants(decode: Decoder, dot: str, tile: tiles.Tile, k: int, words: int) -> dict[str, Any]:
    """linear_kernel's constants for a decoder, a type of products and a tile."""
    lifted = lift(decode, dot)
    return decode.constants | {
        "EXPONENT": decode.exponent - int(math.log2(lifted)),
        "LIFT": lifted,
        "DOT": dot,
        "BM": tile.bm,
        "BN": tile.bn,
        "BK": tile.bk,
        "PART": tile.part,
        "MASKED": masks(decode, tile, k, words),
        "PROMOTE": max(_PROMOTE_K // tile.part, 2) if dot == "e4m3" else 0,
        "STAGES": tile.stages,
        "INTERPRETED": INTERPRETED,
    }


def multiply(
    x: Tensor,
    rows_exp: Tensor | None,
    weight: Tensor,
    weight_exp: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    fmt: Format,
    layout: str,
    dot: str,
    dtype: torch.dtype,
) -> Tensor:
    """[M, N] of ``dtype`` from x [M, K], whose rows are to be multiplied by 2^−rows_exp where that is given."""
    (m, k), n = x.shape, weight_exp.shape[0]
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    if m == 0 or n == 0:
        return out
    made, q = decoder(layout, fmt), operands.words(weight, layout)
    words = q.shape[1]
    table = tiles.current(operands.capability(x.device))
    product_type = tiles.product(dot, made.constants["SOURCE"])
    choice = tiles.select("linear", product_type, m, n, words, operands.processors(x.device), table)
    flags = {"HAS_SCALE": weight_scale is not None, "HAS_BIAS": bias is not None, "HAS_ROWS": rows_exp is not None}
    # Arguments that are not there are never read: any pointer does.
    weight_exp = weight_exp.contiguous()
    rest = (weight_scale, bias, rows_exp)
    epilogue = (weight_exp, *(weight_exp if t is None else t.contiguous() for t in rest))
    splits, exponent = choice.splits, made.exponent
    if choice.kernel == "dense":
        w, exponent = dense(weight, k, fmt, layout, x.dtype)
        parts = product(x, w)
    else:
        tile, x = choice.tile, aligned(x)
        if n * tile.bm >= 2**31:
            raise ValueError(f"inq.linear: weight: expected fewer than {2**31 // tile.bm} rows, got {n}")
        k = x.shape[1]
        fixed = constants(made, dot, tile, k, words)
        exponent = fixed["EXPONENT"]
        parts = torch.empty(splits, m, n, dtype=torch.float32, device=x.device) if splits > 1 else out
        steps = choice.steps if splits > 1 else cdiv(words, tile.bk)
        with on_device_of(x):
            # Sums that are parts have no epilogue yet: one kernel for all of those there can be.
            split = splits > 1
            given, used = ((weight_exp,) * 4, dict.fromkeys(flags, False)) if split else (epilogue, flags)
            linear_kernel[cdiv(n, tile.bn) * cdiv(m, tile.bm), splits](
                x, q, *given, parts, m, n, k, words, x.stride(0), steps, **fixed, **used, SPLIT=split,
                num_warps=tile.warps, maxnreg=REGISTERS,
            )  # fmt: skip
    if parts is not out:
        with on_device_of(x):
            reduce_kernel[cdiv(m, _REDUCE_M), cdiv(n, _REDUCE_N)](
                parts, *epilogue, out, m, n, splits, EXPONENT=exponent, **flags, BM=_REDUCE_M, BN=_REDUCE_N,
                INTERPRETED=INTERPRETED,
            )  # fmt: skip
    return out


def linear(x, weight, weight_exp, weight_scale, bias, bits, levels, layout, backend):
    fmt, k = Format(bits, levels), x.shape[-1] if x.dim() else 0
    n = checks.packed("linear", weight, weight_exp, weight_scale, k, fmt, layout)
    checks.rows("linear", "x", x, k, tuple(DOT), weight)
    checks.bias("linear", bias, n, weight)
    weight, layout = storage.ready(weight, n, k, fmt, layout, x.dtype)
    y = multiply(operands.rows(x), None, weight, weight_exp, weight_scale, bias, fmt, layout, DOT[x.dtype], x.dtype)
    return y.view(*x.shape[:-1], n)
