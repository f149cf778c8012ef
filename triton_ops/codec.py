"""Decoding in kernels: the words of inq_kernels.slices as finished numbers, an AND and a few shifts for each code.

Compiled, a tile of words goes through inline assembly: two 16-bit words (four 8-bit ones) in each 32-bit register,
whose halves Triton's own ``(q << s) & mask`` would unpack (2.5 instructions a weight instead of 0.9; KERNELS.md). The
interpreter runs no assembly; there ``plain`` computes what it means. A test evaluates the assembly's text beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ..format import Format
from ..slices import BF16, E4M3, FP16, Codec, codec

# The float type of the decoded words, by layout.
SOURCE = {FP16: "fp16", BF16: "bf16", E4M3: "e4m3"}
DOT = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_NO_SHIFT = 31


@dataclass(frozen=True)
class Decoder:
    """A codec as constants of a kernel.

    Attributes:
        constants: what ``decode`` and ``factors`` are given, by the names that kernels use.
        exponent: a decoded number times 2^(n1 + exponent) is the weight; the epilogue's factor.
    """

    layout: str
    codec: Codec
    constants: dict[str, Any]
    exponent: int


def decoder(layout: str, fmt: Format) -> Decoder:
    """How kernels decode ``fmt`` in ``layout``. ValueError where slices.codec raises one."""
    c = codec(layout, fmt)
    shifts = 0
    for j, pair in enumerate(c.shifts):
        first, second = (*pair, _NO_SHIFT)[:2]
        shifts |= (first | second << 5) << (10 * j)
    constants = {
        "CODES": c.codes,
        "SHIFTS": shifts,
        "MASK": c.mask,
        "FIELD": c.field,
        "BASE": c.base,
        "UNIT": c.unit,
        "WIDTH": c.width,
        "SOURCE": SOURCE[layout],
        "ASSEMBLY": assembly(c),
    }
    return Decoder(layout, c, constants, 1 - fmt.magnitudes - c.base)


def assembly(c: Codec) -> str:
    """PTX: operands $0 … $(S−1) from the register of words $S. mov, and, shl, prmt and lop3 of the PTX ISA.

    The words are copied first: a result may be given their register before the last of them is made.
    """
    mask = c.mask * (0x10001 if c.width == 16 else 0x1010101)
    turned = {0: "q"}
    lines = [f"mov.b32 q, ${c.codes};"]
    for j, shifts in enumerate(c.shifts):
        for s in shifts:
            if s not in turned:
                turned[s] = f"q{s}"
                # 0x2301: the bytes of both halves in the other order.
                lines.append(f"shl.b32 q{s}, q, {s};" if s <= c.lowest else f"prmt.b32 q{s}, q, q, 0x2301;")
        names = [turned[s] for s in shifts]
        if len(names) == 1:
            lines.append(f"and.b32 ${j}, {names[0]}, {mask:#x};")
        else:
            # 0x28: (a ^ b) & c
            lines.append(f"lop3.b32 ${j}, {names[0]}, {names[1]}, {mask:#x}, 0x28;")
    return " ".join([f"{{ .reg .b32 {', '.join(turned.values())};", *lines, "}"])


@triton.jit
def turned(word, BY: tl.constexpr, MASK: tl.constexpr, WIDTH: tl.constexpr):
    """Words of WIDTH bits rotated left; what a mask of MASK drops of it may be missing."""
    bits = word << BY
    if MASK & ((1 << BY) - 1):
        bits = bits | (word >> (WIDTH - BY))
    return bits


@triton.jit
def code_bits(word, CODE: tl.constexpr, SHIFTS: tl.constexpr, MASK: tl.constexpr, WIDTH: tl.constexpr):
    """The masked bits of code number CODE of words, whose other bits are 0."""
    first: tl.constexpr = (SHIFTS >> (10 * CODE)) & 31
    second: tl.constexpr = (SHIFTS >> (10 * CODE + 5)) & 31
    bits = turned(word, first, MASK, WIDTH)
    if second != 31:
        bits = bits ^ turned(word, second, MASK, WIDTH)
    return bits & MASK


@triton.jit
def plain(
    q,
    CODE: tl.constexpr,
    SHIFTS: tl.constexpr,
    MASK: tl.constexpr,
    FIELD: tl.constexpr,
    BASE: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Code number CODE of each word as float32: what the assembly's result means as fp16, bfloat16 or e4m3."""
    bits = code_bits(q.to(tl.int32) & ((1 << WIDTH) - 1), CODE, SHIFTS, MASK, WIDTH)
    magnitude = bits & ((1 << (WIDTH - 1)) - 1)
    exponent = (magnitude >> UNIT) - FIELD + (BASE + 127)
    number = (exponent << 23) | ((bits >> (WIDTH - 1)) << 31)
    return tl.where(magnitude == 0, 0, number).to(tl.float32, bitcast=True)


@triton.jit
def decode(
    q,
    CODES: tl.constexpr,
    SHIFTS: tl.constexpr,
    MASK: tl.constexpr,
    FIELD: tl.constexpr,
    BASE: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    SOURCE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The codes of a tile of words as four tiles of numbers ±2^(BASE + i) in the words' float type; float32 where
    interpreted. Words of fewer codes repeat the last one."""
    last: tl.constexpr = CODES - 1
    third: tl.constexpr = 2 if CODES > 2 else last
    if INTERPRETED:
        a = plain(q, 0, SHIFTS, MASK, FIELD, BASE, UNIT, WIDTH)
        b = plain(q, 1, SHIFTS, MASK, FIELD, BASE, UNIT, WIDTH)
        c = plain(q, third, SHIFTS, MASK, FIELD, BASE, UNIT, WIDTH)
        d = plain(q, last, SHIFTS, MASK, FIELD, BASE, UNIT, WIDTH)
    elif SOURCE == "e4m3":
        a, b = tl.inline_asm_elementwise(
            ASSEMBLY, "=r,=r,r", [q], dtype=(tl.float8e4nv, tl.float8e4nv), is_pure=True, pack=4
        )
        c, d = b, b
    elif SOURCE == "bf16":
        if CODES == 4:
            a, b, c, d = tl.inline_asm_elementwise(
                ASSEMBLY,
                "=r,=r,=r,=r,r",
                [q],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=2,
            )
        else:
            a, b, c = tl.inline_asm_elementwise(
                ASSEMBLY, "=r,=r,=r,r", [q], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
            )
            d = c
    else:
        if CODES == 4:
            a, b, c, d = tl.inline_asm_elementwise(
                ASSEMBLY,
                "=r,=r,=r,=r,r",
                [q],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        else:
            a, b, c = tl.inline_asm_elementwise(
                ASSEMBLY, "=r,=r,=r,r", [q], dtype=(tl.float16, tl.float16, tl.float16), is_pure=True, pack=2
            )
            d = c
    return a, b, c, d


@triton.jit
def power_of_two(e):
    """2^e as float32 for −126 ≤ e ≤ 127, by its bits."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scaled(x, e):
    """x · 2^e for e ≤ 254, as two factors: one alone may be out of range. 2^-252 makes any float32 0, as less would."""
    e = tl.maximum(e, -252)
    half = e >> 1
    return x * power_of_two(half) * power_of_two(e - half)


@triton.jit
def widened(x, INTERPRETED: tl.constexpr):
    """As float32, exactly. The interpreter's own conversion of bfloat16 is wrong for subnormal numbers."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def as_operand(a, DOT: tl.constexpr, LIFT: tl.constexpr, INTERPRETED: tl.constexpr):
    """A tile as an operand of tl.dot: of DOT's type; float32 where interpreted, whose bfloat16 products are wrong.

    LIFT: a power of two that they are multiplied by (linear.lift); float32 ones once they are, as e4m3 has no product.
    """
    if INTERPRETED or DOT == "fp32":
        a = widened(a, INTERPRETED)
    if LIFT != 1:
        a = a * LIFT
    if INTERPRETED or DOT == "fp32":
        return a
    elif DOT == "fp16":
        return a.to(tl.float16)
    elif DOT == "bf16":
        return a.to(tl.bfloat16)
    else:
        return a.to(tl.float8e4nv)


@triton.jit
def rounded(y, like: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 as ``like``, to nearest even. The interpreter's own conversion to bfloat16 truncates."""
    if INTERPRETED and like == tl.bfloat16:
        bits = y.to(tl.int32, bitcast=True)
        up = bits + 0x7FFF + ((bits >> 16) & 1)
        quiet = tl.where(y == y, up, 0x7FC00000)
        return (quiet >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return y.to(like)
