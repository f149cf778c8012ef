"""n1 of tensors and of rows, reference.exponents, from what passes over the weights leave: see partition.py.

For a whole tensor the histogram of a first digit decides: its counts, and the sums of the bits below. For rows
(``channel``) the first pass finds the largest weight of each and, for the ``mse`` rule, the second one counts the half
octaves from the row's floor up, which is known by then: 64 counters for each 65536 weights of a row, at least for each
row, are all the memory that this takes. Whichever passes are made for a threshold anyway carry it.
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
from .launch import Configuration, cdiv, configuration, on_device
from .tables import DTYPES

# Where a counter keeps its count; below it is the sum of the rests. With a sum of 22-bit rests of 2^16 weights, or of
# 20-bit rests of the 2^17 of a copy, there is room for a count of 2^22.
COUNT_SHIFT = tl.constexpr(42)
REST_MASK = tl.constexpr((1 << 42) - 1)
# Two bins an octave of a row: 8 octaves of candidates, 15 magnitudes, 2 more at the top and 1 below are 51 bins.
ROW_BINS = tl.constexpr(64)
# Weights of a row that share counters, so that a sum of rests stays under COUNT_SHIFT.
_SEGMENT = 1 << 16
# Rows that a program of tensor_exponents writes at once.
_ROW_TILE = 1024
# What a pass does for rows.
NOTHING, LARGEST, COUNTS = 0, 1, 2

# One program decides n1 of a tensor: with fewer warps its int64 limbs would not fit the registers.
_WARPS_OF_TENSORS = 16
# Those of a row have 64 bins.
_WARPS_OF_ROWS = 1

# The digits that hold all octaves of the mse rule, 25 of them: 8 or, for float16, 32 an octave.
_WINDOWS = {torch.float32: 256, torch.bfloat16: 256, torch.float16: 1024}

_ALL = tl.constexpr(0x7FFFFFFFFFFFFFFF)
_HALF_OCTAVE = tl.constexpr(0x400000)
_OCTAVES = tl.constexpr(MSE_OCTAVES)
_ZERO_ROW = tl.constexpr(N1_ZERO_ROW)
_LIMB = tl.constexpr(0xFFFFFFFF)

# Columns of the table after the first program, which is the tensor's first row.
_ROWS, _SLOT, _SEGMENTS = (tl.constexpr(i) for i in range(1, 4))
_COLUMNS = tl.constexpr(4)


# --- kernels ----------------------------------------------------------------------------------------------------------


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
    table, histograms, n1, DTYPE: tl.constexpr, BASE: tl.constexpr, MAGNITUDES: tl.constexpr, MSE: tl.constexpr,
    LO: tl.constexpr, HI: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr,
    WINDOW: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program a tensor: n1 of all its rows from its first digit's histogram; keys begin at BASE."""
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
    best = _nearest((largest << SHIFT) + BASE, LO, HI)
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
    out = n1 + tl.load(table + t * _COLUMNS)
    for r in tl.range(0, rows.to(tl.int32), ROWS):
        each = r + tl.arange(0, ROWS)
        tl.store(out + each, tl.zeros([ROWS], tl.int8) + best, mask=each < rows)


@triton.jit
def largest_of_rows(x, largest, first, length, GROUPS: tl.constexpr):
    """Takes a tile's x, the bits of |w| in float32, 0 for what does not count, into the largest of each row.

    Integers: the order in which programs come changes nothing."""
    row = first // length
    rows = tables.rows_in(first, length, GROUPS)
    if length >= GROUPS * 8:
        # Two rows at the most: one addition each instead of a thousand that wait for one another.
        here = tl.max(tl.max(tl.where(rows == 0, x, 0), axis=1), axis=0)
        tl.atomic_max(largest + row, here, sem="relaxed")
        after = tl.max(tl.max(tl.where(rows == 0, 0, x), axis=1), axis=0)
        if after > 0:
            tl.atomic_max(largest + row + 1, after, sem="relaxed")
    else:
        # What is known already, from the second-level cache, leaves few that are larger.
        pointer = largest + row + rows
        known = tl.load(pointer, mask=x > 0, other=0, cache_modifier=".cg")
        tl.atomic_max(pointer, x, mask=x > known, sem="relaxed")


@triton.jit
def count_rows(
    x, largest, counters, first, length, segments, MAGNITUDES: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr,
    SEGMENT: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Counts a tile's x as in ``largest_of_rows``: half octaves from each row's floor up, with their sums."""
    rows = tables.rows_in(first, length, GROUPS)
    row = first // length + rows
    column = first % length + tables.positions(GROUPS) - rows * length
    # What is not there is in no row.
    top = _nearest(tl.load(largest + row, mask=x > 0, other=0), LO, HI)
    # Bin 1 is the lower half of the floor's octave; what is below adds nothing.
    below = 2 * (tl.maximum(top - _OCTAVES, LO) - MAGNITUDES + 126) - 1
    subnormal = x < (1 << 23)
    halves = tl.where(subnormal, (x >> 21) & 1, x >> 22) - below
    rest = tl.where(subnormal, x << 1, x) & 0x3FFFFF
    one = (tl.full([GROUPS, 8], 1, tl.int64) << COUNT_SHIFT) + rest
    pointer = counters + (row * segments + column // SEGMENT) * ROW_BINS + halves
    tl.atomic_add(pointer, one, mask=(halves > 0) & (x >= _HALF_OCTAVE), sem="relaxed")


@triton.jit
def row_exponents(
    table, owners, largest, counters, n1, MAGNITUDES: tl.constexpr, MSE: tl.constexpr, LO: tl.constexpr,
    HI: tl.constexpr,
):  # fmt: skip
    """One program a row: its n1 from what the passes left of it."""
    row = tl.program_id(0).to(tl.int64)
    entry = table + tl.load(owners + row) * _COLUMNS
    x = tl.load(largest + row)
    best = _nearest(x, LO, HI)
    if MSE:
        segments = tl.load(entry + _SEGMENTS)
        mine = counters + (tl.load(entry + _SLOT) + (row - tl.load(entry)) * segments) * ROW_BINS
        bins = tl.arange(0, ROW_BINS)
        count = tl.zeros([ROW_BINS], tl.int64)
        rest = tl.zeros([ROW_BINS], tl.int64)
        for s in tl.range(0, segments.to(tl.int32)):
            found = tl.load(mine + s * ROW_BINS + bins)
            count += found >> COUNT_SHIFT
            rest += found & REST_MASK
        half = (bins + 1) & 1
        e = tl.maximum(best - _OCTAVES, LO) - MAGNITUDES + ((bins - 1) >> 1)
        total = rest + count * ((2 + half) << 22)
        best = _least_error(e, half, count, total, best, LO, MAGNITUDES)
    tl.store(n1 + row, tl.where(x == 0, _ZERO_ROW, best).to(tl.int8))


# --- launchers --------------------------------------------------------------------------------------------------------


class Rows:
    """The rows of several weights of one dtype on one device: where passes leave what decides their n1.

    Memory: 4 bytes a row and, for the ``mse`` rule, 512 for each row or each 65536 weights of a longer one; nothing
    for one n1 a tensor.
    """

    def __init__(self, ws: Sequence[Tensor], fmt: Format):
        self.fmt, self.dtype, self.device = fmt, ws[0].dtype, ws[0].device
        self.rows = [w.shape[0] for w in ws]
        lengths = [w.numel() // max(n, 1) for w, n in zip(ws, self.rows, strict=True)]
        segments = [max(cdiv(length, _SEGMENT), 1) for length in lengths]
        slots = [n * s for n, s in zip(self.rows, segments, strict=True)]
        first_slots = list(accumulate(slots, initial=0))[:-1]
        # (first row, weights a row, first slot, slots a row) for the tables of passes.
        first_rows = list(accumulate(self.rows, initial=0))[:-1]
        self.columns = list(zip(first_rows, lengths, first_slots, segments, strict=True))
        self._numbers = list(zip(self.rows, first_slots, segments, strict=True))
        self.passes = ()
        if fmt.granularity == "channel":
            self.passes = (LARGEST, COUNTS) if fmt.exponent == "mse" else (LARGEST,)
        by_row, counted = LARGEST in self.passes, COUNTS in self.passes
        self.largest = torch.zeros(sum(self.rows) if by_row else 1, dtype=torch.int32, device=self.device)
        counters = sum(slots) * ROW_BINS.value if counted else 1
        self.counters = torch.zeros(counters, dtype=torch.int64, device=self.device)

    def exponents(self) -> list[Tensor]:
        """n1 of each weight, int8 [N, 1], after the ``passes``."""
        n1 = torch.empty(sum(self.rows), dtype=torch.int8, device=self.device)
        table, owners = tables.build(self._numbers, self.rows, self.device)
        with on_device(self.device):
            if n1.numel():
                row_exponents[(n1.numel(),)](
                    table, owners, self.largest, self.counters, n1, **_limits(self.dtype, self.fmt),
                    MSE=self.fmt.exponent == "mse", num_warps=_WARPS_OF_ROWS, num_stages=tables.STAGES,
                )  # fmt: skip
        return self._split(n1)

    def exponents_of_tensors(self, histograms: Tensor, digit: tuple[int, int], base: int) -> list[Tensor]:
        """n1 of each weight, all rows alike, from the first digit's histograms of all that counts.

        Args:
            histograms: int64 [T, parts, 2, 2^bits] as ``partition.Keys.histograms`` makes them.
            digit: (shift, bits) of that digit.
            base: what keys begin at.
        """
        shift, bits = digit
        n1 = torch.empty(sum(self.rows), dtype=torch.int8, device=self.device)
        table, _ = tables.build(self._numbers, self.rows, self.device)
        with on_device(self.device):
            tensor_exponents[(len(self.rows),)](
                table, histograms, n1, DTYPE=DTYPES[self.dtype], BASE=base, **_limits(self.dtype, self.fmt),
                MSE=self.fmt.exponent == "mse", SHIFT=shift, BITS=bits, PARTS=histograms.shape[1],
                WINDOW=_WINDOWS[self.dtype], ROWS=_ROW_TILE, num_warps=_WARPS_OF_TENSORS, num_stages=tables.STAGES,
            )  # fmt: skip
        return self._split(n1)

    def _split(self, n1: Tensor) -> list[Tensor]:
        return [part.view(-1, 1) for part in n1.split(self.rows)]


def constants(dtype: torch.dtype, fmt: Format) -> dict[str, int]:
    """What a kernel that makes a pass has to know."""
    return {**_limits(dtype, fmt), "SEGMENT": _SEGMENT}


def _limits(dtype: torch.dtype, fmt: Format) -> dict[str, int]:
    lo, hi = exponent_limits(dtype)
    return {"MAGNITUDES": fmt.magnitudes, "LO": lo, "HI": hi}


# --- compile-only builds ----------------------------------------------------------------------------------------------


def configurations_of(dtype: torch.dtype, digit: tuple[int, int], base: int) -> Iterator[Configuration]:
    """What launches use for weights of a dtype whose first digit this is, for builds without a GPU."""
    kind = DTYPES[dtype]
    shift, bits = digit
    limits = _limits(dtype, Format(5))
    for mse in (False, True):
        rule = "mse" if mse else "max"
        constants = {"DTYPE": kind, "BASE": base, **limits, "MSE": mse, "SHIFT": shift, "BITS": bits}
        constants |= {"WINDOW": _WINDOWS[dtype], "ROWS": _ROW_TILE}
        types = {"table": "*i64", "histograms": "*i64", "n1": "*i8"}
        for parts in (1, 2):
            name = f"tensor_exponents {kind} {rule}{' frozen' * (parts - 1)}"
            yield configuration(
                name, tensor_exponents, types, constants | {"PARTS": parts}, _WARPS_OF_TENSORS, tables.STAGES
            )
        types = {"table": "*i64", "owners": "*i64", "largest": "*i32", "counters": "*i64", "n1": "*i8"}
        constants = {**limits, "MSE": mse}
        yield configuration(
            f"row_exponents {kind} {rule}", row_exponents, types, constants, _WARPS_OF_ROWS, tables.STAGES
        )
