"""``conv2d`` from the words of inq_kernels.slices as one product, without im2col in memory, and its gradient in x.

y[n, pixel] = Σ over k of W[n, k] · x[pixel's window, k], with k = (channel, row, column of the window) as weights are
stored. As in linear.py the weights are the left operand of tl.dot, one load of words serves S products, and the sums of
programs that share out K are added in ascending order. What a window reads is addressed with the strides of x, so that
contiguous, channels-last and other x need no copy; outside the image nothing is read.

Where a group has few outputs and few weights, a tensor core's tile would be nearly empty: depthwise convolutions have a
kernel of their own, without tl.dot.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import layouts, reference, slices
from ..format import Format
from ..library import conv_output_size
from . import checks, operands, storage
from .codec import DOT, Decoder, as_operand, decode, decoder, plain, rounded
from .launch import INTERPRETED, REGISTERS, Configuration, cdiv, configuration, on_device_of, round_up
from .linear import finish, lift
from .tiles import Tile

# --- in kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def pixels(m, OH, OW):
    """(image, row, column) of output pixels number m, the column fastest."""
    row = m // OW
    return row // OH, row % OH, m % OW


@triton.jit
def places(out, n, m, OH, OW, out_b, out_c, out_h, out_w):
    """Pointers [BN, BM] to outputs n of pixels m."""
    b, row, column = pixels(m, OH, OW)
    pixel = b.to(tl.int64) * out_b + row.to(tl.int64) * out_h + column.to(tl.int64) * out_w
    return out + n.to(tl.int64)[:, None] * out_c + pixel[None, :]


@triton.jit
def window(k, x_c, x_h, x_w, dilation_h, dilation_w, KH: tl.constexpr, KW: tl.constexpr):
    """(offset, down, right): where weights k of a row find their x, from a window's first element and in pixels."""
    if KH * KW == 1:
        offset = k.to(tl.int64) * x_c
        down, right = k * 0, k * 0
    else:
        down = (k // KW) % KH * dilation_h
        right = k % KW * dilation_w
        offset = (k // (KH * KW)).to(tl.int64) * x_c + down.to(tl.int64) * x_h + right.to(tl.int64) * x_w
    return offset, down, right


@triton.jit
def conv2d_kernel(
    x, weight, weight_exp, weight_scale, bias, out, M, N, K, words, steps, ROWS, H, W, OH, OW,
    x_b, x_c, x_h, x_w, out_b, out_c, out_h, out_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    EXPONENT: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    PADDED: tl.constexpr, USED: tl.constexpr, WHOLE_K: tl.constexpr, CODES: tl.constexpr, SHIFTS: tl.constexpr,
    MASK: tl.constexpr, FIELD: tl.constexpr, BASE: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr,
    SOURCE: tl.constexpr, ASSEMBLY: tl.constexpr, DOT: tl.constexpr, LIFT: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A tile of BN outputs of one group × BM pixels; with SPLIT, sums over ``steps`` tiles of words to
    out[split, n, m], float32.

    weight: words [N, words], a multiple of BK; M: pixels of all images; ROWS: outputs of a group. USED: slices that K
    reaches; PADDED: windows may leave the image; WHOLE_K: K = USED·words.
    """
    pid = tl.program_id(0)
    n_tiles = tl.cdiv(ROWS, BN)
    m_tiles = tl.cdiv(M, BM)
    # Programs of one block of pixels run next to each other: x is larger than the packed weights.
    local = (pid % n_tiles) * BN + tl.arange(0, BN)
    m = (pid // n_tiles) % m_tiles * BM + tl.arange(0, BM)
    group = pid // (n_tiles * m_tiles)
    # Rows and pixels past the end repeat the first ones: what they give is not stored.
    n = group * ROWS + local % ROWS
    i = tl.arange(0, BK)
    weights = weight + n.to(tl.int64)[:, None] * words + i[None, :]
    image, row, column = pixels(m % M, OH, OW)
    top = row * stride_h - padding_h
    left = column * stride_w - padding_w
    start = group.to(tl.int64) * (K // (KH * KW)) * x_c + image.to(tl.int64) * x_b
    starts = x + (start + top.to(tl.int64) * x_h + left.to(tl.int64) * x_w)[None, :]
    first = tl.program_id(1) * steps if SPLIT else 0
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for step in tl.range(first, tl.minimum(first + steps, words // BK), num_stages=STAGES):
        q = tl.load(weights + step * BK)
        a, b, c, d = decode(q, CODES, SHIFTS, MASK, FIELD, BASE, UNIT, WIDTH, SOURCE, ASSEMBLY, INTERPRETED)
        for j in tl.static_range(USED):
            k = step * BK + i + j * words
            offset, down, right = window(k, x_c, x_h, x_w, dilation_h, dilation_w, KH, KW)
            pointers = starts + offset[:, None]
            if PADDED:
                y_at, x_at = top[None, :] + down[:, None], left[None, :] + right[:, None]
                inside = (k < K)[:, None] & (y_at >= 0) & (y_at < H) & (x_at >= 0) & (x_at < W)
                xs = tl.load(pointers, mask=inside, other=0)
            elif WHOLE_K:
                xs = tl.load(pointers)
            else:
                xs = tl.load(pointers, mask=(k < K)[:, None], other=0)
            w = a if j == 0 else b if j == 1 else c if j == 2 else d
            weights_j, xs = as_operand(w, DOT, LIFT, INTERPRETED), as_operand(xs, DOT, 1, INTERPRETED)
            acc = tl.dot(weights_j, xs, acc, input_precision="ieee")
    inside = (local < ROWS)[:, None] & (m < M)[None, :]
    if SPLIT:
        part = out + tl.program_id(1).to(tl.int64) * N * M
        tl.store(part + n.to(tl.int64)[:, None] * M + m[None, :], acc, mask=inside)
    else:
        y = finish(
            acc,
            weight_exp,
            weight_scale,
            bias,
            weight_exp,
            n,
            m,
            N,
            M,
            EXPONENT,
            HAS_SCALE,
            HAS_BIAS,
            False,
            INTERPRETED,
        )
        y = rounded(y, out.dtype.element_ty, INTERPRETED)
        tl.store(places(out, n, m, OH, OW, out_b, out_c, out_h, out_w), y, mask=inside)


@triton.jit
def conv2d_reduce_kernel(
    parts, weight_exp, weight_scale, bias, out, M, N, splits, OH, OW, out_b, out_c, out_h, out_w,
    EXPONENT: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A tile of y from parts [splits, N, M], added in ascending order, and the epilogue."""
    pid = tl.program_id(0)
    m_tiles = tl.cdiv(M, BM)
    n = (pid // m_tiles) * BN + tl.arange(0, BN)
    m = (pid % m_tiles) * BM + tl.arange(0, BM)
    inside = (n < N)[:, None] & (m < M)[None, :]
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for split in range(splits):
        row = n.to(tl.int64) + split * N
        acc += tl.load(parts + row[:, None] * M + m[None, :], mask=inside, other=0)
    y = finish(
        acc, weight_exp, weight_scale, bias, weight_exp, n, m, N, M, EXPONENT, HAS_SCALE, HAS_BIAS, False, INTERPRETED
    )
    y = rounded(y, out.dtype.element_ty, INTERPRETED)
    tl.store(places(out, n, m, OH, OW, out_b, out_c, out_h, out_w), y, mask=inside)


@triton.jit
def conv2d_direct_kernel(
    x, weight, weight_exp, weight_scale, bias, out, M, N, K, words, ROWS, H, W, OH, OW,
    x_b, x_c, x_h, x_w, out_b, out_c, out_h, out_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    EXPONENT: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    PADDED: tl.constexpr, USED: tl.constexpr, SHIFTS: tl.constexpr, MASK: tl.constexpr, FIELD: tl.constexpr,
    BASE: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A tile of BN outputs, of any groups, × BM pixels: one weight of each output at a time, times its x."""
    pid = tl.program_id(0)
    n_tiles = tl.cdiv(N, BN)
    at_n = (pid % n_tiles) * BN + tl.arange(0, BN)
    m = (pid // n_tiles) * BM + tl.arange(0, BM)
    n = at_n % N
    weights = weight + n.to(tl.int64) * words
    image, row, column = pixels(m % M, OH, OW)
    top = row * stride_h - padding_h
    left = column * stride_w - padding_w
    pixel = image.to(tl.int64) * x_b + top.to(tl.int64) * x_h + left.to(tl.int64) * x_w
    starts = x + ((n // ROWS).to(tl.int64) * (K // (KH * KW)) * x_c)[:, None] + pixel[None, :]
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for j in tl.static_range(USED):
        for i in range(tl.minimum(words, K - j * words)):
            w = plain(tl.load(weights + i), j, SHIFTS, MASK, FIELD, BASE, UNIT, WIDTH)
            offset, down, right = window(i + j * words, x_c, x_h, x_w, dilation_h, dilation_w, KH, KW)
            if PADDED:
                y_at, x_at = top + down, left + right
                inside = (y_at >= 0) & (y_at < H) & (x_at >= 0) & (x_at < W)
                xs = tl.load(starts + offset, mask=inside[None, :], other=0)
            else:
                xs = tl.load(starts + offset)
            acc += w[:, None] * xs.to(tl.float32)
    y = finish(
        acc, weight_exp, weight_scale, bias, weight_exp, n, m, N, M, EXPONENT, HAS_SCALE, HAS_BIAS, False, INTERPRETED
    )
    y = rounded(y, out.dtype.element_ty, INTERPRETED)
    inside = (at_n < N)[:, None] & (m < M)[None, :]
    tl.store(places(out, n, m, OH, OW, out_b, out_c, out_h, out_w), y, mask=inside)


# --- which kernel runs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """``kernel`` is "tile" (tl.dot) or "direct" (without); ``steps`` tiles of words a program where splits > 1."""

    kernel: str
    tile: Tile
    splits: int = 1
    steps: int = 0


# Slices are a multiple of 32 words: tiles of 16 or 32 have no end to mask.
_BK = {"fp16": 32, "bf16": 32, "fp32": 16}
# The sides of a tile. 128×128 spills registers on addresses, and on sm_100 Triton 3.6 gives each of the S products of
# a step tensor memory of its own, more than there is. There it also multiplies float32 as TF32, whatever precision is
# asked for, in tiles of 64 rows or more: float32 has 32.
_LEAST_SIDE = 16
# 128 pixels take more registers for addresses than a thread has, with few outputs too.
_LARGEST_SIDES = {"fp16": (128, 64), "bf16": (128, 64), "fp32": (32, 64)}
_LARGEST_TILE = 128 * 64
# From here on by eight warps: addresses of x take more registers than four have.
_EIGHT_WARPS = {"fp16": 64 * 64, "bf16": 64 * 64, "fp32": 16 * 64}
# A tile whose products are nearly all with padding, less than one in 16 of use, is slower than no tensor core.
_DIRECT_USE = 16
# Pixels are neighbours in memory, or channels are.
_DIRECT_TILES = (Tile(2, 256, 1, 4, 1), Tile(32, 16, 1, 4, 1))
# Beyond, one program's loop over the weights of an output would take longer than anything else.
_DIRECT_K = 1024
# Programs for each processor that are worth a split, and the steps that a split must leave (128 weights each).
_WAVES, _LEAST_STEPS = 2, 2
_REDUCE_N, _REDUCE_M = 8, 128


def select(
    dot: str, m: int, rows: int, groups: int, k: int, codes: int, channels_last: bool, processors: int
) -> Choice:
    """The kernel of a convolution, the same on every machine.

    Args:
        dot: the type of its products: "fp16", "bf16" or "fp32".
        m: output pixels of all images.
        rows: outputs of a group.
        groups: of the convolution.
        k: weights of an output.
        codes: S, the codes of a word.
        channels_last: whether neighbours in y are channels.
        processors: multiprocessors of the GPU.
    """
    words = round_up(cdiv(k, codes), slices.ALIGN)
    if k <= _DIRECT_K and rows * k * _DIRECT_USE <= round_up(rows, _LEAST_SIDE) * cdiv(k, words) * words:
        return Choice("direct", _DIRECT_TILES[channels_last])
    bk, sides = _BK[dot], zip((rows, m), _LARGEST_SIDES[dot], strict=True)
    bn, bm = (min(max(_power_of_two(size), _LEAST_SIDE), largest) for size, largest in sides)
    bm = min(bm, _LARGEST_TILE // bn)
    while max(bn, bm) > 32 and _programs(rows, groups, m, bn, bm) < processors:
        # More and smaller tiles until every processor has one; squares read least.
        bn, bm = (bn // 2, bm) if bn >= bm else (bn, bm // 2)
    programs, steps = _programs(rows, groups, m, bn, bm), words // bk
    splits = max(min(_WAVES * processors // programs, steps // _LEAST_STEPS), 1)
    each = cdiv(steps, splits)
    return Choice("tile", _tile(dot, bn, bm), cdiv(steps, each), each)


def _tile(dot: str, bn: int, bm: int) -> Tile:
    return Tile(bn, bm, _BK[dot], 8 if bn * bm >= _EIGHT_WARPS[dot] else 4, 2 if dot == "fp32" else 3)


def _power_of_two(size: int) -> int:
    """The smallest power of two that is at least ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def _programs(rows: int, groups: int, m: int, bn: int, bm: int) -> int:
    return groups * cdiv(rows, bn) * cdiv(m, bm)


# --- launches ---------------------------------------------------------------------------------------------------------

# Kernels count pixels in int32: more are computed some images at a time.
_PIXELS = 2**31 - 2**10
# What conv2d_direct_kernel decodes with; conv2d_kernel takes all constants of a decoder.
_PLAIN = ("SHIFTS", "MASK", "FIELD", "BASE", "UNIT", "WIDTH")


def constants(
    made: Decoder, choice: Choice, dot: str, k: int, words: int, kernel_size: tuple[int, int], padded: bool
) -> dict[str, Any]:
    """The constants of the kernel of ``choice`` but those of the epilogue."""
    tile = choice.tile
    shared = {
        "KH": kernel_size[0],
        "KW": kernel_size[1],
        "PADDED": padded,
        "USED": cdiv(k, words),
        "BM": tile.bm,
        "BN": tile.bn,
        "INTERPRETED": INTERPRETED,
    }
    if choice.kernel == "direct":
        # Weights of 1 at most, as lift makes them: here it costs nothing.
        base = made.codec.base + made.exponent
        return shared | {name: made.constants[name] for name in _PLAIN} | {"EXPONENT": 0, "BASE": base}
    lifted = lift(made, dot)
    return (
        made.constants
        | shared
        | {
            "EXPONENT": made.exponent - int(math.log2(lifted)),
            "LIFT": lifted,
            "WHOLE_K": cdiv(k, words) * words == k,
            "DOT": dot,
            "BK": tile.bk,
            "SPLIT": choice.splits > 1,
            "STAGES": tile.stages,
        }
    )


def _launch(x: Tensor, out: Tensor, q: Tensor, epilogue: tuple[Tensor, ...], flags: dict[str, bool], made: Decoder, dot,
            k: int, kernel_size, stride, padding, dilation, groups) -> None:  # fmt: skip
    """``out`` of the images ``x``, whose pixels int32 counts."""
    (_, _, h, w), (b, n, oh, ow) = x.shape, out.shape
    (x_b, x_c, x_h, x_w), (out_b, out_c, out_h, out_w) = x.stride(), out.stride()
    m, words, rows = b * oh * ow, q.shape[1], n // groups
    padded = any(padding)
    if max(*kernel_size, *stride) == 1 and not padded and x_h == w * x_w:
        # Single pixels in order: one long row, without divisions that hide it from the compiler.
        h, w, oh, ow = 1, h * w, 1, oh * ow
    choice = select(dot, m, rows, groups, k, made.codec.codes, out_c == 1 and n > 1, operands.processors(x.device))
    tile = choice.tile
    fixed = constants(made, choice, dot, k, words, tuple(kernel_size), padded) | flags
    target = (out_b, out_c, out_h, out_w)
    geometry = (rows, h, w, oh, ow, x_b, x_c, x_h, x_w, *target, *stride, *padding, *dilation)
    with on_device_of(x):
        if choice.kernel == "direct":
            conv2d_direct_kernel[(cdiv(n, tile.bn) * cdiv(m, tile.bm),)](
                x, q, *epilogue, out, m, n, k, words, *geometry, **fixed, num_warps=tile.warps
            )
            return
        split = choice.splits > 1
        if split:
            # Sums that are parts have no epilogue yet: one kernel for all of those there can be.
            fixed, epilogue_here = fixed | dict.fromkeys(flags, False), (epilogue[0],) * 3
        else:
            epilogue_here = epilogue
        sums = torch.empty(choice.splits, n, m, dtype=torch.float32, device=x.device) if split else out
        steps = choice.steps if split else words // tile.bk
        conv2d_kernel[_programs(rows, groups, m, tile.bn, tile.bm), choice.splits](
            x,
            q,
            *epilogue_here,
            sums,
            m,
            n,
            k,
            words,
            steps,
            *geometry,
            **fixed,
            num_warps=tile.warps,
            maxnreg=REGISTERS,
        )
        if split:
            conv2d_reduce_kernel[(cdiv(n, _REDUCE_N) * cdiv(m, _REDUCE_M),)](
                sums, *epilogue, out, m, n, choice.splits, oh, ow, *target, EXPONENT=fixed["EXPONENT"], **flags,
                BM=_REDUCE_M, BN=_REDUCE_N, INTERPRETED=INTERPRETED,
            )  # fmt: skip


def conv2d(
    x, weight, weight_exp, weight_scale, bias, kernel_size, stride, padding, dilation, groups, bits, levels, layout,
    backend,
):  # fmt: skip
    """reference.conv2d of x [B, C, H, W], float32, bfloat16 or float16 with any strides: [B, N, OH, OW] in x's dtype
    and reference.conv_memory_format(x).

    Raises:
        TypeError: another dtype.
    """
    if x.dtype not in DOT:
        raise TypeError(f"inq.conv2d: x: expected one of {tuple(DOT)}, got {x.dtype}")
    if x.dim() != 4:
        raise ValueError(f"inq.conv2d: x: expected shape [B, C, H, W], got {list(x.shape)}")
    fmt, images = Format(bits, levels), x.shape[0]
    checks.convolution("conv2d", x.shape[1], weight_exp.shape[0], kernel_size, stride, padding, dilation, groups)
    k = x.shape[1] // groups * kernel_size[0] * kernel_size[1]
    n = checks.packed("conv2d", weight, weight_exp, weight_scale, k, fmt, layout)
    checks.bias("conv2d", bias, n, weight)
    size = conv_output_size(x.shape[-2:], kernel_size, stride, padding, dilation)
    if min(size) < 0:
        raise ValueError(f"inq.conv2d: x: expected an image at least as large as the kernel, got {list(x.shape)}")
    if math.prod(size) > _PIXELS:
        raise ValueError(f"inq.conv2d: x: expected at most {_PIXELS} output pixels an image, got {size[0]} × {size[1]}")
    memory_format = reference.conv_memory_format(x)
    out = torch.empty((images, n, *size), dtype=x.dtype, device=x.device, memory_format=memory_format)
    if out.numel() == 0:
        return out
    weight, layout = storage.ready(weight, n, k, fmt, layout, x.dtype)
    q = operands.words(weight, layout)
    # Arguments that are not there are never read: any pointer does.
    given = (weight_exp, *(weight_exp if t is None else t for t in (weight_scale, bias)))
    epilogue = tuple(t.contiguous() for t in given)
    flags = {"HAS_SCALE": weight_scale is not None, "HAS_BIAS": bias is not None}
    at_once = max(_PIXELS // (size[0] * size[1]), 1)
    for start in range(0, images, at_once):
        part = slice(start, start + at_once)
        _launch(
            x[part], out[part], q, epilogue, flags, decoder(layout, fmt), DOT[x.dtype], k, kernel_size, stride, padding,
            dilation, groups,
        )  # fmt: skip
    return out


def conv2d_dx(
    grad, weight, weight_exp, weight_scale, input_size, kernel_size, stride, padding, dilation, groups, bits, levels,
    layout, backend,
):  # fmt: skip
    """reference.conv2d_dx: decoded by a kernel, multiplied by torch, whose library beats a kernel of ours there."""
    n = weight_exp.shape[0]
    checks.convolution("conv2d_dx", input_size[1], n, kernel_size, stride, padding, dilation, groups)
    k = input_size[1] // groups * kernel_size[0] * kernel_size[1]
    if layout != layouts.STORAGE:
        weight = storage.unprepack(weight, n, k, bits, levels, layout)
    # Values relative to 2^n1, as the reference's.
    w = storage.unpack(weight, torch.zeros_like(weight_exp), None, k, bits, levels, torch.float32)
    conv = (kernel_size, stride, padding, dilation, groups)
    return reference.conv2d_dx_of(grad, w, weight_exp, weight_scale, input_size, *conv)


# --- what to compile --------------------------------------------------------------------------------------------------

_TYPES = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16"}


def tiles_of(dot: str) -> Iterator[Tile]:
    """The tiles that ``select`` can return for products of a type."""
    sides = (16, 32, 64, 128)
    largest_n, largest_m = _LARGEST_SIDES[dot]
    for bn, bm in itertools.product(sides, sides):
        if bn <= largest_n and bm <= largest_m and bn * bm <= _LARGEST_TILE:
            yield _tile(dot, bn, bm)


# The window's side, PADDED, WHOLE_K and SPLIT. Beyond these a window changes numbers of the same kernel.
_WINDOWS = ((3, True, False, False), (1, False, True, False), (3, False, False, False), (3, True, False, True))
# Strides that are 1 are constants of the kernel, and such memory is read in vectors.
_MEMORY = {
    "": {},
    " contiguous": dict.fromkeys(("x_w", "out_w", "stride_h", "stride_w", "dilation_h", "dilation_w"), 1),
    " channels last": dict.fromkeys(("x_c", "out_c", "stride_h", "stride_w", "dilation_h", "dilation_w"), 1),
}
# Of other strides and sizes there, the usual ones are multiples of 16.
_MULTIPLES = {
    "": {},
    " contiguous": dict.fromkeys(("N", "K", "x_b", "x_c", "out_b", "out_c"), "i32:16"),
    " channels last": dict.fromkeys(("N", "K", "x_b", "x_h", "x_w", "out_b", "out_h", "out_w"), "i32:16"),
}


def configurations() -> Iterator[Configuration]:
    """What is launched, to compile without a GPU: each tile, the largest first, whole and with sums that are parts;
    that one with all kinds of windows, words, numbers of slices and kinds of memory. Epilogues have all they can have.
    """
    for dot, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        own = slices.best(dtype, Format(4))
        every = sorted(tiles_of(dot), key=lambda tile: (tile.bn * tile.bm, tile.bn), reverse=True)
        largest = every[0]
        for tile in every:
            for window in _WINDOWS if tile == largest else (_WINDOWS[0], _WINDOWS[3]):
                yield _tiled(dot, own, Format(4), tile, *window)
        for fmt, layout in itertools.product(
            (Format(4), Format(4, "dense"), Format(5), Format(5, "dense")), slices.LAYOUTS
        ):
            # Words of e4m3 are for products of e4m3 alone.
            if layout != slices.E4M3 and slices.has(layout, fmt) and (layout, fmt) != (own, Format(4)):
                yield _tiled(dot, layout, fmt, largest, *_WINDOWS[0])
        for memory, window in itertools.product(_MEMORY, _WINDOWS[:2]):
            if memory and dot == "bf16":
                yield _tiled(dot, own, Format(4), largest, *window, memory=memory)
        for used in (1, 2, 3) if dot == "bf16" else ():
            yield _tiled(dot, own, Format(4), largest, *_WINDOWS[0], used=used)
        types = {
            "weight": "*i16",
            "weight_exp": "*i8",
            "weight_scale": "*fp32",
            "bias": _TYPES[dot],
            "out": _TYPES[dot],
        }
        flags = {"HAS_SCALE": True, "HAS_BIAS": True, "INTERPRETED": False}
        fixed = flags | {"EXPONENT": -3, "BM": _REDUCE_M, "BN": _REDUCE_N}
        parts = types | {"parts": "*fp32"}
        del parts["weight"]
        yield configuration(f"conv2d reduce {dot}", conv2d_reduce_kernel, parts, fixed, others="i32")
        for tile, padded in itertools.product(_DIRECT_TILES, (True, False)):
            usual = " contiguous" if tile.bm > tile.bn else " channels last"
            for layout, fmt, memory in (
                (own, Format(4), ""),
                (own, Format(4), usual),
                (slices.FP16, Format(5, "dense"), ""),
            ):
                made = decoder(layout, fmt)
                used = 1 if memory else made.codec.codes
                words = slices.ALIGN
                fixed = constants(made, Choice("direct", tile), dot, used * words, words, (3, 3), padded)
                fixed |= flags | _MEMORY[memory]
                name = f"conv2d direct {dot} {fmt.bits}-bit {fmt.levels} {tile.bn}×{tile.bm}{' padded' * padded}"
                name += f" {used} slices{memory}"
                more = types | {"x": _TYPES[dot]}
                yield configuration(name, conv2d_direct_kernel, more, fixed, tile.warps, tile.stages, "i32")


def _tiled(
    dot: str, layout: str, fmt: Format, tile: Tile, size: int, padded: bool, whole: bool, split: bool, used: int = 0,
    memory: str = "",
) -> Configuration:  # fmt: skip
    """conv2d_kernel in one configuration; ``used``: slices that K reaches, all if 0."""
    made = decoder(layout, fmt)
    used = used or made.codec.codes
    words = 4 * tile.bk
    k = used * words if whole else used * words - 1
    fixed = constants(made, Choice("tile", tile, 2 if split else 1, 1), dot, k, words, (size, size), padded)
    # Sums that are parts have no epilogue yet.
    fixed |= {"HAS_SCALE": not split, "HAS_BIAS": not split, "INTERPRETED": False} | _MEMORY[memory]
    types = {"x": _TYPES[dot], "weight": "*i16", "weight_exp": "*i8", "words": "i32:16"} | _MULTIPLES[memory]
    types |= {"weight_scale": "*i8" if split else "*fp32", "bias": "*i8" if split else _TYPES[dot]}
    types["out"] = "*fp32" if split else _TYPES[dot]
    name = f"conv2d {dot} {fmt.bits}-bit {fmt.levels} in {layout} {tile.bn}×{tile.bm}, {size}×{size},"
    name += " padded" * padded + " whole" * whole + " split" * split + memory
    name += f" {used} slices" if used != made.codec.codes else ""
    return configuration(name, conv2d_kernel, types, fixed, tile.warps, tile.stages, "i32", REGISTERS)
