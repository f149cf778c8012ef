"""The storage layout: ``pack`` and ``unpack``, and the words of inq_kernels.slices made from it and turned back.

Bit for bit what inq_kernels.reference and inq_kernels.layouts define, by integers alone: a code is found from a float's
exponent field and the top of its mantissa, a weight is built from its exponent, so nothing is rounded or flushed on the
way. A row scale is multiplied in float32, which holds every level, subnormal ones too: one IEEE rounding, the same as
that of the reference's exact product in float64.

Words are linear in their codes' bits over GF(2) (slices.py): a word is the XOR of one constant for each bit that is
set. The constants are part of the kernel: no table is copied to the GPU, and CUDA graphs can record it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import layouts, reference, slices
from ..format import Format
from . import checks, operands
from .codec import code_bits, decoder, rounded
from .launch import INTERPRETED, Configuration, cdiv, configuration, on_device_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# --- in kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def codes_at(rows, k, inside, BITS: tl.constexpr):
    """Codes number k of rows of the storage layout, int32; 0 where not ``inside``. rows: pointers to first bytes."""
    bit = (k & 7) * BITS
    place = rows + (k >> 3) * BITS + (bit >> 3)
    byte = tl.load(place, mask=inside, other=0).to(tl.int32)
    shift = (bit & 7).to(tl.int32)
    if 8 % BITS != 0:
        # A group of eight codes is whole bytes, so the next byte is still of this group.
        beyond = tl.load(place + 1, mask=inside & (shift + BITS > 8), other=0).to(tl.int32)
        byte = byte | (beyond << 8)
    return (byte >> shift) & ((1 << BITS) - 1)


@triton.jit
def store_groups(rows, group, codes, inside, BITS: tl.constexpr):
    """Groups of eight codes [BN, BG, 8] to the storage layout; rows [BN, 1], group [1, BG] and inside [BN, BG]."""
    # 40 bits at most.
    word = tl.sum(codes.to(tl.int64) << (tl.arange(0, 8)[None, None, :] * BITS), axis=2)
    for byte in tl.static_range(BITS):
        tl.store(rows + group * BITS + byte, ((word >> (8 * byte)) & 0xFF).to(tl.uint8), mask=inside)


@triton.jit
def power_bits(e):
    """The bits of float32 2^e, for −149 ≤ e ≤ 127: a subnormal's only bit is in the mantissa."""
    tiny = 1 << tl.minimum(tl.maximum(e + 149, 0), 22)
    return tl.where(e >= -126, (e + 127) << 23, tiny)


@triton.jit
def pack_kernel(
    w, n1, out, N, K, row_bytes, BITS: tl.constexpr, FIRST: tl.constexpr, MAGNITUDES: tl.constexpr,
    LOWEST: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """reference.pack of w [N, K] to out [N, row_bytes]: BN rows × BG groups of eight a program.

    LOWEST: the least exponent of a level; smaller ones are 0.
    """
    pid = tl.program_id(0)
    groups = row_bytes // BITS
    tiles = tl.cdiv(groups, BG)
    n = (pid // tiles) * BN + tl.arange(0, BN)
    group = (pid % tiles).to(tl.int64) * BG + tl.arange(0, BG)
    k = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = (n < N)[:, None, None] & (k < K)[None, :, :]
    value = tl.load(w + n.to(tl.int64)[:, None, None] * K + k[None, :, :], mask=inside, other=0)
    if w.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.int16, bitcast=True).to(tl.int32) << 16
    else:
        bits = value.to(tl.float32).to(tl.int32, bitcast=True)
    # |w| = m·2^e, 0.5 ≤ m < 1, and whether m ≥ 0.75. Of the subnormals, which start with another bit, only those of
    # the largest octave can round to a level.
    field = (bits >> 23) & 0xFF
    e = field - 126
    upper = tl.where(field > 0, bits >> 22, bits >> 21) & 1
    some = (field > 0) | (((bits >> 22) & 1) > 0)
    top = tl.load(n1 + n, mask=n < N, other=0).to(tl.int32)[:, None, None]
    bottom = top + (1 - MAGNITUDES)
    # Equation (4) as reference._levels has it: the nearest power, and the smallest level's bin reaches down to half.
    level = tl.minimum(e - 1 + upper, top)
    level = tl.where((e == bottom) & (upper == 0), bottom, level)
    nonzero = inside & some & (level >= bottom) & (level >= LOWEST)
    code = (level - bottom + FIRST) | (((bits >> 31) & 1) << (BITS - 1))
    rows = out + n.to(tl.int64)[:, None] * row_bytes
    here = (n < N)[:, None] & (group < groups)[None, :]
    store_groups(rows, group[None, :], tl.where(nonzero, code, 0), here, BITS)


@triton.jit
def unpack_kernel(
    out, weight, weight_exp, weight_scale, N, K, row_bytes, BITS: tl.constexpr, FIRST: tl.constexpr,
    MAGNITUDES: tl.constexpr, HAS_SCALE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """reference.unpack of weight [N, row_bytes] to out [N, K]."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(K, BK)
    n = (pid // tiles) * BN + tl.arange(0, BN)
    k = (pid % tiles).to(tl.int64) * BK + tl.arange(0, BK)
    wide = n.to(tl.int64)[:, None]
    inside = (n < N)[:, None] & (k < K)[None, :]
    code = codes_at(weight + wide * row_bytes, k[None, :], inside, BITS)
    sign = code >> (BITS - 1)
    index = (code & ((1 << (BITS - 1)) - 1)) - FIRST
    # Codes that are not canonical are 0, as in the reference.
    nonzero = (index >= 0) & (index < MAGNITUDES)
    e = tl.load(weight_exp + n, mask=n < N, other=0).to(tl.int32)[:, None] + index + (1 - MAGNITUDES)
    value = (power_bits(e) | (sign << 31)).to(tl.float32, bitcast=True)
    if HAS_SCALE:
        scale = tl.load(weight_scale + n, mask=n < N, other=0)[:, None]
        value = value * scale
        # Zeros are +0, those of a row scale 0 too; what underflows keeps its sign, as the reference's rounding does.
        nonzero = nonzero & (scale != 0)
    value = tl.where(nonzero, value, 0.0)
    tl.store(out + wide * K + k[None, :], rounded(value, out.dtype.element_ty, INTERPRETED), mask=inside)


@triton.jit
def prepack_kernel(
    weight, out, N, K, words, row_bytes, BITS: tl.constexpr, FIRST: tl.constexpr, MAGNITUDES: tl.constexpr,
    CODES: tl.constexpr, MASK: tl.constexpr, FIELD: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr,
    WORDS: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """slices.prepack of weight [N, row_bytes] to words [N, words]. WORDS: ``word_bits``."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(words, BW)
    n = (pid // tiles) * BN + tl.arange(0, BN)
    i = (pid % tiles).to(tl.int64) * BW + tl.arange(0, BW)
    wide = n.to(tl.int64)[:, None]
    inside = (n < N)[:, None] & (i < words)[None, :]
    q = tl.zeros((BN, BW), dtype=tl.int32)
    for j in tl.static_range(CODES):
        k = i + j * words
        code = codes_at(weight + wide * row_bytes, k[None, :], inside & (k < K)[None, :], BITS)
        index = (code & ((1 << (BITS - 1)) - 1)) - FIRST
        pattern = ((code >> (BITS - 1)) << (WIDTH - 1)) | ((index + FIELD) << UNIT)
        pattern = tl.where((index >= 0) & (index < MAGNITUDES), pattern, 0)
        for p in tl.static_range(WIDTH):
            if (MASK >> p) & 1:
                # −1 or 0: all bits of the constant, or none.
                q = q ^ (-((pattern >> p) & 1) & ((WORDS >> (WIDTH * (WIDTH * j + p))) & ((1 << WIDTH) - 1)))
    tl.store(out + wide * words + i[None, :], q.to(out.dtype.element_ty), mask=inside)


@triton.jit
def unprepack_kernel(
    weight, out, N, K, words, row_bytes, BITS: tl.constexpr, FIRST: tl.constexpr, MAGNITUDES: tl.constexpr,
    CODES: tl.constexpr, SHIFTS: tl.constexpr, MASK: tl.constexpr, FIELD: tl.constexpr, UNIT: tl.constexpr,
    WIDTH: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """slices.unprepack of words [N, words] to out [N, row_bytes]. A program reads BN × 8·BG words once and writes their
    codes in each slice; slices are a multiple of eight long, so that no group is cut."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(words // 8, BG)
    n = (pid // tiles) * BN + tl.arange(0, BN)
    group = (pid % tiles).to(tl.int64) * BG + tl.arange(0, BG)
    i = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    wide = n.to(tl.int64)
    here = (n < N)[:, None, None] & (i < words)[None, :, :]
    q = tl.load(weight + wide[:, None, None] * words + i[None, :, :], mask=here, other=0)
    word = q.to(tl.int32) & ((1 << WIDTH) - 1)
    for j in tl.static_range(CODES):
        bits = code_bits(word, j, SHIFTS, MASK, WIDTH)
        magnitude = bits & ((1 << (WIDTH - 1)) - 1)
        index = tl.minimum((magnitude >> UNIT) - FIELD, MAGNITUDES - 1)
        code = tl.where((magnitude > 0) & (index >= 0), index + FIRST, 0) | ((bits >> (WIDTH - 1)) << (BITS - 1))
        # The storage layout is padded with zero codes, whatever the words hold there.
        code = tl.where((i + j * words < K)[None, :, :], code, 0)
        place = group + j * (words // 8)
        inside = (n < N)[:, None] & ((group < words // 8) & (place < row_bytes // BITS))[None, :]
        store_groups(out + wide[:, None] * row_bytes, place[None, :], code, inside, BITS)


# --- launches ---------------------------------------------------------------------------------------------------------


def tile(columns: int) -> tuple[int, int]:
    """(rows, columns) of a program's tile of 2048 codes or words: wide, or tall for short rows."""
    return (4, 512) if columns > 64 else (32, 64)


def fields(fmt: Format) -> dict[str, int]:
    """A format as constants of a kernel: the fields of its magnitudes are FIRST, FIRST + 1, …"""
    return {"BITS": fmt.bits, "FIRST": fmt.fields[0], "MAGNITUDES": fmt.magnitudes}


def word_bits(codec: slices.Codec) -> int:
    """For each place j and bit p of the mask the word whose code j is bit p alone, as one number: ``WIDTH`` bits from
    bit ``WIDTH·(WIDTH·j + p)`` on."""
    result = 0
    for j in range(codec.codes):
        for p in range(codec.width):
            if codec.mask >> p & 1:
                result |= codec.word(j, 1 << p) << codec.width * (codec.width * j + p)
    return result


def _codec_constants(layout: str, fmt: Format, names: tuple[str, ...]) -> dict[str, Any]:
    constants = decoder(layout, fmt).constants
    return {name: constants[name] for name in names}


_PREPACK = ("CODES", "MASK", "FIELD", "UNIT", "WIDTH")
_UNPREPACK = ("CODES", "SHIFTS", "MASK", "FIELD", "UNIT", "WIDTH")


def pack(w, n1, bits, levels):
    """reference.pack: quantized weights [N, …] of float32, bfloat16 or float16 as uint8 [N, ceil(K/8)·bits].

    Raises:
        TypeError: another dtype.
    """
    if w.dtype not in DTYPES:
        raise TypeError(f"inq.pack: w: expected one of {DTYPES}, got {w.dtype}")
    if w.dim() == 0 or w.numel() == 0:
        raise ValueError(f"inq.pack: w: expected rank ≥ 1 and at least one weight, got shape {list(w.shape)}")
    fmt, n = Format(bits, levels), w.shape[0]
    checks.tensor("inq.pack: n1", n1, torch.int8, (n, 1), w)
    flat = w.reshape(n, -1).contiguous()
    k = flat.shape[1]
    out = torch.empty(n, fmt.row_bytes(k), dtype=torch.uint8, device=w.device)
    if out.numel():
        rows, columns = tile(k)
        groups = columns // 8
        lowest, _ = reference.exponent_limits(w.dtype)
        with on_device_of(w):
            pack_kernel[(cdiv(n, rows) * cdiv(cdiv(k, 8), groups),)](
                flat, n1.contiguous(), out, n, k, out.shape[1], **fields(fmt), LOWEST=lowest, BN=rows, BG=groups
            )
    return out


def unpack(weight, weight_exp, weight_scale, k, bits, levels, dtype):
    """reference.unpack: weights [N, k] of ``dtype``, float32, bfloat16 or float16. A row scale must be finite.

    Raises:
        TypeError: another dtype.
    """
    checks.size("inq.unpack: k", k)
    out = torch.empty(weight_exp.shape[0], k, dtype=dtype, device=weight.device)
    unpack_(out, weight, weight_exp, weight_scale, k, bits, levels)
    return out


def unpack_(out, weight, weight_exp, weight_scale, k, bits, levels):
    """``unpack`` into ``out``, of as many elements and any strides, in its dtype."""
    if out.dtype not in DTYPES:
        raise TypeError(f"inq.unpack: dtype: expected one of {DTYPES}, got {out.dtype}")
    fmt = Format(bits, levels)
    n = checks.packed("unpack", weight, weight_exp, weight_scale, k, fmt, layouts.STORAGE)
    if out.numel() != n * k or out.device != weight.device:
        raise ValueError(
            f"inq.unpack_: out: expected {n * k} elements on {weight.device}, got {list(out.shape)} on {out.device}"
        )
    if out.numel() == 0:
        return
    flat = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    weight, weight_exp = weight.contiguous(), weight_exp.contiguous()
    rows, columns = tile(k)
    with on_device_of(out):
        unpack_kernel[(cdiv(n, rows) * cdiv(k, columns),)](
            # A scale that is not there is never read: any pointer does.
            flat, weight, weight_exp, weight_exp if weight_scale is None else weight_scale.contiguous(), n, k,
            weight.shape[1], **fields(fmt), HAS_SCALE=weight_scale is not None, BN=rows, BK=columns,
            INTERPRETED=INTERPRETED,
        )  # fmt: skip
    if flat is not out:
        out.copy_(flat)


def prepack(weight, k, bits, levels, layout):
    """layouts.prepack: the storage layout as ``layout``, a new tensor. Slices by a kernel, other layouts by torch."""
    fmt = Format(bits, levels)
    checks.size("inq.prepack: k", k)
    expected = (weight.shape[0] if weight.dim() else 0, fmt.row_bytes(k))
    checks.tensor("inq.prepack: weight", weight, torch.uint8, expected)
    if layout not in slices.LAYOUTS:
        return layouts.prepack(weight, k, fmt, layout)
    n = weight.shape[0]
    out = torch.empty(slices.shape(layout, n, k, fmt), dtype=torch.uint8, device=weight.device)
    if n:
        weight, q = weight.contiguous(), operands.words(out, layout)
        rows, columns = tile(q.shape[1])
        with on_device_of(weight):
            prepack_kernel[(cdiv(n, rows) * cdiv(q.shape[1], columns),)](
                weight, q, n, k, q.shape[1], weight.shape[1], **fields(fmt), **_codec_constants(layout, fmt, _PREPACK),
                WORDS=word_bits(slices.codec(layout, fmt)), BN=rows, BW=columns,
            )  # fmt: skip
    return out


def unprepack(weight, n, k, bits, levels, layout):
    """layouts.unprepack: the inverse of ``prepack``."""
    fmt = Format(bits, levels)
    checks.size("inq.unprepack: n", n)
    checks.size("inq.unprepack: k", k)
    checks.tensor("inq.unprepack: weight", weight, torch.uint8, layouts.shape(layout, n, k, fmt))
    if layout not in slices.LAYOUTS:
        return layouts.unprepack(weight, n, k, fmt, layout)
    out = torch.empty(layouts.shape(layouts.STORAGE, n, k, fmt), dtype=torch.uint8, device=weight.device)
    if out.numel():
        q = operands.words(weight, layout)
        rows, columns = tile(q.shape[1])
        with on_device_of(weight):
            unprepack_kernel[(cdiv(n, rows) * cdiv(q.shape[1], columns),)](
                q, out, n, k, q.shape[1], out.shape[1], **fields(fmt), **_codec_constants(layout, fmt, _UNPREPACK),
                BN=rows, BG=columns // 8,
            )  # fmt: skip
    return out


def ready(weight: Tensor, n: int, k: int, fmt: Format, layout: str, dtype: torch.dtype) -> tuple[Tensor, str]:
    """``weight`` in a layout from which 16- and 32-bit products decode, and its name.

    A module has done this once; here it is for this call alone. e4m3's words are for products of e4m3.
    """
    wanted = layout if layout in (slices.FP16, slices.BF16) else slices.best(dtype, fmt)
    return ready_as(weight, n, k, fmt, layout, wanted), wanted


def ready_as(weight: Tensor, n: int, k: int, fmt: Format, layout: str, wanted: str) -> Tensor:
    """``weight``, which is in ``layout``, in the layout ``wanted``."""
    if layout == wanted:
        return weight.contiguous()
    if layout != layouts.STORAGE:
        weight = unprepack(weight.contiguous(), n, k, fmt.bits, fmt.levels, layout)
    return prepack(weight, k, fmt.bits, fmt.levels, wanted)


# --- what to compile --------------------------------------------------------------------------------------------------

_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def configurations() -> Iterator[Configuration]:
    """(name, kernel, signature, constants, warps, stages) of variants that are launched: to compile without a GPU."""
    rows, columns = tile(4096)
    for fmt, dtype, scale in (
        (Format(4), torch.bfloat16, False),
        (Format(5), torch.float32, True),
        (Format(3, "dense"), torch.float16, True),
    ):
        name = f"{fmt.bits}-bit {fmt.levels}, {dtype}"
        lowest, _ = reference.exponent_limits(dtype)
        constants = fields(fmt) | {"LOWEST": lowest, "BN": rows, "BG": columns // 8}
        types = {"w": _TYPES[dtype], "n1": "*i8", "out": "*u8"}
        yield configuration(f"pack {name}", pack_kernel, types, constants, others="i32")
        constants = fields(fmt) | {"HAS_SCALE": scale, "BN": rows, "BK": columns, "INTERPRETED": False}
        types = {"out": _TYPES[dtype], "weight": "*u8", "weight_exp": "*i8"}
        types["weight_scale"] = "*fp32" if scale else "*i8"
        yield configuration(f"unpack {name}", unpack_kernel, types, constants, others="i32")
    for layout, fmt in (
        (slices.BF16, Format(4)),
        (slices.FP16, Format(5, "dense")),
        (slices.E4M3, Format(4, "dense")),
    ):
        name = f"{fmt.bits}-bit {fmt.levels}, {layout}"
        c, word = slices.codec(layout, fmt), "*i8" if layout == slices.E4M3 else "*i16"
        constants = fields(fmt) | _codec_constants(layout, fmt, _PREPACK)
        constants |= {"WORDS": word_bits(c), "BN": rows, "BW": columns}
        yield configuration(f"prepack {name}", prepack_kernel, {"weight": "*u8", "out": word}, constants, others="i32")
        constants = fields(fmt) | _codec_constants(layout, fmt, _UNPREPACK) | {"BN": rows, "BG": columns // 8}
        yield configuration(
            f"unprepack {name}", unprepack_kernel, {"weight": word, "out": "*u8"}, constants, others="i32"
        )
