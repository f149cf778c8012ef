"""Which weights freeze next: reference.partition_threshold, and n1 with it (exponents.py), for many tensors at once.

The key of a weight is the bits of |w| as a float32 (of a float16 from 2^-25 on: ``base``), or its random rank; keys
keep the order of reference's. A radix select counts one digit after the other, each among the candidates that agree
with the digits found before, and the threshold is exact without sorting and without asking the device for anything.

The first digit, the exponent and the upper mantissa bits, also decides n1 of tensors: its histogram holds, with each
count, the exact sum of the bits below the digit. What decides n1 of rows the first two passes find by the way. Programs
count in *copies*, one histogram for every few chunks of a tensor, so that equal weights all over a tensor do not wait
for one counter; one more kernel adds the copies up. Integers: the order of additions changes nothing. Of the last digit
every chunk has a copy of its own: that says how many ties lie in the chunks before each, whatever the threshold will
be, and freezing takes the first in flat order without counting them.

Reads of W, whatever the weights, the masks, the rule and the granularity: three for float32, two for bfloat16 and
float16. A random partition reads none, as its keys come from indices, but for exponents one, or two by ``mse`` for
rows. Freezing (quantize.py) is one more, and the only write. Memory beside W: counters, 4 bytes for every 32 weights at
the most (every 16 where n1 of tensors is found too, and at least 16 KiB a tensor), and what ``Rows`` takes.
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

from ..format import Format
from . import exponents as exponents_module
from . import tables
from .exponents import COUNT_SHIFT, COUNTS, LARGEST, NOTHING, REST_MASK, ROW_BINS, Rows, count_rows, largest_of_rows
from .launch import Configuration, cdiv, configuration, on_device
from .tables import CHUNK, DTYPES, GROUPS, WARPS

# (shift, bits) of each digit of a 31-bit key. 2048 counters of 8 bytes a copy stay in the second-level cache for a
# thousand copies, and of three passes the last two meet few candidates.
FIRST_BITS = 11
_RANDOM_DIGITS = ((20, 11), (9, 11), (0, 9))
_MAGNITUDE_DIGITS = {
    torch.float32: ((20, 11), (9, 11), (0, 9)),
    # The lower half of a widened bfloat16 is zero.
    torch.bfloat16: ((20, 11), (16, 4)),
    # 29 bits above 2^-25, of which a widened float16 leaves 13 zero.
    torch.float16: ((18, 11), (13, 5)),
}
# Chunks that share a copy: 2^17 weights, so that counters take at most 1/32 of a float32 weight's memory. The 2^9 of a
# last digit, 4 bytes each, are as many for one chunk.
COPY_CHUNKS = 8
# The histograms' bins that one program adds up, from so many copies at once.
_SUM_BINS = 64
_SUM_COPIES = 32
# Chunks whose ties the adding kernel reads at once.
_SCAN = 1024

_ALL = tl.constexpr(0x7FFFFFFFFFFFFFFF)
_SIGNLESS = tl.constexpr(0x7FFFFFFF)
# What every float16 but 0 is above, as a float32: its octave is the first that float16 keys count.
_FLOAT16_BASE = tl.constexpr(102 << 23)
_NOTHING, _LARGEST, _COUNTS = tl.constexpr(NOTHING), tl.constexpr(LARGEST), tl.constexpr(COUNTS)

# Columns of the table after the first program.
_NUMEL, _W, _MASK, _KEEP, _SEED, _COPY, _COPIES, _PROGRAMS, _ROW, _LENGTH, _SLOT, _SEGMENTS = (
    tl.constexpr(i) for i in range(1, 13)
)
_COLUMNS = tl.constexpr(13)


# --- kernels ----------------------------------------------------------------------------------------------------------


def base(dtype: torch.dtype) -> int:
    """What the keys of a dtype begin at: float16's exponents fit digits of two bits less."""
    return _FLOAT16_BASE.value if dtype == torch.float16 else 0


@triton.jit
def _count_tile(
    row, weights, mask, keep, seed, first, left, counters, prefix, largest, row_counters, DTYPE: tl.constexpr,
    RANDOM: tl.constexpr, DIGIT: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, MAGNITUDES: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, SEGMENT: tl.constexpr,
    FULL: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Counts one tile, of which ``left`` weights exist, in ``counters``, and what its rows need."""
    place = tables.positions(GROUPS)
    inside = place < left
    kept = tables.spread(tables.load_bytes(keep, first, left, 0xFF, FULL, GROUPS)) & inside
    if ROWS != _NOTHING or not RANDOM:
        x = tables.widen(tables.load(weights + first + place, inside, FULL), DTYPE) & _SIGNLESS
    if ROWS == _LARGEST:
        largest_of_rows(tl.where(kept, x, 0), largest, first, tl.load(row + _LENGTH), GROUPS)
    if ROWS == _COUNTS:
        count_rows(
            tl.where(kept, x, 0), largest, row_counters, first, tl.load(row + _LENGTH), tl.load(row + _SEGMENTS),
            MAGNITUDES, LO, HI, SEGMENT, GROUPS,
        )  # fmt: skip
    if DIGIT >= 0:
        frozen = tables.spread(tables.load_bytes(mask, first, left, 0, FULL, GROUPS))
        if RANDOM:
            key = tables.random_keys(first + place, seed)
        elif DTYPE == tl.float16:
            key = tl.maximum(x - _FLOAT16_BASE, 0)
        else:
            key = x
        taken = kept
        if not SPLIT:
            taken = taken & (frozen == 0)
        counter = (key >> SHIFT) & ((1 << BITS) - 1)
        if DIGIT == 0:
            # The count above, the sum of what is below the first digit in one addition.
            one = (tl.full([GROUPS, 8], 1, tl.int64) << COUNT_SHIFT) + (key & ((1 << SHIFT) - 1))
        else:
            one = tl.full([GROUPS, 8], 1, tl.int32)
            taken = taken & ((key >> (SHIFT + BITS)) == prefix)
        if SPLIT:
            counter += tl.where(frozen, 1 << BITS, 0)
        tl.atomic_add(counters + counter, one, mask=taken, sem="relaxed")


@triton.jit
def count_digits(
    table, owners, selection, counters, largest, row_counters, DTYPE: tl.constexpr, RANDOM: tl.constexpr,
    DIGIT: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr,
    MAGNITUDES: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, SEGMENT: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, COPY_CHUNKS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One program a chunk: adds its candidates' digits to its copy; with SPLIT the frozen ones', apart from them.

    DIGIT: 0 for the first, 1 for a later one, −1 for none. ROWS: what else the pass does, for the n1 of rows.
    COPY_CHUNKS 1: a copy a program.
    """
    row, first, left = tables.my_chunk(table, owners, _COLUMNS, CHUNK)
    weights = tables.to_weights(tl.load(row + _W), DTYPE, ALIGNED)
    mask = tl.load(row + _MASK)
    keep = tl.load(row + _KEEP)
    seed = tl.load(row + _SEED)
    copy = tl.program_id(0).to(tl.int64)
    if COPY_CHUNKS > 1:
        copy = tl.load(row + _COPY) + first // (CHUNK * COPY_CHUNKS)
    mine = counters + copy * ((2 if SPLIT else 1) << BITS)
    prefix = 0
    if DIGIT > 0:
        prefix = tl.load(selection + 2 * tl.load(owners + tl.program_id(0))).to(tl.int32)
    if ROWS != _NOTHING:
        largest += tl.load(row + _ROW)
        row_counters += tl.load(row + _SLOT) * ROW_BINS
    tile: tl.constexpr = GROUPS * 8
    for _ in tl.range(0, (left // tile).to(tl.int32)):
        _count_tile(
            row, weights, mask, keep, seed, first, tile, mine, prefix, largest, row_counters, DTYPE, RANDOM, DIGIT,
            SHIFT, BITS, SPLIT, ROWS, MAGNITUDES, LO, HI, SEGMENT, True, GROUPS,
        )  # fmt: skip
        first += tile
    left = left % tile
    if left > 0:
        _count_tile(
            row, weights, mask, keep, seed, first, left, mine, prefix, largest, row_counters, DTYPE, RANDOM, DIGIT,
            SHIFT, BITS, SPLIT, ROWS, MAGNITUDES, LO, HI, SEGMENT, False, GROUPS,
        )  # fmt: skip


@triton.jit
def sum_copies(
    table, counters, histograms, FIRST: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr, BINS: tl.constexpr,
    COPIES: tl.constexpr, COPY_CHUNKS: tl.constexpr,
):  # fmt: skip
    """histograms[tensor, part, 0 and 1, bin]: the counts of all copies and, of a FIRST digit, the rests. Grid: tensor,
    bins, part."""
    t = tl.program_id(0).to(tl.int64)
    bins = tl.program_id(1) * BINS + tl.arange(0, BINS)
    part = tl.program_id(2)
    row = table + t * _COLUMNS
    if COPY_CHUNKS > 1:
        first = tl.load(row + _COPY)
        copies = tl.load(row + _COPIES)
    else:
        first = tl.load(row)
        copies = tl.load(row + _PROGRAMS)
    count = tl.zeros([BINS], tl.int64)
    rest = tl.zeros([BINS], tl.int64)
    for c in tl.range(0, copies.to(tl.int32), COPIES):
        copy = c + tl.arange(0, COPIES)
        pointer = counters + ((first + copy)[:, None] * PARTS + part) * (1 << BITS) + bins[None, :]
        found = tl.load(pointer, mask=(copy < copies)[:, None] & (bins >= 0)[None, :], other=0).to(tl.int64)
        if FIRST:
            count += tl.sum(found >> COUNT_SHIFT, axis=0)
            rest += tl.sum(found & REST_MASK, axis=0)
        else:
            count += tl.sum(found, axis=0)
    out = histograms + (t * PARTS + part) * (2 << BITS) + bins
    tl.store(out, count)
    tl.store(out + (1 << BITS), rest)


@triton.jit
def select_digit(
    histograms, selection, selected, picked, DTYPE: tl.constexpr, DIGIT: tl.constexpr, LAST: tl.constexpr,
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
    tl.store(picked + t, digit.to(tl.int32))


@triton.jit
def ties_before(table, counters, picked, before, BITS: tl.constexpr, SCAN: tl.constexpr):
    """One program a tensor: how many weights with the key of the threshold, whose last digit was ``picked``, are in
    the chunks before each."""
    t = tl.program_id(0).to(tl.int64)
    row = table + t * _COLUMNS
    first = tl.load(row)
    programs = tl.load(row + _PROGRAMS)
    digit = tl.load(picked + t)
    found = tl.zeros([], tl.int64)
    for at in tl.range(0, programs.to(tl.int32), SCAN):
        i = at + tl.arange(0, SCAN)
        count = tl.load(counters + ((first + i) << BITS) + digit, mask=i < programs, other=0).to(tl.int64)
        tl.store(before + first + i, found + tl.cumsum(count, axis=0) - count, mask=i < programs)
        found += tl.sum(count, axis=0)


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
        fmt: for whose rows the passes work too (``rows``), where its granularity is ``channel``; None: for none.

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
        fmt: Format | None = None,
    ):
        tables.check_weights("partition", ws, masks, keeps)
        # Flat indices are those of the shape, whatever the strides; a copy lives as long as its address.
        self._ws = [w.detach().contiguous() for w in ws]
        self._masks, self._keeps = list(masks), list(keeps)
        self.dtype, self.device = ws[0].dtype, ws[0].device
        self.random = random
        self.digits = _RANDOM_DIGITS if random else _MAGNITUDE_DIGITS[self.dtype]
        self.rows = Rows(ws, fmt or Format(5))
        self._programs = tables.chunks(ws)
        copies = [cdiv(p, COPY_CHUNKS) for p in self._programs]
        self._copies = sum(copies)
        columns = zip(
            [w.numel() for w in ws],
            [w.data_ptr() for w in self._ws],
            map(tables.address, masks),
            map(tables.address, keeps),
            seeds or [0] * len(ws),
            accumulate(copies, initial=0),
            copies,
            self._programs,
            *zip(*self.rows.columns, strict=True),
            strict=False,
        )
        self._table, self._owners = tables.build(list(columns), self._programs, self.device)
        self._aligned = tables.aligned(self._ws)
        self._tied = self._picked = None

    def start(self, counts: Sequence[int]) -> Tensor:
        """The selection before the first digit: int64 [T, 2] of (no digits, how many to select)."""
        if len(counts) != len(self._ws):
            raise ValueError(f"partition: counts: expected {len(self._ws)}, got {len(counts)}")
        return tables.upload(torch.tensor([[0, count] for count in counts]), self.device)

    def histograms(self, digit: int, selection: Tensor, frozen_too: bool = False) -> Tensor:
        """One pass over the weights: counts digit number ``digit`` of the candidates that ``selection`` leaves.

        Returns:
            int64 [T, 1, 2, 2^bits]: counts and, for the first digit, sums of the bits below it. With ``frozen_too`` [T,
            2, 2, 2^bits], the candidates and then the frozen ones (a first digit's only, where all weights matter).
        """
        _, bits = self.digits[digit]
        parts = 2 if frozen_too else 1
        # The last digit's copies are the chunks': how many ties each has.
        last = digit == len(self.digits) - 1
        copies = sum(self._programs) if last else self._copies
        dtype = torch.int64 if digit == 0 else torch.int32
        counters = torch.zeros(max(copies, 1) * parts << bits, dtype=dtype, device=self.device)
        out = torch.empty((len(self._ws), parts, 2, 1 << bits), dtype=torch.int64, device=self.device)
        copy_chunks = 1 if last else COPY_CHUNKS
        self._pass(digit, selection, counters, digit, self.digits[digit], frozen_too, copy_chunks)
        bins = min(_SUM_BINS, 1 << bits)
        with on_device(self.device):
            sum_copies[(len(self._ws), (1 << bits) // bins, parts)](
                self._table, counters, out, FIRST=digit == 0, BITS=bits, PARTS=parts, BINS=bins, COPIES=_SUM_COPIES,
                COPY_CHUNKS=copy_chunks, num_warps=WARPS, num_stages=tables.STAGES,
            )  # fmt: skip
        if last:
            self._tied = counters
        return out

    def _pass(
        self,
        number: int,
        selection: Tensor,
        counters: Tensor,
        digit: int = -1,
        bits: tuple[int, int] = (0, 0),
        split: bool = False,
        copy_chunks: int = 1,
    ) -> None:
        """Launches count_digits for a pass of that number: for a digit, for rows, or for both."""
        of_rows = self.rows.passes[number] if number < len(self.rows.passes) else NOTHING
        constants = _constants(
            self.dtype, self.rows.fmt, min(digit, 1), bits, self._aligned, of_rows, split, self.random, copy_chunks
        )
        with on_device(self.device):
            if sum(self._programs):
                count_digits[(sum(self._programs),)](
                    self._table, self._owners, selection, counters, self.rows.largest, self.rows.counters, **constants,
                    num_warps=WARPS, num_stages=tables.STAGES,
                )  # fmt: skip

    def select(self, digit: int, selection: Tensor, histograms: Tensor) -> Tensor:
        """The next selection, int64 [T, 2]; after the last digit the thresholds (``partition_thresholds``)."""
        _, bits = self.digits[digit]
        selected = torch.empty((len(self._ws), 2), dtype=torch.int64, device=self.device)
        self._picked = torch.empty(len(self._ws), dtype=torch.int32, device=self.device)
        with on_device(self.device):
            select_digit[(len(self._ws),)](
                histograms, selection, selected, self._picked,
                DTYPE=tl.float32 if self.random else DTYPES[self.dtype], DIGIT=min(digit, 1),
                LAST=digit == len(self.digits) - 1, BITS=bits, PARTS=histograms.shape[1], num_warps=WARPS,
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

    def ties_before(self) -> Tensor:
        """After the last ``select``, int64 [programs]: of each chunk how many ties are in its tensor's before it."""
        before = torch.empty(sum(self._programs), dtype=torch.int64, device=self.device)
        with on_device(self.device):
            ties_before[(len(self._ws),)](
                self._table, self._tied, self._picked, before, BITS=self.digits[-1][1], SCAN=_SCAN, num_warps=WARPS,
                num_stages=tables.STAGES,
            )  # fmt: skip
        return before

    def exponents(self, histograms: Tensor, fmt: Format) -> list[Tensor]:
        """n1 of each weight, int8 [N, 1], all rows alike, from the first digit's histograms of all that counts."""
        if self.random:
            raise ValueError("partition: exponents: expected histograms of magnitudes, got random ranks'")
        return Rows(self._ws, fmt).exponents_of_tensors(histograms, self.digits[0], base(self.dtype))

    def exponents_of_rows(self, known: bool = False) -> list[Tensor]:
        """n1 of each row of each weight, int8 [N, 1]; ``known``: all digits were counted, and the rows by the way."""
        for number in range(0 if known else len(self.rows.passes)):
            self._pass(number, self.rows.counters, self.rows.counters)
        return self.rows.exponents()


def _constants(
    dtype: torch.dtype, fmt: Format, digit: int, bits: tuple[int, int], aligned: bool, rows: int, split: bool,
    random: bool, copy_chunks: int,
) -> dict[str, object]:  # fmt: skip
    """count_digits's constants; what a pass does not use is the same for all, so that fewer kernels are compiled."""
    if random and rows == NOTHING:
        dtype, aligned = torch.float32, True  # the weights are not read
    numbers = exponents_module.constants(dtype, fmt)
    if rows != COUNTS:
        numbers = dict.fromkeys(numbers, 0)
    return {
        "DTYPE": DTYPES[dtype], "RANDOM": random, "DIGIT": digit, "SHIFT": bits[0], "BITS": bits[1], "SPLIT": split,
        "ROWS": rows, **numbers, "ALIGNED": aligned, "CHUNK": CHUNK, "COPY_CHUNKS": copy_chunks, "GROUPS": GROUPS,
    }  # fmt: skip


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
    keys = Keys(ws, none, none if keeps is None else keeps, fmt=fmt)
    if fmt.granularity == "channel":
        return keys.exponents_of_rows()
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
    """``exponents_of`` and ``partition_thresholds`` from the same passes."""
    if not ws:
        return [], torch.empty((0, 2), dtype=torch.int64)
    n1, thresholds, _ = decide(ws, masks, keeps, counts, fmt, random, seeds)
    return n1, thresholds


def decide(
    ws: Sequence[Tensor],
    masks: Sequence[Tensor],
    keeps: Sequence[Tensor | None],
    counts: Sequence[int],
    fmt: Format,
    random: bool = False,
    seeds: Sequence[int] | None = None,
) -> tuple[list[Tensor], Tensor, Keys]:
    """``exponents_and_thresholds``, and the keys, which know the ``ties_before`` each chunk."""
    if fmt.granularity == "channel":
        keys = Keys(ws, masks, keeps, random, seeds, fmt)
        thresholds = keys.thresholds(counts)
        return keys.exponents_of_rows(known=True), thresholds, keys
    keys = Keys(ws, masks, keeps, random, seeds)
    if random:
        return exponents_of(ws, fmt, keeps), keys.thresholds(counts), keys
    first = keys.histograms(0, keys.start(counts), frozen_too=True)
    return keys.exponents(first, fmt), keys.thresholds(counts, first), keys


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


def configurations() -> Iterator[Configuration]:
    """What launches use, for builds without a GPU."""
    for dtype, kind in DTYPES.items():
        digits = _MAGNITUDE_DIGITS[dtype]
        for aligned in (True, False):
            for number in range(len(digits)):
                for rows in sorted({NOTHING, (LARGEST, COUNTS, NOTHING)[number]}):
                    yield _count(dtype, number, digits, aligned, rows)
            yield _count(dtype, 0, digits, aligned, split=True)
            # Without a digit, and in a random partition.
            for rows in (LARGEST, COUNTS):
                yield _count(dtype, -1, digits, aligned, rows)
                yield _count(dtype, rows - LARGEST, _RANDOM_DIGITS, aligned, rows, random=True)
        for number, (_, bits) in enumerate(digits):
            last = number == len(digits) - 1
            types = {"histograms": "*i64", "selection": "*i64", "selected": "*i64", "picked": "*i32"}
            constants = {"DTYPE": kind, "DIGIT": min(number, 1), "LAST": last, "BITS": bits}
            for parts in (1, 2) if number == 0 else (1,):
                name = f"select_digit {kind} digit {number}{' last' * last}{' frozen' * (parts - 1)}"
                yield configuration(name, select_digit, types, constants | {"PARTS": parts}, WARPS, tables.STAGES)
        bits = digits[-1][1]
        types = {"table": "*i64", "counters": "*i32", "picked": "*i32", "before": "*i64"}
        constants = {"BITS": bits, "SCAN": _SCAN}
        yield configuration(f"ties_before {kind}", ties_before, types, constants, WARPS, tables.STAGES)
        yield from exponents_module.configurations_of(dtype, digits[0], base(dtype))
    for number in range(len(_RANDOM_DIGITS)):
        yield _count(torch.float32, number, _RANDOM_DIGITS, True, random=True)
    for first, parts, bits, copy_chunks in (
        *((True, parts, FIRST_BITS, COPY_CHUNKS) for parts in (1, 2)),
        (False, 1, FIRST_BITS, COPY_CHUNKS),
        *((False, 1, digits[-1][1], 1) for digits in _MAGNITUDE_DIGITS.values()),
    ):
        types = {"table": "*i64", "counters": "*i64" if first else "*i32", "histograms": "*i64"}
        constants = {"FIRST": first, "BITS": bits, "PARTS": parts, "BINS": min(_SUM_BINS, 1 << bits)}
        constants |= {"COPIES": _SUM_COPIES, "COPY_CHUNKS": copy_chunks}
        name = f"sum_copies {parts} {'first' if first else 'later'} {bits} bits"
        yield configuration(name, sum_copies, types, constants, WARPS, tables.STAGES)


def _count(
    dtype: torch.dtype,
    number: int,
    digits: Sequence[tuple[int, int]],
    aligned: bool,
    rows: int = NOTHING,
    split: bool = False,
    random: bool = False,
) -> Configuration:
    bits = digits[number] if number >= 0 else (0, 0)
    copy_chunks = 1 if number in (-1, len(digits) - 1) else COPY_CHUNKS
    constants = _constants(dtype, Format(5), min(number, 1), bits, aligned, rows, split, random, copy_chunks)
    types = {"table": "*i64", "owners": "*i64", "selection": "*i64", "counters": "*i32" if number > 0 else "*i64"}
    types |= {"largest": "*i32", "row_counters": "*i64"}
    words = f"{' random' * random}{' frozen' * split}{' aligned' * aligned}{('', ' largest', ' rows')[rows]}"
    return configuration(
        f"count_digits {DTYPES[dtype]} {number}{words}", count_digits, types, constants, WARPS, tables.STAGES
    )
