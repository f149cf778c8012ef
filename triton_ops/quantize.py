"""Freezing what a threshold selects: reference.quantize_with_mask_, for many tensors in the same launches.

Every weight is read once, and written once if it changes: keys above the threshold are quantized and their bits set,
pruned weights become +0. Of the weights with just the threshold's key the first in flat order are frozen too: which
those are in a chunk is known when the ties of the chunks before it are counted, as partition.py has done.

For a threshold from elsewhere, as ``torch.ops.inq.quantize_with_mask_`` takes it, they are not. Then the first kernel
counts them by the way, a second one adds up the counts before each chunk, and the third freezes ties in the chunks that
have some to take, which it reads and writes once more. No result depends on the order of programs.
"""

# Constexprs are in capitals, and look like constants to the linter.
# ruff: noqa: SIM300

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..format import Format
from ..reference import exponent_limits
from . import tables
from .launch import Configuration, configuration, on_device
from .tables import CHUNK, DTYPES, GROUPS, WARPS

# Chunks whose ties the adding kernel reads at once.
_SCAN = 1024

_SIGNLESS = tl.constexpr(0x7FFFFFFF)
_HALF_OCTAVE = tl.constexpr(0x400000)
_POWER = tl.constexpr(0x7F800000)
# What becomes of the weights with the threshold's key.
COUNTED, ALONE, TAKEN = 0, 1, 2
_COUNTED, _ALONE, _TAKEN = (tl.constexpr(i) for i in (COUNTED, ALONE, TAKEN))

# Columns of the table after the first program.
_NUMEL, _W, _MASK, _KEEP, _SEED, _N1, _THRESHOLD, _LENGTH, _PROGRAMS = (tl.constexpr(i) for i in range(1, 10))
_COLUMNS = tl.constexpr(10)


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _quantized(x, n1, MAGNITUDES: tl.constexpr, LO: tl.constexpr):
    """Equation (4) on float32 bits (inq_format.h): |w| below the lower end of the smallest level's bin is +0."""
    n2 = n1 + 1 - MAGNITUDES
    # 2^(n2−1); where n2 is under the least exponent, the lower end of the bin of 2^LO.
    at_limit: tl.constexpr = (LO + 126) << 23 if LO > -126 else 0x400000
    least = tl.where(n2 == LO, at_limit, (n2 + 126) << 23)
    least = tl.where(n2 < LO, ((LO + 126) << 23) + 0x400000 if LO > -126 else 0x600000, least)
    magnitude = x & _SIGNLESS
    # Half an octave more rounds to the nearest power, ties up; what is larger than 2^n1 saturates.
    power = (magnitude + _HALF_OCTAVE) & _POWER
    power = tl.minimum(tl.maximum(power, (n2 + 127) << 23), (n1 + 127) << 23)
    value = power | (x ^ magnitude)
    return tl.where((magnitude >= least) & (n1 >= LO), value, 0)


@triton.jit
def _freeze_tile(
    weights, mask, keep, seed, n1, length, key, take, first, left, last_row, MAGNITUDES: tl.constexpr,
    LO: tl.constexpr, DTYPE: tl.constexpr, RANDOM: tl.constexpr, TIES: tl.constexpr, FULL: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Freezes one tile's weights above ``key`` and, unless TIES are _COUNTED only, the first ``take`` of those at it;
    where these are dealt with _ALONE, nothing else.

    Returns int32 [GROUPS]: how many are at the key, and how many are frozen now."""
    place = tables.positions(GROUPS)
    inside = place < left
    frozen = tables.spread(tables.load_bytes(mask, first, left, 0, FULL, GROUPS)) & inside
    kept = tables.spread(tables.load_bytes(keep, first, left, 0xFF, FULL, GROUPS)) & inside
    bits = tables.load(weights + first + place, inside, FULL)
    if RANDOM:
        keys = tables.random_keys(first + place, seed)
    else:
        keys = bits.to(tl.int32) & (0x7FFFFFFF if DTYPE == tl.float32 else 0x7FFF)
    candidates = kept & (frozen == 0)
    tied = candidates & (keys == key)
    of_group = tl.sum(tied.to(tl.int32), axis=1)
    chosen = candidates & (keys > key)
    if TIES != _COUNTED:
        some = tied
        if take < tl.sum(of_group, axis=0):
            some = tied & (place < 0)
            if take > 0:
                rank = (tl.cumsum(of_group, axis=0) - of_group)[:, None] + tl.cumsum(tied.to(tl.int32), axis=1)
                some = tied & (rank <= take)
        if TIES == _ALONE:
            chosen = some
        else:
            chosen = chosen | some
    changed = chosen
    if TIES != _ALONE:
        changed = chosen | (inside & (kept == 0))
    if tl.max(tl.max(changed.to(tl.int32), axis=1), axis=0) > 0:
        row = tl.minimum(first // length + tables.rows_in(first, length, GROUPS), last_row)
        x = _quantized(tables.widen(bits, DTYPE), tl.load(n1 + row).to(tl.int32), MAGNITUDES, LO)
        new = tl.where(chosen, tables.narrow(x, DTYPE), bits)
        if TIES != _ALONE:
            new = tl.where(kept, new, 0)
        tables.store(weights + first + place, new, inside, FULL)
    frozen = frozen | chosen
    # All bytes: bits after the last weight become 0, as the reference's.
    groups = tl.arange(0, GROUPS)
    pointer = tables.to_pointer(mask, tl.uint8, False) + first // 8 + groups
    tables.store(pointer, tables.gather(frozen), groups * 8 < left, FULL)
    return of_group, tl.sum(frozen.to(tl.int32), axis=1)


@triton.jit
def _freeze_chunk(
    row, first, left, take, MAGNITUDES: tl.constexpr, LO: tl.constexpr, DTYPE: tl.constexpr, RANDOM: tl.constexpr,
    TIES: tl.constexpr, ALIGNED: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """``_freeze_tile`` for all tiles of a chunk, in order: how many of it are at the key, and how many frozen now."""
    weights = tables.to_weights(tl.load(row + _W), DTYPE, ALIGNED)
    mask = tl.load(row + _MASK)
    keep = tl.load(row + _KEEP)
    seed = tl.load(row + _SEED)
    n1 = tables.to_pointer(tl.load(row + _N1), tl.int8, False)
    length = tl.load(row + _LENGTH)
    threshold = tables.to_pointer(tl.load(row + _THRESHOLD), tl.int64, False)
    # A key beyond all keys selects nothing: what is at it has no ties to take.
    key = tl.minimum(tl.load(threshold), 0x7FFFFFFF).to(tl.int32)
    last_row = tl.load(row + _NUMEL) // length - 1
    tile: tl.constexpr = GROUPS * 8
    tied = tl.zeros([GROUPS], tl.int32)
    frozen = tl.zeros([GROUPS], tl.int32)
    for _ in tl.range(0, (left // tile).to(tl.int32)):
        more, now = _freeze_tile(
            weights, mask, keep, seed, n1, length, key, take, first, tile, last_row, MAGNITUDES, LO, DTYPE, RANDOM,
            TIES, True, GROUPS,
        )  # fmt: skip
        first += tile
        tied += more
        frozen += now
        if TIES != _COUNTED:
            take -= tl.sum(more, axis=0)
    left = left % tile
    if left > 0:
        more, now = _freeze_tile(
            weights, mask, keep, seed, n1, length, key, take, first, left, last_row, MAGNITUDES, LO, DTYPE, RANDOM,
            TIES, False, GROUPS,
        )  # fmt: skip
        tied += more
        frozen += now
    return tl.sum(tied, axis=0), tl.sum(frozen, axis=0)


@triton.jit
def _left_to_take(row, before, CHUNK: tl.constexpr):
    """How many ties this program may freeze, at most those of a chunk."""
    ties = tl.load(tables.to_pointer(tl.load(row + _THRESHOLD), tl.int64, False) + 1)
    left = ties - tl.load(before + tl.program_id(0))
    return tl.minimum(tl.maximum(left, 0), CHUNK).to(tl.int32)


@triton.jit
def freeze_all(
    table, owners, before, totals, MAGNITUDES: tl.constexpr, LO: tl.constexpr, DTYPE: tl.constexpr,
    RANDOM: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One program a chunk: freezes what the threshold selects, adds up what is frozen; ``before``: ties before it."""
    row, first, left = tables.my_chunk(table, owners, _COLUMNS, CHUNK)
    take = _left_to_take(row, before, CHUNK)
    _, held = _freeze_chunk(row, first, left, take, MAGNITUDES, LO, DTYPE, RANDOM, _TAKEN, ALIGNED, GROUPS)
    tl.atomic_add(totals + tl.load(owners + tl.program_id(0)), held.to(tl.int64), sem="relaxed")


@triton.jit
def freeze_above(
    table, owners, tied, frozen, MAGNITUDES: tl.constexpr, LO: tl.constexpr, DTYPE: tl.constexpr,
    RANDOM: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One program a chunk: freezes what is above the threshold, counts what is at it and what is frozen."""
    row, first, left = tables.my_chunk(table, owners, _COLUMNS, CHUNK)
    ties, held = _freeze_chunk(row, first, left, 0, MAGNITUDES, LO, DTYPE, RANDOM, _COUNTED, ALIGNED, GROUPS)
    tl.store(tied + tl.program_id(0), ties)
    tl.store(frozen + tl.program_id(0), held)


@triton.jit
def count_before(table, tied, frozen, before, totals, SCAN: tl.constexpr):
    """One program a tensor: how many ties are in the chunks before each, and how many weights are frozen in the end."""
    t = tl.program_id(0).to(tl.int64)
    row = table + t * _COLUMNS
    first = tl.load(row)
    programs = tl.load(row + _PROGRAMS)
    take = tl.load(tables.to_pointer(tl.load(row + _THRESHOLD), tl.int64, False) + 1)
    found = tl.zeros([], tl.int64)
    held = tl.zeros([], tl.int64)
    for at in tl.range(0, programs.to(tl.int32), SCAN):
        i = at + tl.arange(0, SCAN)
        count = tl.load(tied + first + i, mask=i < programs, other=0).to(tl.int64)
        tl.store(before + first + i, found + tl.cumsum(count, axis=0) - count, mask=i < programs)
        found += tl.sum(count, axis=0)
        held += tl.sum(tl.load(frozen + first + i, mask=i < programs, other=0).to(tl.int64), axis=0)
    tl.store(totals + t, held + tl.maximum(tl.minimum(found, take), 0))


@triton.jit
def freeze_ties(
    table, owners, tied, before, MAGNITUDES: tl.constexpr, LO: tl.constexpr, DTYPE: tl.constexpr,
    RANDOM: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One program a chunk: freezes those of its ties that are among the first in flat order."""
    row, first, left = tables.my_chunk(table, owners, _COLUMNS, CHUNK)
    take = _left_to_take(row, before, CHUNK)
    if (take > 0) & (tl.load(tied + tl.program_id(0)) > 0):
        _freeze_chunk(row, first, left, take, MAGNITUDES, LO, DTYPE, RANDOM, _ALONE, ALIGNED, GROUPS)


# With four warps its tile needs more registers than a thread of sm_120 can have.
_TIES_WARPS = 8


# --- launchers --------------------------------------------------------------------------------------------------------


def check(
    name: str, ws: Sequence[Tensor], masks: Sequence[Tensor], n1s: Sequence[Tensor], keeps: Sequence[Tensor | None]
) -> None:
    """TypeError, ValueError: tensors that are not as ``freeze_`` takes them."""
    tables.check_weights(name, ws, masks, keeps)
    if len(n1s) != len(ws):
        raise ValueError(f"{name}: n1s: expected {len(ws)}, got {len(n1s)}")
    for i, (w, n1) in enumerate(zip(ws, n1s, strict=True)):
        if n1.dtype != torch.int8:
            raise TypeError(f"{name}: n1 number {i}: expected int8, got {n1.dtype}")
        if list(n1.shape) != [w.shape[0], 1]:
            raise ValueError(f"{name}: n1 number {i}: expected shape [{w.shape[0]}, 1], got {list(n1.shape)}")
        if n1.device != w.device:
            raise ValueError(f"{name}: n1 number {i}: expected a tensor on {w.device}, got {n1.device}")


def freeze_(
    ws: Sequence[Tensor],
    masks: Sequence[Tensor],
    n1s: Sequence[Tensor],
    thresholds: Tensor,
    keeps: Sequence[Tensor | None],
    fmt: Format,
    random: bool = False,
    seeds: Sequence[int] | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """``quantize_with_mask_`` of several weights of one dtype on one device, in the same launches.

    Args:
        ws: float32, bfloat16 or float16, rank ≥ 1; changed in place.
        masks: for each, uint8 [ceil(numel/8)]; changed in place, and bits after the last weight become 0.
        n1s: for each, int8 [N, 1].
        thresholds: int64 [T, 2], as ``partition.partition_thresholds`` gives them.
        keeps: for each, uint8 [ceil(numel/8)], or None.
        fmt: the format; its granularity and rule do not matter here.
        random, seeds: as in ``partition.Keys``.
        before: ``partition.Keys.ties_before`` of the same weights and masks; without it ties are counted here.

    Returns:
        int64 [T] on the device: how many weights of each are frozen now.

    Raises:
        ValueError, TypeError: lists of different lengths, or tensors that are not as above.
    """
    if not ws:
        return torch.empty(0, dtype=torch.int64)
    name = "quantize_with_mask_"
    check(name, ws, masks, n1s, keeps)
    if thresholds.dtype != torch.int64:
        raise TypeError(f"{name}: thresholds: expected int64, got {thresholds.dtype}")
    if list(thresholds.shape) != [len(ws), 2]:
        raise ValueError(f"{name}: thresholds: expected shape [{len(ws)}, 2], got {list(thresholds.shape)}")
    device, dtype = ws[0].device, ws[0].dtype
    # Flat indices are those of the shape, whatever the strides. Copies live until their address has been used.
    flat = [w.detach().contiguous() for w in ws]
    rows = [n1.contiguous() for n1 in n1s]
    thresholds = thresholds.contiguous()
    programs = tables.chunks(flat)
    columns = zip(
        [w.numel() for w in ws],
        [w.data_ptr() for w in flat],
        [m.data_ptr() for m in masks],
        map(tables.address, keeps),
        seeds or [0] * len(ws),
        [n1.data_ptr() for n1 in rows],
        [thresholds.data_ptr() + 2 * t * thresholds.element_size() for t in range(len(ws))],
        [w.numel() // max(w.shape[0], 1) for w in ws],
        programs,
        strict=True,
    )
    table, owners = tables.build(list(columns), programs, device)
    total = sum(programs)
    constants = {
        "MAGNITUDES": fmt.magnitudes,
        "LO": exponent_limits(dtype)[0],
        "DTYPE": DTYPES[dtype],
        "RANDOM": random,
        "ALIGNED": tables.aligned(flat),
        "CHUNK": CHUNK,
        "GROUPS": GROUPS,
        "num_stages": tables.STAGES,
    }
    totals = torch.zeros(len(ws), dtype=torch.int64, device=device)
    with on_device(device):
        if before is not None:
            if total:
                freeze_all[(total,)](table, owners, before, totals, **constants, num_warps=_TIES_WARPS)
        else:
            tied, frozen = (torch.empty(total, dtype=torch.int32, device=device) for _ in range(2))
            before = torch.empty(total, dtype=torch.int64, device=device)
            if total:
                freeze_above[(total,)](table, owners, tied, frozen, **constants, num_warps=WARPS)
            count_before[(len(ws),)](
                table, tied, frozen, before, totals, SCAN=_SCAN, num_warps=WARPS, num_stages=tables.STAGES
            )
            if total:
                freeze_ties[(total,)](table, owners, tied, before, **constants, num_warps=_TIES_WARPS)
    for w, used in zip(ws, flat, strict=True):
        if used.data_ptr() != w.data_ptr():
            w.detach().copy_(used)
    return totals


def quantize_with_mask_(w, mask, n1, threshold, keep, bits, levels, random, seed):
    """torch.ops.inq.quantize_with_mask_ for float32, bfloat16 and float16: reference.quantize_with_mask_."""
    freeze_([w], [mask], [n1], threshold.view(1, 2), [keep], Format(bits, levels), random, [seed])


# --- compile-only builds ----------------------------------------------------------------------------------------------


def configurations() -> Iterator[Configuration]:
    """What launches use, for builds without a GPU."""
    pointers = {"table": "*i64", "owners": "*i64", "tied": "*i32", "frozen": "*i32", "before": "*i64", "totals": "*i64"}
    for dtype in DTYPES:
        for random in (False, True):
            for aligned in (False, True):
                constants = {
                    "MAGNITUDES": 8,
                    "LO": exponent_limits(dtype)[0],
                    "DTYPE": DTYPES[dtype],
                    "RANDOM": random,
                    "ALIGNED": aligned,
                    "CHUNK": CHUNK,
                    "GROUPS": GROUPS,
                }
                for kernel, warps in ((freeze_all, _TIES_WARPS), (freeze_above, WARPS), (freeze_ties, _TIES_WARPS)):
                    name = f"{kernel.__name__} {DTYPES[dtype]}{' random' * random}{' aligned' * aligned}"
                    types = {argument: pointers[argument] for argument in kernel.arg_names if argument in pointers}
                    yield configuration(name, kernel, types, constants, warps, tables.STAGES)
    types = {argument: pointers[argument] for argument in count_before.arg_names if argument in pointers}
    yield configuration("count_before", count_before, types, {"SCAN": _SCAN}, WARPS, tables.STAGES)
