"""Which weights freeze next, and n1: reference.partition_threshold and reference.exponents, for many tensors at once.

The key of a weight is the bits of |w| as a float32 (of a float16 from 2^-25 on: ``_base``), or its random rank; keys
keep the order of reference's. A radix select counts one digit after the other, each among the candidates that agree
with the digits found before, and the threshold is exact without sorting and without asking the device for anything.

The first digit, the exponent and the upper mantissa bits, also decides n1: its histogram holds, with each count, the
exact sum of the bits below the digit. Programs count in *copies*, one histogram for every few chunks of a tensor, so
that equal weights all over a tensor do not wait for one counter; one more kernel adds the copies up. Integers: the
order of additions changes nothing. Reads of W: three for float32, two for bfloat16 and float16, with the exponents of
tensors in them; a random partition reads none, as its keys come from indices, but for exponents one. The exponents of
rows (``channel``) are apart: one read by the ``max`` rule, two by ``mse``.
"""

# Constexprs are in capitals, and look like constants to the linter.
# ruff: noqa: SIM300

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..format import MSE_OCTAVES, N1_ZERO_ROW, Format
from ..reference import exponent_limits
from . import tables
from .launch import cdiv, on_device
from .tables import CHUNK, DTYPES, GROUPS, WARPS

# (shift, bits) of each digit of a 31-bit key. 2048 counters of 8 bytes a copy stay in the second-level cache for a
# thousand copies, and of three passes the last two meet few candidates.
FIRST_BITS = 11
_RANDOM_DIGITS = ((20, 11), (10, 10), (0, 10))
_MAGNITUDE_DIGITS = {
    torch.float32: ((20, 11), (10, 10), (0, 10)),
    # The lower half of a widened bfloat16 is zero.
    torch.bfloat16: ((20, 11), (16, 4)),
    # 29 bits above 2^-25, of which a widened float16 leaves 13 zero.
    torch.float16: ((18, 11), (13, 5)),
}
# Chunks that share a copy: 2^17 weights, so that counters take at most 1/32 of a float32 weight's memory. With a sum
# of 20-bit rests under the count of a copy, 2^37, there is room for a count of 2^22.
COPY_CHUNKS = 8
_COUNT_SHIFT = tl.constexpr(42)
_REST_MASK = tl.constexpr((1 << 42) - 1)
# The histograms' bins that one program adds up, from so many copies at once.
_SUM_BINS = 64
_SUM_COPIES = 32
# Two bins an octave of a row: 8 octaves of candidates, 15 magnitudes, 2 more at the top and 1 below are 51 bins.
_ROW_BINS = 64
# Weights of a row that one program takes: a sum of 22-bit rests stays under _COUNT_SHIFT.
_SEGMENT = 1 << 16
_ROW_TILE = 1024

# One program decides n1 of a tensor: with fewer warps its int64 limbs would not fit the registers.
_WARPS_OF_EXPONENTS = 16

# The digits that hold all octaves of the mse rule, 25 of them: 8 or, for float16, 32 an octave.
_WINDOWS = {torch.float32: 256, torch.bfloat16: 256, torch.float16: 1024}

_ALL = tl.constexpr(0x7FFFFFFFFFFFFFFF)
_SIGNLESS = tl.constexpr(0x7FFFFFFF)
_HALF_OCTAVE = tl.constexpr(0x400000)
_OCTAVES = tl.constexpr(MSE_OCTAVES)
_ZERO_ROW = tl.constexpr(N1_ZERO_ROW)
_LIMB = tl.constexpr(0xFFFFFFFF)
# What every float16 but 0 is above, as a float32: its octave is the first that float16 keys count.
_FLOAT16_BASE = tl.constexpr(102 << 23)

# Columns of the table after the first program.
_NUMEL, _W, _MASK, _KEEP, _SEED, _COPY, _COPIES, _ROWS, _ROW = (tl.constexpr(i) for i in range(1, 10))
_COLUMNS = tl.constexpr(10)
# Those of the table of rows.
_R_LENGTH, _R_W, _R_KEEP, _R_SEGMENTS, _R_ROW = (tl.constexpr(i) for i in range(1, 6))
_R_COLUMNS = tl.constexpr(6)


# --- kernels: digits --------------------------------------------------------------------------------------------------


@triton.jit
def _base(DTYPE: tl.constexpr):
    """What the keys of a dtype begin at: float16's exponents fit digits of two bits less."""
    return 102 << 23 if DTYPE == tl.float16 else 0


@triton.jit
def _magnitude_keys(bits, DTYPE: tl.constexpr):
    x = tables.widen(bits, DTYPE) & _SIGNLESS
    if DTYPE == tl.float16:
        x = tl.maximum(x - _FLOAT16_BASE, 0)
    return x


@triton.jit
def _count_tile(
    weights, mask, keep, seed, first, left, counters, prefix, DTYPE: tl.constexpr, RANDOM: tl.constexpr,
    DIGIT: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, SPLIT: tl.constexpr, FULL: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Counts one tile, of which ``left`` weights exist, in ``counters``."""
    place = tables.positions(GROUPS)
    inside = place < left
    frozen = tables.spread(tables.load_bytes(mask, first, left, 0, FULL, GROUPS))
    kept = tables.spread(tables.load_bytes(keep, first, left, 0xFF, FULL, GROUPS))
    if RANDOM:
        key = tables.random_keys(first + place, seed)
    else:
        key = _magnitude_keys(tables.load(weights + first + place, inside, FULL), DTYPE)
    taken = inside & kept
    if not SPLIT:
        taken = taken & (frozen == 0)
    counter = (key >> SHIFT) & ((1 << BITS) - 1)
    # The count above, the sum of what is below the first digit in one addition.
    one = tl.full([GROUPS, 8], 1, tl.int64) << _COUNT_SHIFT
    if DIGIT == 0:
        one += (key & ((1 << SHIFT) - 1)).to(tl.int64)
    else:
        taken = taken & ((key >> (SHIFT + BITS)) == prefix)
    if SPLIT:
        counter += tl.where(frozen, 1 << BITS, 0)
    tl.atomic_add(counters + counter, one, mask=taken, sem="relaxed")


@triton.jit
def count_digits(
    table, owners, selection, counters, DTYPE: tl.constexpr, RANDOM: tl.constexpr, DIGIT: tl.constexpr,
    SHIFT: tl.constexpr, BITS: tl.constexpr, SPLIT: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
    COPY_CHUNKS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One program a chunk: adds its candidates' digits to its copy; with SPLIT the frozen ones', apart from them."""
    program = tl.program_id(0)
    t = tl.load(owners + program)
    row = table + t * _COLUMNS
    chunk = program - tl.load(row)
    numel = tl.load(row + _NUMEL)
    weights = tables.to_weights(tl.load(row + _W), DTYPE, ALIGNED)
    mask = tl.load(row + _MASK)
    keep = tl.load(row + _KEEP)
    seed = tl.load(row + _SEED)
    copy = tl.load(row + _COPY) + chunk // COPY_CHUNKS
    mine = counters + copy * ((2 if SPLIT else 1) << BITS)
    prefix = tl.load(selection + 2 * t).to(tl.int32)
    tile: tl.constexpr = GROUPS * 8
    first = chunk * CHUNK
    left = tl.minimum(numel - first, CHUNK)
    for _ in tl.range(0, (left // tile).to(tl.int32)):
        _count_tile(
            weights, mask, keep, seed, first, tile, mine, prefix, DTYPE, RANDOM, DIGIT, SHIFT, BITS, SPLIT, True, GROUPS
        )  # fmt: skip
        first += tile
    left = left % tile
    if left > 0:
        _count_tile(
            weights, mask, keep, seed, first, left, mine, prefix, DTYPE, RANDOM, DIGIT, SHIFT, BITS, SPLIT, False,
            GROUPS,
        )  # fmt: skip


@triton.jit
def sum_copies(
    table, counters, histograms, BITS: tl.constexpr, PARTS: tl.constexpr, BINS: tl.constexpr, COPIES: tl.constexpr
):
    """histograms[tensor, part, 0 and 1, bin]: the counts and the rests of all copies. Grid: tensor, bins, part."""
    t = tl.program_id(0).to(tl.int64)
    bins = tl.program_id(1) * BINS + tl.arange(0, BINS)
    part = tl.program_id(2)
    row = table + t * _COLUMNS
    first = tl.load(row + _COPY)
    copies = tl.load(row + _COPIES)
    count = tl.zeros([BINS], tl.int64)
    rest = tl.zeros([BINS], tl.int64)
    for c in tl.range(0, copies.to(tl.int32), COPIES):
        copy = c + tl.arange(0, COPIES)
        pointer = counters + ((first + copy)[:, None] * PARTS + part) * (1 << BITS) + bins[None, :]
        found = tl.load(pointer, mask=(copy < copies)[:, None] & (bins >= 0)[None, :], other=0)
        count += tl.sum(found >> _COUNT_SHIFT, axis=0)
        rest += tl.sum(found & _REST_MASK, axis=0)
    out = histograms + (t * PARTS + part) * (2 << BITS) + bins
    tl.store(out, count)
    tl.store(out + (1 << BITS), rest)


@triton.jit
def select_digit(
    histograms, selection, selected, DTYPE: tl.constexpr, DIGIT: tl.constexpr, LAST: tl.constexpr,
    BITS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program a tensor: (digits so far, how many still to select) with one digit more; LAST: the threshold."""
    t = tl.program_id(0).to(tl.int64)
    digits = tl.arange(0, 1 << BITS)
    count = tl.load(histograms + t * PARTS * (2 << BITS) + digits)
    key = tl.load(selection + 2 * t)
    wanted = tl.load(selection + 2 * t + 1)
    total = tl.sum(count, axis=0)
    if DIGIT == 0:
        # More than there are means all of them, fewer than none means none: nobody waits to hear of an error.
        wanted = tl.minimum(tl.maximum(wanted, 0), total)
    above = total - tl.cumsum(count, axis=0)
    here = (above < wanted) & (wanted <= above + count)
    digit = tl.sum(tl.where(here, digits, 0), axis=0)
    wanted -= tl.sum(tl.where(here, above, 0), axis=0)
    key = (key << BITS) + digit
    if LAST:
        if DTYPE == tl.float16:
            value = ((key.to(tl.int32) << 13) + _FLOAT16_BASE).to(tl.float32, bitcast=True)
            half = value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int64)
            key = tl.where(key < 1 << 10, 0, half)
        key = tl.where(wanted > 0, key, _ALL)
    tl.store(selected + 2 * t, key)
    tl.store(selected + 2 * t + 1, wanted)


# --- kernels: exponents -----------------------------------------------------------------------------------------------


@triton.jit
def _nearest(x, LO: tl.constexpr, HI: tl.constexpr):
    """The max rule: the exponent of the power nearest to a float32 with bits x, ties up, within the limits."""
    return tl.minimum(tl.maximum(((x + _HALF_OCTAVE) >> 23) - 127, LO), HI)


@triton.jit
def _limb_sum(value, shift, K: tl.constexpr):
    """Limb K of Σ value·2^shift in base 2^32, not normalized: 0 ≤ value < 2^60, 0 ≤ shift < 96."""
    low = (value & _LIMB) << (shift & 31).to(tl.int64)
    high = (value >> 32) << (shift & 31).to(tl.int64)
    at = K - (shift >> 5)
    part = tl.where(at == 0, low & _LIMB, 0)
    part += tl.where(at == 1, (low >> 32) + (high & _LIMB), 0)
    part += tl.where(at == 2, high >> 32, 0)
    return tl.sum(part, axis=0)


@triton.jit
def _least_error(e, half, count, total, top, LO: tl.constexpr, MAGNITUDES: tl.constexpr):
    """The mse rule: the n1 from top down with the least Σ(count·q² − 2q·Σ|w|), ties to the larger; exact.

    Bins of weights m·2^e with 0.5 ≤ m < 0.75 (half 0) or 0.75 ≤ m < 1 (half 1), total: the sum of their m in 2^-24.
    A score has up to 112 bits: five limbs of 32, the uppermost with the sign.
    """
    lowest = tl.maximum(top - _OCTAVES, LO)
    floor = lowest - MAGNITUDES
    best = top
    b0 = tl.full([], 0, tl.int64)
    b1 = b0
    b2 = b0
    b3 = b0
    b4 = b0 + _ALL
    for down in tl.range(0, top - lowest + 1):
        n1 = top - down
        n2 = n1 + 1 - MAGNITUDES
        level = tl.minimum(e - 1 + half, n1)
        level = tl.where(level >= n2, level, tl.where((e == n2) & (half == 0), n2, LO - 1))
        nonzero = (level >= LO) & (e >= floor)
        n = tl.where(nonzero, count, 0)
        s = tl.where(nonzero, total, 0)
        square = tl.where(nonzero, 2 * (level - floor) + 24, 0)
        product = tl.where(nonzero, level - floor + e - floor + 1, 0)
        s0 = _limb_sum(n, square, 0) - _limb_sum(s, product, 0)
        s1 = _limb_sum(n, square, 1) - _limb_sum(s, product, 1) + (s0 >> 32)
        s2 = _limb_sum(n, square, 2) - _limb_sum(s, product, 2) + (s1 >> 32)
        s3 = _limb_sum(n, square, 3) - _limb_sum(s, product, 3) + (s2 >> 32)
        s4 = _limb_sum(n, square, 4) - _limb_sum(s, product, 4) + (s3 >> 32)
        s0 = s0 & _LIMB
        s1 = s1 & _LIMB
        s2 = s2 & _LIMB
        s3 = s3 & _LIMB
        less = (s1 < b1) | ((s1 == b1) & (s0 < b0))
        less = (s2 < b2) | ((s2 == b2) & less)
        less = (s3 < b3) | ((s3 == b3) & less)
        less = (s4 < b4) | ((s4 == b4) & less)
        best = tl.where(less, n1, best)
        b0 = tl.where(less, s0, b0)
        b1 = tl.where(less, s1, b1)
        b2 = tl.where(less, s2, b2)
        b3 = tl.where(less, s3, b3)
        b4 = tl.where(less, s4, b4)
    return best


@triton.jit
def tensor_exponents(
    table, histograms, n1, DTYPE: tl.constexpr, MAGNITUDES: tl.constexpr, MSE: tl.constexpr, LO: tl.constexpr,
    HI: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One program a tensor: n1 of all its rows from its first digit's histogram."""
    t = tl.program_id(0).to(tl.int64)
    size: tl.constexpr = 1 << BITS
    counts = histograms + t * PARTS * 2 * size
    digits = tl.arange(0, size)
    count = tl.load(counts + digits)
    rest = tl.load(counts + size)
    if PARTS == 2:
        count += tl.load(counts + 2 * size + digits)
        rest += tl.load(counts + 3 * size)
    largest = tl.max(tl.where(count > 0, digits, 0), axis=0)
    best = _nearest((largest << SHIFT) + _base(DTYPE), LO, HI)
    if MSE:
        # The octave of digits of weights in [2^(e−1), 2^e) is e + 126, less what float16 keys begin at.
        octave: tl.constexpr = 23 - SHIFT
        bias: tl.constexpr = 24 if DTYPE == tl.float16 else 126
        floor = tl.maximum(best - _OCTAVES, LO) - MAGNITUDES
        d = (tl.maximum(floor + bias, 0) << octave) + tl.arange(0, WINDOW)
        n = tl.load(counts + d, mask=d < size, other=0)
        s = tl.load(counts + size + d, mask=d < size, other=0)
        if PARTS == 2:
            n += tl.load(counts + 2 * size + d, mask=d < size, other=0)
            s += tl.load(counts + 3 * size + d, mask=d < size, other=0)
        e = (d >> octave) - bias
        half = (d >> (octave - 1)) & 1
        s += n * (((1 << octave) + (d & ((1 << octave) - 1))) << SHIFT)
        if DTYPE != tl.float16:
            # Subnormals: those from 2^-127 on are one octave with the leading bit in the digit, others are 0 always.
            under = d < (1 << octave)
            e = tl.where(under, -126, e)
            half = tl.where(under, (d >> (octave - 2)) & 1, half)
            s = tl.where(under, 2 * (s - (n << 23)), s)
            n = tl.where(d < (1 << (octave - 1)), 0, n)
            s = tl.where(d < (1 << (octave - 1)), 0, s)
        else:
            n = tl.where(d < (1 << octave), 0, n)
            s = tl.where(d < (1 << octave), 0, s)
        best = _least_error(e, half, n, s, best, LO, MAGNITUDES)
    best = tl.where((largest == 0) & (rest == 0), _ZERO_ROW, best).to(tl.int8)
    rows = tl.load(table + t * _COLUMNS + _ROWS)
    out = n1 + tl.load(table + t * _COLUMNS + _ROW)
    for r in tl.range(0, rows.to(tl.int32), ROWS):
        each = r + tl.arange(0, ROWS)
        tl.store(out + each, tl.zeros([ROWS], tl.int8) + best, mask=each < rows)


@triton.jit
def _row_values(weights, keep, i, inside, DTYPE: tl.constexpr):
    """The bits of |w| in float32 at [TILE] indices i; 0 for what ``keep`` drops and what is not there."""
    x = tables.widen(tl.load(weights + i, mask=inside, other=0), DTYPE) & _SIGNLESS
    byte = tl.load(tables.to_pointer(keep, tl.uint8, False) + i // 8, mask=inside & (keep != 0), other=0xFF)
    return tl.where(((byte.to(tl.int32) >> (i % 8).to(tl.int32)) & 1) != 0, x, 0)


@triton.jit
def row_largest(table, owners, largest, DTYPE: tl.constexpr, SEGMENT: tl.constexpr, TILE: tl.constexpr):
    """One program a segment of a row: the bits of its largest |w|."""
    program = tl.program_id(0)
    entry = table + tl.load(owners + program) * _R_COLUMNS
    segments = tl.load(entry + _R_SEGMENTS)
    mine = program - tl.load(entry)
    r = mine // segments
    length = tl.load(entry + _R_LENGTH)
    weights = tables.to_weights(tl.load(entry + _R_W), DTYPE, False)
    keep = tl.load(entry + _R_KEEP)
    # In flat indices of the whole weight.
    begin = r * length + (mine % segments) * SEGMENT
    end = tl.minimum(begin + SEGMENT, (r + 1) * length)
    x = tl.zeros([TILE], tl.int32)
    for at in tl.range(0, (end - begin).to(tl.int32), TILE):
        i = begin + at + tl.arange(0, TILE)
        x = tl.maximum(x, _row_values(weights, keep, i, i < end, DTYPE))
    # Integers: the order in which segments come changes nothing.
    tl.atomic_max(largest + tl.load(entry + _R_ROW) + r, tl.max(x, axis=0), sem="relaxed")


@triton.jit
def row_count(
    table, owners, largest, counters, DTYPE: tl.constexpr, MAGNITUDES: tl.constexpr, LO: tl.constexpr,
    HI: tl.constexpr, SEGMENT: tl.constexpr, TILE: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """One program a segment of a row: its half octaves from the row's floor up, counts and sums as in count_digits."""
    program = tl.program_id(0)
    entry = table + tl.load(owners + program) * _R_COLUMNS
    segments = tl.load(entry + _R_SEGMENTS)
    mine = program - tl.load(entry)
    r = mine // segments
    length = tl.load(entry + _R_LENGTH)
    weights = tables.to_weights(tl.load(entry + _R_W), DTYPE, False)
    keep = tl.load(entry + _R_KEEP)
    top = _nearest(tl.load(largest + tl.load(entry + _R_ROW) + r), LO, HI)
    # Bin 1 is the lower half of the floor's octave; what is below adds nothing.
    below = 2 * (tl.maximum(top - _OCTAVES, LO) - MAGNITUDES + 126) - 1
    # In flat indices of the whole weight.
    begin = r * length + (mine % segments) * SEGMENT
    end = tl.minimum(begin + SEGMENT, (r + 1) * length)
    for at in tl.range(0, (end - begin).to(tl.int32), TILE):
        i = begin + at + tl.arange(0, TILE)
        x = _row_values(weights, keep, i, i < end, DTYPE)
        subnormal = x < (1 << 23)
        halves = tl.where(subnormal, (x >> 21) & 1, x >> 22) - below
        rest = tl.where(subnormal, x << 1, x) & 0x3FFFFF
        one = (tl.full([TILE], 1, tl.int64) << _COUNT_SHIFT) + rest
        pointer = counters + program.to(tl.int64) * BINS + halves
        tl.atomic_add(pointer, one, mask=(halves > 0) & (x >= _HALF_OCTAVE), sem="relaxed")


@triton.jit
def row_exponents(
    table, owners, largest, counters, n1, MAGNITUDES: tl.constexpr, MSE: tl.constexpr, LO: tl.constexpr,
    HI: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """One program a segment, of which each row's first decides n1."""
    program = tl.program_id(0)
    entry = table + tl.load(owners + program) * _R_COLUMNS
    segments = tl.load(entry + _R_SEGMENTS)
    mine = program - tl.load(entry)
    if mine % segments == 0:
        row = tl.load(entry + _R_ROW) + mine // segments
        x = tl.load(largest + row)
        best = _nearest(x, LO, HI)
        if MSE:
            bins = tl.arange(0, BINS)
            count = tl.zeros([BINS], tl.int64)
            rest = tl.zeros([BINS], tl.int64)
            for s in tl.range(0, segments.to(tl.int32)):
                found = tl.load(counters + (program.to(tl.int64) + s) * BINS + bins)
                count += found >> _COUNT_SHIFT
                rest += found & _REST_MASK
            half = (bins + 1) & 1
            e = tl.maximum(best - _OCTAVES, LO) - MAGNITUDES + ((bins - 1) >> 1)
            total = rest + count * ((2 + half) << 22)
            best = _least_error(e, half, count, total, best, LO, MAGNITUDES)
        tl.store(n1 + row, tl.where(x == 0, _ZERO_ROW, best).to(tl.int8))


# --- launchers --------------------------------------------------------------------------------------------------------


class Keys:
    """The keys of several weights, and the radix select over them, a digit at a time.

    ``thresholds`` is the whole select. Ranks that hold parts of one weight each take its steps and add in between::

        selection = keys.start(counts)
        for digit in range(len(keys.digits)):
            histograms = keys.histograms(digit, selection)
            torch.distributed.all_reduce(histograms)  # sums of integers
            selection = keys.select(digit, selection, histograms)

    after which ``selection`` is the thresholds, of the whole; how many of a rank's ties are among those to take, ranks
    settle by their order, from the last histograms of each.

    Args:
        ws: float32, bfloat16 or float16 weights of one dtype on one device, any shape.
        masks: for each, uint8 [ceil(numel/8)] of one bit a weight, what is frozen already, or None for nothing.
        keeps: for each, uint8 [ceil(numel/8)], what may be frozen, or None for everything.
        random: keys are random ranks (reference.random_keys) instead of magnitudes.
        seeds: for each, the int64 seed of its ranks; read where ``random``.

    Raises:
        ValueError, TypeError: lists of different lengths, masks of the wrong size or dtype, other dtypes of weights.
    """

    def __init__(
        self,
        ws: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        keeps: Sequence[Tensor | None],
        random: bool = False,
        seeds: Sequence[int] | None = None,
    ):
        tables.check_weights("partition", ws, masks, keeps)
        # Flat indices are those of the shape, whatever the strides; a copy lives as long as its address.
        self._ws = [w.detach().contiguous() for w in ws]
        self._masks, self._keeps = list(masks), list(keeps)
        self.dtype, self.device = ws[0].dtype, ws[0].device
        self.random = random
        self.digits = _RANDOM_DIGITS if random else _MAGNITUDE_DIGITS[self.dtype]
        programs = tables.chunks(ws)
        self._programs = sum(programs)
        copies = [cdiv(p, COPY_CHUNKS) for p in programs]
        self._copies = sum(copies)
        rows = [w.shape[0] for w in ws]
        self._rows = rows
        columns = zip(
            [w.numel() for w in ws],
            [w.data_ptr() for w in self._ws],
            map(tables.address, masks),
            map(tables.address, keeps),
            seeds or [0] * len(ws),
            accumulate(copies, initial=0),
            copies,
            rows,
            accumulate(rows, initial=0),
            strict=False,
        )
        self._table, self._owners = tables.build(list(columns), programs, self.device)
        self._aligned = tables.aligned(self._ws)

    def start(self, counts: Sequence[int]) -> Tensor:
        """The selection before the first digit: int64 [T, 2] of (no digits, how many to select)."""
        if len(counts) != len(self._ws):
            raise ValueError(f"partition: counts: expected {len(self._ws)}, got {len(counts)}")
        return torch.tensor([[0, count] for count in counts]).to(self.device, non_blocking=True)

    def histograms(self, digit: int, selection: Tensor, frozen_too: bool = False) -> Tensor:
        """One pass over the weights: counts digit number ``digit`` of the candidates that ``selection`` leaves.

        Returns:
            int64 [T, 1, 2, 2^bits]: counts and, for the first digit, sums of the bits below it. With ``frozen_too`` [T,
            2, 2, 2^bits], the candidates and then the frozen ones (a first digit's only, where all weights matter).
        """
        shift, bits = self.digits[digit]
        parts = 2 if frozen_too else 1
        counters = torch.zeros(max(self._copies, 1) * parts << bits, dtype=torch.int64, device=self.device)
        out = torch.empty((len(self._ws), parts, 2, 1 << bits), dtype=torch.int64, device=self.device)
        with on_device(self.device):
            if self._programs:
                count_digits[(self._programs,)](
                    self._table, self._owners, selection, counters, DTYPE=DTYPES[self.dtype], RANDOM=self.random,
                    DIGIT=digit, SHIFT=shift, BITS=bits, SPLIT=frozen_too, ALIGNED=self._aligned, CHUNK=CHUNK,
                    COPY_CHUNKS=COPY_CHUNKS, GROUPS=GROUPS, num_warps=WARPS, num_stages=tables.STAGES,
                )  # fmt: skip
            bins = min(_SUM_BINS, 1 << bits)
            sum_copies[(len(self._ws), (1 << bits) // bins, parts)](
                self._table, counters, out, BITS=bits, PARTS=parts, BINS=bins, COPIES=_SUM_COPIES, num_warps=WARPS,
                num_stages=tables.STAGES,
            )  # fmt: skip
        return out

    def select(self, digit: int, selection: Tensor, histograms: Tensor) -> Tensor:
        """The next selection, int64 [T, 2]; after the last digit the thresholds (``partition_thresholds``)."""
        _, bits = self.digits[digit]
        last = digit == len(self.digits) - 1
        selected = torch.empty_like(selection)
        with on_device(self.device):
            select_digit[(len(self._ws),)](
                histograms, selection, selected, DTYPE=tl.float32 if self.random else DTYPES[self.dtype],
                DIGIT=min(digit, 1), LAST=last, BITS=bits, PARTS=histograms.shape[1], num_warps=WARPS,
                num_stages=tables.STAGES,
            )  # fmt: skip
        return selected

    def thresholds(self, counts: Sequence[int], first: Tensor | None = None) -> Tensor:
        """All digits; ``first``: the first digit's histograms where they are known."""
        selection = self.start(counts)
        for digit in range(len(self.digits)):
            known = first if digit == 0 and first is not None else self.histograms(digit, selection)
            selection = self.select(digit, selection, known)
        return selection

    def exponents(self, histograms: Tensor, fmt: Format) -> list[Tensor]:
        """n1 of each weight, int8 [N, 1], all rows alike, from the first digit's histograms of all that counts."""
        if self.random:
            raise ValueError("partition: exponents: expected histograms of magnitudes, got random ranks'")
        n1 = torch.empty(sum(self._rows), dtype=torch.int8, device=self.device)
        shift, bits = self.digits[0]
        lo, hi = exponent_limits(self.dtype)
        with on_device(self.device):
            tensor_exponents[(len(self._ws),)](
                self._table, histograms, n1, DTYPE=DTYPES[self.dtype], MAGNITUDES=fmt.magnitudes,
                MSE=fmt.exponent == "mse", LO=lo, HI=hi, SHIFT=shift, BITS=bits, PARTS=histograms.shape[1],
                WINDOW=_WINDOWS[self.dtype], ROWS=_ROW_TILE, num_warps=_WARPS_OF_EXPONENTS, num_stages=tables.STAGES,
            )  # fmt: skip
        return [part.view(-1, 1) for part in n1.split(self._rows)]


def _channel_exponents(ws: Sequence[Tensor], keeps: Sequence[Tensor | None], fmt: Format) -> list[Tensor]:
    """n1 of each row of each weight, int8 [N, 1]."""
    tables.check_weights("exponents", ws, [None] * len(ws), keeps)
    flat = [w.detach().contiguous() for w in ws]
    rows = [w.shape[0] for w in ws]
    lengths = [w.numel() // max(w.shape[0], 1) for w in ws]
    segments = [max(cdiv(k, _SEGMENT), 1) for k in lengths]
    programs = [n * s for n, s in zip(rows, segments, strict=True)]
    device, dtype = ws[0].device, DTYPES[ws[0].dtype]
    lo, hi = exponent_limits(ws[0].dtype)
    columns = zip(
        lengths,
        [w.data_ptr() for w in flat],
        map(tables.address, keeps),
        segments,
        accumulate(rows, initial=0),
        strict=False,
    )
    table, owners = tables.build(list(columns), programs, device)
    n1 = torch.empty(sum(rows), dtype=torch.int8, device=device)
    largest = torch.zeros(sum(rows), dtype=torch.int32, device=device)
    mse = fmt.exponent == "mse"
    counters = torch.zeros(sum(programs) * _ROW_BINS if mse else 1, dtype=torch.int64, device=device)
    options = {"num_warps": WARPS, "num_stages": tables.STAGES}
    with on_device(device):
        grid = (sum(programs),)
        if sum(programs):
            row_largest[grid](table, owners, largest, DTYPE=dtype, SEGMENT=_SEGMENT, TILE=_ROW_TILE, **options)
            if mse:
                row_count[grid](
                    table, owners, largest, counters, DTYPE=dtype, MAGNITUDES=fmt.magnitudes, LO=lo, HI=hi,
                    SEGMENT=_SEGMENT, TILE=_ROW_TILE, BINS=_ROW_BINS, **options,
                )  # fmt: skip
            row_exponents[grid](
                table, owners, largest, counters, n1, MAGNITUDES=fmt.magnitudes, MSE=mse, LO=lo, HI=hi,
                BINS=_ROW_BINS, **options,
            )  # fmt: skip
    return [part.view(-1, 1) for part in n1.split(rows)]


def exponents_of(ws: Sequence[Tensor], fmt: Format, keeps: Sequence[Tensor | None] | None = None) -> list[Tensor]:
    """``exponents`` of several weights of one dtype on one device, in the same launches.

    Args:
        ws: float32, bfloat16 or float16, rank ≥ 1, finite.
        fmt: the format; its granularity and exponent rule decide.
        keeps: for each, one bit a weight; those dropped count as 0. None: all count.
    """
    if not ws:
        return []
    none = [None] * len(ws)
    keeps = none if keeps is None else keeps
    if fmt.granularity == "channel":
        return _channel_exponents(ws, keeps, fmt)
    keys = Keys(ws, none, keeps)
    return keys.exponents(keys.histograms(0, keys.start([0] * len(ws))), fmt)


def partition_thresholds(
    ws: Sequence[Tensor],
    masks: Sequence[Tensor],
    keeps: Sequence[Tensor | None],
    counts: Sequence[int],
    random: bool = False,
    seeds: Sequence[int] | None = None,
) -> Tensor:
    """``partition_threshold`` of several weights of one dtype on one device, in the same launches: int64 [T, 2].

    A count that is no number of candidates would be an error of the reference's; hearing of it would mean waiting for
    the device. A negative one selects nothing here and one that is too large everything.

    Args and errors: as ``Keys``'s, and ``counts``, how many to freeze of each.
    """
    if not ws:
        return torch.empty((0, 2), dtype=torch.int64)
    return Keys(ws, masks, keeps, random, seeds).thresholds(counts)


def exponents_and_thresholds(
    ws: Sequence[Tensor],
    masks: Sequence[Tensor],
    keeps: Sequence[Tensor | None],
    counts: Sequence[int],
    fmt: Format,
    random: bool = False,
    seeds: Sequence[int] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """``exponents_of`` and ``partition_thresholds`` with the first digits of both from one pass where they are."""
    if not ws:
        return [], torch.empty((0, 2), dtype=torch.int64)
    if random or fmt.granularity == "channel":
        return exponents_of(ws, fmt, keeps), partition_thresholds(ws, masks, keeps, counts, random, seeds)
    keys = Keys(ws, masks, keeps)
    first = keys.histograms(0, keys.start(counts), frozen_too=True)
    return keys.exponents(first, fmt), keys.thresholds(counts, first)


# --- operators --------------------------------------------------------------------------------------------------------


def exponents(w, bits, levels, granularity, exponent):
    """torch.ops.inq.exponents for float32, bfloat16 and float16: int8 [N, 1], reference.exponents."""
    return exponents_of([w], Format(bits, levels, granularity, exponent))[0]


def partition_threshold(w, mask, keep, count, random, seed):
    """torch.ops.inq.partition_threshold: int64 [2] = (key, ties), reference.partition_threshold; the device is not
    asked whether ``count`` is possible (``partition_thresholds``)."""
    return partition_thresholds([w], [mask], [keep], [count], random, [seed])[0]


def exponents_and_threshold(w, mask, keep, count, random, seed, bits, levels, granularity, exponent):
    """torch.ops.inq.exponents_and_threshold, reference.exponents_and_threshold."""
    fmt = Format(bits, levels, granularity, exponent)
    n1, thresholds = exponents_and_thresholds([w], [mask], [keep], [count], fmt, random, [seed])
    return n1[0], thresholds[0]


# --- compile-only builds ----------------------------------------------------------------------------------------------


def configurations() -> Iterator[tuple]:
    """(name, kernel, signature, constexprs, num_warps, num_stages) of what launches use, for builds without a GPU."""
    tabled = {"table": "*i64", "owners": "*i64"}
    for dtype, kind in DTYPES.items():
        lo, hi = exponent_limits(dtype)
        passes = [(False, *digit) for digit in enumerate(_MAGNITUDE_DIGITS[dtype])]
        passes += [(True, *digit) for digit in enumerate(_RANDOM_DIGITS)]
        for random, digit, (shift, bits) in passes:
            if random and kind != tl.float32:
                continue
            for aligned in (False, True):
                for split in (False, True) if digit == 0 and not random else (False,):
                    yield tables.configuration(
                        f"count_digits {kind} {digit}{' random' * random}{' frozen' * split}{' aligned' * aligned}",
                        count_digits,
                        {**tabled, "selection": "*i64", "counters": "*i64"},
                        {
                            "DTYPE": kind, "RANDOM": random, "DIGIT": digit, "SHIFT": shift, "BITS": bits,
                            "SPLIT": split, "ALIGNED": aligned, "CHUNK": CHUNK, "COPY_CHUNKS": COPY_CHUNKS,
                            "GROUPS": GROUPS,
                        },
                    )  # fmt: skip
        last = len(_MAGNITUDE_DIGITS[dtype]) - 1
        for digit in sorted({0, min(last, 1)}):
            for final in (False, True):
                yield tables.configuration(
                    f"select_digit {kind} digit {digit}{' last' * final}",
                    select_digit,
                    {"histograms": "*i64", "selection": "*i64", "selected": "*i64"},
                    {"DTYPE": kind, "DIGIT": digit, "LAST": final, "BITS": FIRST_BITS, "PARTS": 1},
                )
        for mse in (False, True):
            rule = "mse" if mse else "max"
            shift, bits = _MAGNITUDE_DIGITS[dtype][0]
            limits = {"MAGNITUDES": 8, "LO": lo, "HI": hi}
            yield tables.configuration(
                f"tensor_exponents {kind} {rule}",
                tensor_exponents,
                {"table": "*i64", "histograms": "*i64", "n1": "*i8"},
                {
                    "DTYPE": kind, **limits, "MSE": mse, "SHIFT": shift, "BITS": bits, "PARTS": 2,
                    "WINDOW": _WINDOWS[dtype], "ROWS": _ROW_TILE,
                },
                warps=_WARPS_OF_EXPONENTS,
            )  # fmt: skip
            rows = {**tabled, "largest": "*i32", "counters": "*i64", "n1": "*i8"}
            yield tables.configuration(
                f"row_exponents {kind} {rule}", row_exponents, rows, {**limits, "MSE": mse, "BINS": _ROW_BINS}
            )
        size = {"SEGMENT": _SEGMENT, "TILE": _ROW_TILE}
        rows = {**tabled, "largest": "*i32"}
        yield tables.configuration(f"row_largest {kind}", row_largest, rows, {"DTYPE": kind, **size})
        rows["counters"] = "*i64"
        constants = {"DTYPE": kind, **limits, **size, "BINS": _ROW_BINS}
        yield tables.configuration(f"row_count {kind}", row_count, rows, constants)
    for parts in (1, 2):
        yield tables.configuration(
            f"sum_copies {parts}",
            sum_copies,
            {"table": "*i64", "counters": "*i64", "histograms": "*i64"},
            {"BITS": FIRST_BITS, "PARTS": parts, "BINS": _SUM_BINS, "COPIES": _SUM_COPIES},
        )
