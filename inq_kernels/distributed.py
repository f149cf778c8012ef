"""Weights that several processes hold together: DTensors, each rank with some of the rows, as FSDP2 makes them.

A portion is decided from integer histograms that are summed over the ranks, so no weight is ever gathered; and since
integer sums do not depend on their order, n1 and what is frozen are those of one process, bit for bit. Which weights
are tied, and which ranks the random partition gives them, goes by their flat index in the whole weight.

All ranks that share a weight call these functions together, as they do the collectives of torch.distributed.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import reference
from .format import N1_ZERO_ROW, Format

# A radix select's digit: a histogram of 2^11 bins, 16 KiB a weight and pass on the wire.
_DIGIT_BITS = 11
# Exponents of quantized weights lie well within ±_OCTAVES.
_OCTAVES = 256

_op = torch.ops.inq


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor. Importing that class takes a while: where nobody has, there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory: all of it, or a DTensor's local part."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, whose names do not depend on how it is trained: DistributedDataParallel's is its ``module``."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def reshard(model: nn.Module) -> None:
    """Give the modules of FSDP2 their sharded parameters back: after a forward pass alone, such as an evaluation, the
    root's are whole copies, which the next forward pass would use whatever was written into the parameters since.

    Raises:
        ValueError: the model is FSDP1's, whose parameters are not the weights.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for name, module in model.named_modules():
        if isinstance(module, fsdp.FullyShardedDataParallel):
            raise ValueError(
                f"module {name!r}: expected FSDP2 (torch.distributed.fsdp.fully_shard), got FullyShardedDataParallel, "
                "which flattens weights into one parameter"
            )
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


@dataclass(frozen=True, eq=False)
class Rows:
    """Which rows of a weight this process holds: ``count`` from row ``first`` on, of ``shape[0]``.

    ``mesh_dim``: the dimension of the DTensor's mesh that the rows are split over; None if each rank holds all.
    """

    mesh: Any
    placements: tuple
    mesh_dim: int | None
    shape: tuple[int, ...]
    first: int
    count: int

    @classmethod
    def of(cls, where: str, weight: Tensor) -> Rows | None:
        """None for a weight that is no DTensor.

        Raises:
            ValueError: it is one that is split otherwise than by rows over one dimension of its mesh, or this process
                is not in the mesh.
        """
        if not is_sharded(weight):
            return None
        shard = sys.modules["torch.distributed.tensor"].Shard
        mesh, placements = weight.device_mesh, tuple(weight.placements)
        split = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
        if len(split) > 1 or any(type(placements[i]) is not shard or placements[i].dim != 0 for i in split):
            raise ValueError(
                f"{where}: expected a weight that is whole or split by rows, over one dimension of a mesh (Shard(0)), "
                f"got one with {placements}: shard it on dimension 0, or skip the layer"
            )
        if mesh.get_coordinate() is None:
            raise ValueError(f"{where}: expected a weight whose mesh {mesh} holds this process, got another's")
        first, count = 0, weight.shape[0]
        if split:
            # torch.chunk's sizes: the last ranks may hold fewer rows, or none.
            chunk = -(-count // mesh.size(split[0]))
            first = min(mesh.get_local_rank(split[0]) * chunk, count)
            count = min(chunk, count - first)
        rows = cls(mesh, placements, split[0] if split else None, tuple(weight.shape), first, count)
        if (got := local_part(weight).shape[0]) != count:
            raise ValueError(f"{where}: expected {count} rows on this rank, as torch.chunk splits them, got {got}")
        return rows

    @property
    def group(self) -> Any:
        """The process group over which the rows are split; None where they are not."""
        return None if self.mesh_dim is None else self.mesh.get_group(self.mesh_dim)

    @property
    def first_index(self) -> int:
        """The flat index in the whole weight of the first value here."""
        return self.first * math.prod(self.shape[1:])

    def take(self, whole: Tensor) -> Tensor:
        """The rows of this process of a plain tensor [N, …]."""
        return whole[self.first : self.first + self.count]

    def wrap(self, local: Tensor) -> Tensor:
        """This process's rows [count, …] as its part of a DTensor [N, …], split as the weight is."""
        tensor = sys.modules["torch.distributed.tensor"].DTensor
        shape = torch.Size((self.shape[0], *local.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return tensor.from_local(local, self.mesh, self.placements, run_check=False, shape=shape, stride=stride)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of ``value`` over the ranks that hold the rows; a new tensor on its device."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def max(self, value: Tensor) -> Tensor:
        """The largest of each element over the ranks that hold the rows; a new tensor on its device."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def before(self, value: Tensor) -> Tensor:
        """The sum of ``value`` [L], int64, over the ranks whose rows come before those of this one."""
        if self.group is None:
            return torch.zeros_like(value)
        rank = self.mesh.get_local_rank(self.mesh_dim)
        each = value.new_zeros(self.mesh.size(self.mesh_dim), *value.shape)
        each[rank] = value
        return self.sum(each)[:rank].sum(0)

    def _reduce(self, value: Tensor, how: Any) -> Tensor:
        if self.group is None:
            return value.clone()
        # Parameters that are offloaded to the CPU still have the mesh of their GPUs.
        there = value.to(self.mesh.device_type, copy=True)
        dist.all_reduce(there, how, self.group)
        return there.to(value.device)

    def sum_histogram(self, histogram: dict[int, int]) -> dict[int, int]:
        """Counts by exponent, summed over the ranks; without the zeros."""
        counts = torch.zeros(2 * _OCTAVES, dtype=torch.int64)
        for exponent, count in histogram.items():
            counts[exponent + _OCTAVES] = count
        return {i - _OCTAVES: count for i, count in enumerate(self.sum(counts).tolist()) if count}


# --- masks ------------------------------------------------------------------------------------------------------------


def row_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """One bit a weight, in flat order, as uint8 [N, ceil(K/8)]: each row begins in a byte of its own, and so can be on
    a rank of its own."""
    n, k = shape[0], math.prod(shape[1:])
    flags = reference.unpack_bits(bits, (n, k))
    padded = torch.nn.functional.pad(flags.to(torch.uint8), (0, -k % 8))
    return reference.pack_bits(padded).view(n, -(-k // 8))


def flat_bits(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of ``row_bits``: uint8 [ceil(numel/8)]."""
    n, k = shape[0], math.prod(shape[1:])
    flags = reference.unpack_bits(rows.reshape(-1), (n, rows.shape[1] * 8))[:, :k]
    return reference.pack_bits(flags.contiguous())


# --- a portion --------------------------------------------------------------------------------------------------------


def freeze_portion_(
    rows: Sequence[Rows],
    ws: Sequence[Tensor],
    masks: Sequence[Tensor],
    n1s: Sequence[Tensor],
    keeps: Sequence[Tensor | None],
    counts: Sequence[int],
    derive: bool,
    fmt: Format,
    random: bool,
    seeds: Sequence[int],
) -> None:
    """``reference.freeze_portion_`` of weights of one dtype that the same ranks hold together, by rows.

    ``ws``, ``masks``, ``n1s`` and ``keeps`` are of this rank's rows, perhaps none; ``counts`` are of the whole weights.
    """
    seeds = [reference.seed_at(seed, each.first_index) for seed, each in zip(seeds, rows, strict=True)]
    thresholds = partition_thresholds(rows, ws, masks, keeps, counts, random, seeds)
    if derive:
        _exponents_(rows, ws, n1s, fmt)
    for w, mask, n1, threshold, keep, seed in zip(ws, masks, n1s, thresholds, keeps, seeds, strict=True):
        if w.numel():
            _op.quantize_with_mask_(w, mask, n1, threshold, keep, fmt.bits, fmt.levels, random, seed)


def partition_thresholds(
    rows: Sequence[Rows],
    ws: Sequence[Tensor],
    masks: Sequence[Tensor],
    keeps: Sequence[Tensor | None],
    counts: Sequence[int],
    random: bool,
    seeds: Sequence[int],
) -> Tensor:
    """``reference.partition_threshold`` of weights that the same ranks hold together: int64 [len(ws), 2] = (key, ties).

    ``ties`` are how many of this rank's weights with just that key to take: ties go to the lower flat index of the
    whole weight, so to the ranks before this one first. ``seeds`` are as ``reference.seed_at`` shifts them to this
    rank's first weight. Each of ``counts`` is at most the number of candidates on all ranks.
    """
    left = torch.tensor(counts, dtype=torch.int64, device=ws[0].device)
    none, key = left == 0, torch.zeros_like(left)
    free = [_candidates(*each) for each in zip(ws, masks, keeps, strict=True)]
    high = 31 if random else 8 * ws[0].element_size() - 1
    here = left
    while high > 0:
        # The digit of bits [low, high), among the candidates whose higher bits are those found so far.
        low = max(high - _DIGIT_BITS, 0)
        each = [_digits(w, f, random, s, k, low, high) for w, f, s, k in zip(ws, free, seeds, key, strict=True)]
        mine = torch.stack(each)
        whole = rows[0].sum(mine)
        above = whole.flip(1).cumsum(1).flip(1) - whole
        found = (above < left[:, None]) & (above + whole >= left[:, None])
        digit = found.int().argmax(1, keepdim=True)
        left = left - above.gather(1, digit)[:, 0]
        key = key << (high - low) | digit[:, 0]
        here = mine.gather(1, digit)[:, 0]
        high = low
    ties = (left - rows[0].before(here)).clamp(min=0)
    key = torch.where(none, torch.iinfo(torch.int64).max, key)
    return torch.stack([key, torch.where(none, 0, ties)], dim=1)


def _candidates(w: Tensor, mask: Tensor, keep: Tensor | None) -> Tensor:
    """Flat: the weights that are neither frozen nor pruned."""
    free = ~reference.unpack_bits(mask, (w.numel(),))
    return free if keep is None else free & reference.unpack_bits(keep, (w.numel(),))


def _digits(w: Tensor, free: Tensor, random: bool, seed: int, prefix: Tensor, low: int, high: int) -> Tensor:
    """How many of the candidates of each digit there are here, among those whose bits from ``high`` are ``prefix``."""
    counts = torch.zeros(1 << (high - low), dtype=torch.int64, device=w.device)
    flat = w.reshape(-1)
    for start in range(0, flat.numel(), reference.CHUNK):
        part = slice(start, start + reference.CHUNK)
        keys = reference.partition_keys(flat[part], random, reference.seed_at(seed, start))
        keys = keys[free[part] & (keys >> high == prefix)]
        counts += torch.bincount((keys >> low) & (1 << (high - low)) - 1, minlength=counts.numel())
    return counts


def _exponents_(rows: Sequence[Rows], ws: Sequence[Tensor], n1s: Sequence[Tensor], fmt: Format) -> None:
    """``reference.exponents`` of weights that the same ranks hold together, written into ``n1s`` [count, 1]."""
    if fmt.granularity == "channel":
        # Every row is on one rank.
        for w, n1 in zip(ws, n1s, strict=True):
            if w.numel():
                n1.copy_(_op.exponents(w, fmt.bits, fmt.levels, fmt.granularity, fmt.exponent))
        return
    dtype, zero = ws[0].dtype, torch.zeros((), dtype=torch.int64, device=ws[0].device)
    # The bits of |w| have its order.
    keys = [reference.partition_keys(w.abs().amax().view(1), False, 0)[0] if w.numel() else zero for w in ws]
    largest = rows[0].max(torch.stack(keys))
    lo, hi = reference.exponent_limits(dtype)
    base = reference.max_exponents(reference.from_keys(largest, dtype))
    n1 = base.clamp(lo, hi)
    if fmt.exponent == "mse":
        places = [reference.mse_bins(each, lo, hi, fmt) for each in base.split(1)]
        each = [reference.mse_histogram(w.reshape(1, -1), p[1], p[2]).view(-1) for w, p in zip(ws, places, strict=True)]
        whole = rows[0].sum(torch.cat(each)).split([3 * bins for _, _, bins in places])
        chosen = [
            reference.mse_choice(part.view(3, 1, bins), top, floor, lo, fmt, dtype)
            for part, (top, floor, bins) in zip(whole, places, strict=True)
        ]
        n1 = torch.cat(chosen)
    n1 = torch.where(largest == 0, N1_ZERO_ROW, n1).to(torch.int8)
    for out, value in zip(n1s, n1, strict=True):
        out.copy_(value.expand_as(out))


# --- all processes of the job -----------------------------------------------------------------------------------------


class PeerError(RuntimeError):
    """Another rank failed in what all ranks do together; its own error says why. Nothing is changed on this one."""


class Ranks:
    """All processes of the job; one alone where torch.distributed is not initialised."""

    def __init__(self) -> None:
        self.joined = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if self.joined else 1
        self.rank = dist.get_rank() if self.joined else 0

    def _device(self) -> torch.device:
        if "cpu:" in dist.get_backend_config():
            return torch.device("cpu")
        return torch.accelerator.current_accelerator()

    def all(self, value: int) -> list[int]:
        """The int64 ``value`` of every rank, by rank."""
        if not self.joined:
            return [value]
        each = torch.zeros(self.size, dtype=torch.int64, device=self._device())
        each[self.rank] = value
        dist.all_reduce(each)
        return each.tolist()

    def broadcast(self, text: str) -> str:
        """Rank 0's ``text``."""
        if not self.joined:
            return text
        data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self._device())
        size = self.all(data.numel())[0]
        if size == 0:
            return ""
        if self.rank:
            data = torch.zeros(size, dtype=torch.uint8, device=self._device())
        dist.broadcast(data, 0)
        return bytes(data.tolist()).decode()

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """If the body fails on one rank, it fails on all: with its own error there, with PeerError elsewhere.

        The body must do its collectives, if it has any, on every rank or on none.
        """
        try:
            yield
        except Exception:
            self.all(1)
            raise
        if failed := [rank for rank, bad in enumerate(self.all(0)) if bad]:
            raise PeerError(f"{what}: expected all {self.size} ranks to succeed, got an error on rank {failed[0]}")
