"""What the training kernels share: tables of several tensors for one launch, and the bits of weights and masks.

A *table* is int64 on the device, one row of ``columns`` numbers a tensor: the first of the tensor's programs, then
what the kernel wants to know (the number of weights, addresses, seeds). ``owners`` names the tensor of every program.
Both reach the device in one copy that waits for nothing, once for tensors that stay where they are. Weights are read as
integers of their size and worked on as the bits of a float32, in *tiles* of groups of eight: one byte of a mask each.
"""

# Constexprs are in capitals, and Triton needs the else of a branch that it drops.
# ruff: noqa: SIM300

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks
from .launch import INTERPRETED, cdiv, on_device

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# 128 groups of eight weights: 8 weights a thread keep their loads in flight, and four operands in the registers.
GROUPS = 128
TILE = 8 * GROUPS
# Four warps, so that a tile costs few registers and an SM holds many programs.
WARPS = 4
# Loops over tiles are short and have many programs beside them: no software pipeline.
STAGES = 1
# Weights of one program: enough to pay for reading the table, few enough to share out a small model.
CHUNK = 16 * TILE
# Addresses are multiples of this where ``aligned`` says so, and then 16 bytes are moved by one instruction.
ALIGNMENT = 16

_INTERPRETED = tl.constexpr(INTERPRETED)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)


# --- the host's side --------------------------------------------------------------------------------------------------


def chunks(tensors: Sequence[Tensor]) -> list[int]:
    """How many programs go over each tensor."""
    return [cdiv(t.numel(), CHUNK) for t in tensors]


def address(t: Tensor | None) -> int:
    """Where a tensor begins; 0 for none."""
    return 0 if t is None else t.data_ptr()


def aligned(*lists: Sequence[Tensor]) -> bool:
    """Whether all tensors begin at multiples of ``ALIGNMENT``."""
    return all(t.data_ptr() % ALIGNMENT == 0 for tensors in lists for t in tensors)


def upload(numbers: Tensor, device: torch.device) -> Tensor:
    """``numbers`` on ``device``, in a copy that the host does not wait for: pinned memory, where there is CUDA. It is
    kept for a graph that is being captured, which copies it again at every replay."""
    host = _pinned(numbers, device)
    if _stream(device)[1]:
        _captured[id(host)] = host
    return host.to(device, non_blocking=True)


def _pinned(numbers: Tensor, device: torch.device) -> Tensor:
    return numbers.pin_memory() if device.type == "cuda" else numbers


def build(rows: Sequence[Sequence[int]], programs: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The (table, owners) of tensors with ``rows`` of numbers and so many ``programs``, on ``device``.

    They are kept and given again to who asks with the same numbers: an optimizer's next step uploads nothing. As the
    numbers are all that a table holds, one can never be wrong for other tensors that lie where freed ones lay. What a
    CUDA graph is captured with is kept for ever, since it may be replayed at any time.
    """
    numbers = (tuple(map(tuple, rows)), tuple(programs))
    stream, capturing = _stream(device)
    # Optimizers may step in several threads.
    with _lock:
        known = _kept((device, *numbers), stream, capturing)
    return known.table, known.owners


def _kept(key: tuple, stream: int, capturing: bool) -> _Table:
    """The table of (device, rows, programs) for a stream: one that is there, or a new one."""
    device, *numbers = key
    if capturing:
        # A capture begins when the device is idle: whatever stream copied a table, it has arrived. One that is made
        # only now is copied whenever the graph is replayed, and is nobody else's.
        known = next(iter(_recent.get(key, {}).values()), None) or _Table(*numbers, device)
        _captured[id(known)] = known
        return known
    # What another stream copies may not have arrived.
    of_streams = _recent.setdefault(key, {})
    if stream not in of_streams:
        of_streams[stream] = _Table(*numbers, device)
    _recent.move_to_end(key)
    known = of_streams[stream]
    while len(_recent) > KEPT or (len(_recent) > 1 and _numbers() > KEPT_NUMBERS):
        _recent.popitem(last=False)
    return known


class _Table:
    """``build``'s result, with the memory of the host that a captured copy is made from at every replay."""

    def __init__(self, rows: Sequence[Sequence[int]], programs: Sequence[int], device: torch.device):
        first = accumulate(programs, initial=0)
        table = torch.tensor([[begin, *row] for begin, row in zip(first, rows, strict=False)], dtype=torch.int64)
        owners = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(programs, dtype=torch.int64))
        # An even number of entries, so that the second part begins at a multiple of ALIGNMENT as well.
        pad = torch.zeros(table.numel() % 2, dtype=torch.int64)
        split = table.numel() + pad.numel()
        self.host = _pinned(torch.cat([table.view(-1), pad, owners]), device)
        both = self.host.to(device, non_blocking=True)
        self.table, self.owners = both[:split], both[split:]


# The tables of an optimizer's steps with the few addresses that an allocator gives gradients in turn, and of a large
# model no more than 16 MiB of them.
KEPT = 64
KEPT_NUMBERS = 1 << 21
_recent: OrderedDict[tuple, dict[int, _Table]] = OrderedDict()
_captured: dict[int, _Table | Tensor] = {}
_lock = threading.Lock()


def _numbers() -> int:
    return sum(each.host.numel() for of_streams in _recent.values() for each in of_streams.values())


def _stream(device: torch.device) -> tuple[int, bool]:
    """The stream that launches go to, by its number, and whether it is being captured into a graph."""
    if device.type != "cuda":
        return 0, False
    with on_device(device):
        return torch.cuda.current_stream().cuda_stream, torch.cuda.is_current_stream_capturing()


def check_weights(name: str, ws: Sequence[Tensor], masks: Sequence[Tensor | None], keeps: Sequence[Tensor | None]):
    """TypeError, ValueError: not tensors of one of ``DTYPES`` on one device, with masks of their size."""
    for what, given in (("masks", masks), ("keeps", keeps)):
        if len(given) != len(ws):
            raise ValueError(f"{name}: {what}: expected {len(ws)}, got {len(given)}")
    for i, (w, mask, keep) in enumerate(zip(ws, masks, keeps, strict=True)):
        at = f"[{i}]" if len(ws) > 1 else ""
        check_floats(f"{name}: w{at}", w, ws[0])
        if w.dim() == 0:
            raise ValueError(f"{name}: w{at}: expected rank ≥ 1, got a scalar")
        checks.size(f"{name}: rows of w{at}", w.shape[0], most=checks.MOST)
        for what, bits in (("mask", mask), ("keep", keep)):
            if bits is not None:
                check_bits(f"{name}: {what}{at}", bits, w)


def check_floats(name: str, t: Tensor, like: Tensor) -> None:
    """TypeError, ValueError: not one of ``DTYPES``, or on another device or of another dtype than ``like``."""
    if t.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {t.dtype}")
    if t.dtype != like.dtype:
        raise TypeError(f"{name}: expected {like.dtype} as the first one, got {t.dtype}")
    if t.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device} as the first one, got {t.device}")


def check_bits(name: str, bits: Tensor, w: Tensor) -> None:
    """TypeError, ValueError: not uint8 [ceil(numel/8)], contiguous, beside ``w``."""
    if bits.dtype != torch.uint8:
        raise TypeError(f"{name}: expected uint8, got {bits.dtype}")
    if list(bits.shape) != [cdiv(w.numel(), 8)]:
        raise ValueError(
            f"{name}: expected shape [{cdiv(w.numel(), 8)}] for {w.numel()} weights, got {list(bits.shape)}"
        )
    if not bits.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {bits.stride()}")
    if bits.device != w.device:
        raise ValueError(f"{name}: expected a tensor on {w.device}, got {bits.device}")


# --- the device's side ------------------------------------------------------------------------------------------------


@triton.jit
def to_pointer(location, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer to ``DTYPE`` from the int64 of a table."""
    pointer = location.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def to_weights(location, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer to the bits of weights: int32 for float32, int16 for the others."""
    if DTYPE == tl.float32:
        return to_pointer(location, tl.int32, ALIGNED)
    else:
        return to_pointer(location, tl.int16, ALIGNED)


@triton.jit
def my_chunk(table, owners, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """This program's row of the table, the first of its weights, and how many they are (column 1: the numel)."""
    program = tl.program_id(0)
    row = table + tl.load(owners + program) * COLUMNS
    first = (program - tl.load(row)) * CHUNK
    return row, first, tl.minimum(tl.load(row + 1) - first, CHUNK)


@triton.jit
def load(pointer, inside, FULL: tl.constexpr):
    """A tile: where it is known to be FULL without a mask, which would cost one instruction an element."""
    if FULL:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=inside, other=0)


@triton.jit
def store(pointer, value, inside, FULL: tl.constexpr):
    """What ``load`` is, for writing."""
    if FULL:
        tl.store(pointer, value)
    else:
        tl.store(pointer, value, mask=inside)


@triton.jit
def load_bytes(location, first, left, OTHER: tl.constexpr, FULL: tl.constexpr, GROUPS: tl.constexpr):
    """[GROUPS] bytes of a mask of one bit a weight, from weight ``first`` on, as int32; OTHER where there is none."""
    groups = tl.arange(0, GROUPS)
    pointer = to_pointer(location, tl.uint8, False) + first // 8 + groups
    present = groups >= 0
    if not FULL:
        present = groups * 8 < left
    return tl.load(pointer, mask=present & (location != 0), other=OTHER).to(tl.int32)


@triton.jit
def spread(byte):
    """The bits of [GROUPS] bytes as bool [GROUPS, 8]."""
    return ((byte[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0


@triton.jit
def gather(bits):
    """The inverse of ``spread``: uint8 [GROUPS]."""
    return tl.sum(bits.to(tl.int32) << tl.arange(0, 8)[None, :], axis=1).to(tl.uint8)


@triton.jit
def positions(GROUPS: tl.constexpr):
    """[GROUPS, 8]: where the weights of a tile lie in it."""
    return tl.arange(0, GROUPS)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def rows_in(first, length, GROUPS: tl.constexpr):
    """int32 [GROUPS, 8]: the rows of a tile's weights, counted from that of the first; a row has ``length``."""
    place = positions(GROUPS)
    column = first % length
    if length >= GROUPS * 8:
        # At most one row ends in the tile.
        rows = (column + place >= length).to(tl.int32)
    else:
        rows = (column.to(tl.int32) + place) // length.to(tl.int32)
    return rows


@triton.jit
def widen(bits, DTYPE: tl.constexpr):
    """Bits of weights (``to_weights``) as the bits of the same values in float32, int32."""
    if DTYPE == tl.float32:
        return bits
    elif DTYPE == tl.bfloat16:
        return bits.to(tl.int32) << 16
    else:
        return bits.to(tl.float16, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 bits (int32), rounded to nearest even, as bits of ``DTYPE`` for ``to_weights``."""
    if DTYPE == tl.float32:
        return x
    elif DTYPE == tl.float16:
        return x.to(tl.float32, bitcast=True).to(tl.float16).to(tl.int16, bitcast=True)
    elif _INTERPRETED:
        # The interpreter cuts off instead of rounding.
        up = x + 0x7FFF + ((x >> 16) & 1)
        nan = (x & _MAGNITUDE) > 0x7F800000
        return (tl.where(nan, x | 0x400000, up) >> 16).to(tl.int16)
    else:
        return x.to(tl.float32, bitcast=True).to(tl.bfloat16).to(tl.int16, bitcast=True)


@triton.jit
def random_keys(index, seed):
    """reference.random_keys: 31 bits of splitmix64 of (seed, flat index), as int32."""
    z = (index + 1).to(tl.uint64) * 0x9E3779B97F4A7C15 + seed.to(tl.uint64)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return ((z ^ (z >> 31)) >> 33).to(tl.int32)
