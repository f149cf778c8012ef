"""What test_distributed.py runs on several ranks: ``python tests/distributed_ranks.py DIR GROUPS`` prints, as JSON, the
traceback of each scenario that failed, by group, rank and scenario.

Ranks are forked from this process, which imports torch but computes nothing, so that a rank costs no second import.
They speak gloo, over a file. A scenario asserts; on all ranks at the same place, or the others time out.
"""

import contextlib
import json
import math
import os
import random
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.nn.functional as F
from support import candidates, kinds, random_masks, same_bits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import inq_kernels as inq
from inq_kernels import distributed, files, reference, sharded

PARTS = 2
PORTIONS = (0.3, 0.7, 1.0)
STEPS = 2  # after each portion


# --- a small training -------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """Rows that two ranks share unevenly, one row that only rank 0 holds, and a layer that is skipped."""

    def __init__(self, width=9):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 5, 3)
        self.bn = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 7, 3, bias=False)
        self.drop = nn.Dropout(0.0)
        self.fc = nn.Linear(112, width)
        self.last = nn.Linear(width, 1)
        self.skipped = nn.Linear(1, 3)

    def forward(self, x):
        x = self.drop(F.relu(self.conv2(F.relu(self.bn(self.conv(x))))))
        return self.skipped(self.last(torch.tanh(self.fc(x.flatten(1)))))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=True),
    "inq-sgd": lambda p: inq.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "inq-adamw": lambda p: inq.optim.AdamW(p, 0.01, weight_decay=0.1),
}


def wrapped(model, wrap):
    if wrap == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if wrap == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in (model.conv, model.fc, model.last):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


class Training:
    """A whole schedule: model, optimizer, schedule and run, wrapped as ``wrap`` says; "none" is one process."""

    def __init__(self, wrap, optimizer="sgd", fmt=None, partition="magnitude", prune=False, width=9):
        plain = Wide(width)
        masks = {}
        if prune:
            generator = torch.Generator().manual_seed(5)
            masks["conv2"] = torch.rand(plain.conv2.weight.shape, generator=generator) < 0.7
        self.wrap, self.plain, self.model = wrap, plain, wrapped(plain, wrap)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)
        self.run = inq.INQ(
            self.model, self.optimizer, fmt or inq.Format(4), PORTIONS, partition, skip="skipped", prune_masks=masks,
            lr_schedulers=self.scheduler, seed=7,
        )  # fmt: skip
        self.step = self.moved = 0
        data = torch.Generator().manual_seed(1)
        self.x, self.t = torch.randn(96, 1, 8, 8, generator=data), torch.randn(96, 3, generator=data)

    def held(self):
        """The weights here that must not move now, and their values."""
        result = {}
        for name in self.run.formats:
            weight = distributed.local_part(self.plain.get_submodule(name).weight)
            frozen = distributed.local_part(self.run.frozen(name))
            result[name] = (frozen, weight.detach().clone())
        return result

    def one_step(self):
        rank, size = (dist.get_rank(), dist.get_world_size()) if self.wrap != "none" else (0, 1)
        before = self.held()
        index = torch.randint(96, (16,), generator=torch.Generator().manual_seed(self.step)).chunk(PARTS)
        own = index[rank::size]
        self.optimizer.zero_grad()
        for part in own:
            (F.mse_loss(self.model(self.x[part]), self.t[part]) / len(own)).backward()
        for name, (frozen, _) in before.items():
            grad = distributed.local_part(self.plain.get_submodule(name).weight.grad)
            self.moved += int((grad[frozen] != 0).sum())
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        for name, (frozen, values) in before.items():
            now = distributed.local_part(self.plain.get_submodule(name).weight).detach()
            self.moved += int((now[frozen] != values[frozen]).sum())

    def finish(self, at=None, then=None):
        """To the end; before step ``at``, ``then()`` is called."""
        for portion in self.run:
            while self.step < STEPS * (PORTIONS.index(portion) + 1):
                if self.step == at:
                    then()
                self.one_step()
        assert self.moved == 0, "a frozen weight or its gradient moved"
        return self.weights()

    def weights(self):
        """All parameters, whole."""
        distributed.reshard(self.plain)
        return {name: whole(p) for name, p in self.plain.named_parameters()}


def whole(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if distributed.is_sharded(tensor) else tensor).clone()


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert same_bits(value, b[name]), name


def everywhere(value):
    """The same on every rank?"""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return all(v == value for v in values)


@contextlib.contextmanager
def raises(kind, text):
    """pytest.raises, of a text."""
    with pytest.raises(kind) as info:
        yield
    assert text in str(info.value), f"expected {text!r} in {info.value}"


def state_of(t):
    """Everything of a training that a failed load must leave alone."""
    return t.weights(), t.optimizer.state_dict(), t.run.state_dict(), torch.get_rng_state()


def flattened(value):
    if isinstance(value, torch.Tensor):
        return whole(value)
    if isinstance(value, dict):
        return {k: flattened(v) for k, v in value.items()}
    return [flattened(v) for v in value] if isinstance(value, (list, tuple)) else value


def assert_equal(a, b):
    if isinstance(a, torch.Tensor):
        assert same_bits(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_equal(left, right)
    else:
        assert a == b


# --- scenarios on two ranks -------------------------------------------------------------------------------------------

SCHEDULES = (
    {"optimizer": "sgd"},
    {"optimizer": "adamw", "fmt": inq.Format(3, granularity="channel"), "partition": "random"},
    {"optimizer": "inq-sgd", "fmt": inq.Format.paper(5), "partition": "random", "prune": True},
    {"optimizer": "inq-adamw", "fmt": inq.Format(2, "dense"), "prune": True},
)


def one_hash(folder):
    """One process, DDP and FSDP2 end in the same bits; n1, masks and reports agree on the way."""
    for arguments in SCHEDULES:
        trainings = {wrap: Training(wrap, **arguments) for wrap in ("none", "ddp", "fsdp2")}
        found = {wrap: t.finish() for wrap, t in trainings.items()}
        for wrap in ("ddp", "fsdp2"):
            assert_same(found["none"], found[wrap])
        alone, run = trainings["none"].run, trainings["fsdp2"].run
        for name in run.formats:
            assert torch.equal(whole(run.n1(name)), alone.n1(name))
            assert torch.equal(whole(run.frozen(name)), alone.frozen(name))
            w = found["none"][f"{name}.weight"]
            assert torch.equal(inq.quantize(w, run.formats[name], alone.n1(name)), w)
        for a, b in zip(alone.report(), run.report(), strict=True):
            assert (a.frozen, a.numel, a.n1, a.zeros, a.histogram) == (b.frozen, b.numel, b.n1, b.zeros, b.histogram)
            assert math.isclose(a.sqnr_db, b.sqnr_db, rel_tol=1e-9)
        for t in trainings.values():
            t.run.close()


def names_do_not_depend_on_ddp(folder):
    """The random partition goes by layers' names: given the wrapper or the module, it is the same one."""
    given, inner = Training("ddp", partition="random"), Training("none", partition="random")
    assert list(given.run.formats) == list(inner.run.formats)
    next(iter(given.run)), next(iter(inner.run))
    assert torch.equal(given.run.frozen("fc"), inner.run.frozen("fc"))


class Exchanged(TorchDispatchMode):
    """What this rank gives to collectives meanwhile: (operator, how many values)."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.found.append((func.name(), sum(tensor.numel() for tensor in tensors)))
        return func(*args, **(kwargs or {}))


def nothing_is_gathered(folder):
    """To choose n1 and what freezes, and to report, ranks sum up histograms: as many values for wide layers as for
    narrow ones, and nothing else."""
    found = {}
    for partition, fmt in (("magnitude", inq.Format(4)), ("random", inq.Format(3, granularity="channel"))):
        for width in (9, 900):
            t = Training("fsdp2", fmt=fmt, partition=partition, width=width)
            with Exchanged() as exchanged:
                for _ in t.run:
                    pass
                t.run.report()
            found[width] = exchanged.found
            t.run.close()
        assert found[9] == found[900]
        assert {name for name, _ in found[9]} == {"c10d::allreduce_"}, found[9]
        assert len(found[9]) > len(PORTIONS)


def after_an_evaluation(folder):
    """FSDP2 leaves the root's weights whole after a forward pass alone: neither portions nor the next may use those."""
    t, alone = Training("fsdp2"), Training("none")
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        first = t.model.eval()(x)
        for _ in zip(t.run, alone.run, strict=True):
            got = t.model(x)
            assert torch.equal(got, alone.model.eval()(x))
            assert not torch.equal(got, first)
    # A run made just then finds the sharded weights.
    t.run.close()
    again = inq.INQ(t.model, t.optimizer, inq.Format(4), skip="skipped")
    assert again.rows["conv2"] is not None


def surgery(folder):
    """Dynamic network surgery under DDP ends in the bits of one process; FSDP2's weights are refused by name."""
    ends = {}
    for wrap in ("none", "ddp"):
        plain = Wide()
        model = wrapped(plain, wrap)
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        run = inq.DNS(model, optimizer, 0.3, iter_stop=9, gamma=0.1, skip="skipped")
        rank, size = (dist.get_rank(), dist.get_world_size()) if wrap == "ddp" else (0, 1)
        data = torch.Generator().manual_seed(1)
        for _ in range(10):
            x, t = torch.randn(16, 1, 8, 8, generator=data), torch.randn(16, 3, generator=data)
            own = torch.arange(16).chunk(PARTS)[rank::size]
            optimizer.zero_grad()
            for part in own:
                (F.mse_loss(model(x[part]), t[part]) / len(own)).backward()
            optimizer.step()
        report = run.report()
        assert sum(r.spliced for r in report) > 0, "the test proves less unless weights come back"
        assert 1 < report[0].updates < 9, "and unless the lottery decides"
        ends[wrap] = ({n: whole(p) for n, p in plain.named_parameters()}, run.masks(), str(report))
        run.close()
    assert_equal(*(dict(enumerate(ends[wrap])) for wrap in ("none", "ddp")))
    sharded_model = wrapped(Wide(), "fsdp2")
    with raises(ValueError, "weight of layer 'conv': expected a plain tensor, got a DTensor"):
        inq.DNS(sharded_model, OPTIMIZERS["sgd"](sharded_model.parameters()), 0.3, iter_stop=9)


def wrong_models(folder):
    """NaN on one rank is everybody's error; weights that are not split by rows, and FSDP1, are refused by name."""
    t = Training("fsdp2")
    weight = distributed.local_part(t.plain.fc.weight)
    if dist.get_rank() == 1:
        weight[0, 3] = math.nan
    before = t.weights()
    with raises(ValueError, "weight of layer 'fc': expected finite values, got 1 NaN and 0 Inf of 1008"):
        next(iter(t.run))
    assert t.run.portion == 0
    for name, value in t.weights().items():
        assert torch.equal(value.nan_to_num(9.0), before[name].nan_to_num(9.0))
    t.run.close()
    mesh = init_device_mesh("cpu", (2,))
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [Shard(1)]))
    with raises(ValueError, "split by rows"):
        inq.INQ(linear, torch.optim.SGD(linear.parameters(), 0.1), inq.Format(4))
    flat = FullyShardedDataParallel(nn.Sequential(nn.Linear(4, 4)), device_id=torch.device("cpu"))
    with raises(ValueError, "expected FSDP2"):
        inq.INQ(flat, torch.optim.SGD(flat.parameters(), 0.1), inq.Format(4))
    whole_mask = Training("fsdp2")
    whole_mask.run.close()
    masks = {"fc": distribute_tensor(torch.ones(9, 112, dtype=torch.bool), mesh, [Shard(0)])}
    with raises(ValueError, "a plain bool tensor"):
        inq.INQ(whole_mask.model, whole_mask.optimizer, inq.Format(4), prune_masks=masks)


def wrong_states(folder):
    """A state of other sharding is refused, and nothing is changed."""
    t, alone = Training("fsdp2"), Training("none")
    next(iter(t.run)), next(iter(alone.run))
    before = flattened(state_of(t))
    with raises(ValueError, "layer 'conv'"):
        t.run.load_state_dict(alone.run.state_dict())
    assert_equal(flattened(state_of(t)), before)


def checkpoints(folder):
    """Saved in the middle of a portion by one kind of training, taken over by each kind: the same end. Random states
    and ``extra`` are each rank's own."""
    rank = dist.get_rank()
    for saved_by, arguments in (("fsdp2", SCHEDULES[3]), ("ddp", SCHEDULES[1])):
        path = folder / saved_by
        first = Training(saved_by, **arguments)
        torch.manual_seed(100 + rank)
        random.seed(200 + rank)

        def save(first=first, path=path):
            extra = {"step": first.step, "rank": rank, "own": torch.full((rank + 1,), 7.0)}
            inq.save_sharded(path, first.model, first.optimizer, first.run, extra)
            first.drawn = (float(torch.rand(())), random.random())
            first.mean = first.plain.bn.running_mean.clone()
            dist.broadcast(first.mean, 0)

        end = first.finish(at=3, then=save)
        assert_same(Training("none", **arguments).finish(), end)
        for loaded_by in ("fsdp2", "ddp"):
            other = Training(loaded_by, **arguments)
            for p in other.model.parameters():
                distributed.local_part(p).data.fill_(0.5)
            extra = inq.load_sharded(path, other.model, other.optimizer, other.run)
            assert (float(torch.rand(())), random.random()) == first.drawn
            assert torch.equal(other.plain.bn.running_mean, first.mean), "expected rank 0's"
            assert extra["rank"] == rank
            assert torch.equal(extra["own"], torch.full((rank + 1,), 7.0))
            other.step = extra["step"]
            assert other.step == 3
            assert other.run.portion == PORTIONS[1]
            assert_same(end, other.finish())
        # As the next one is saved, the old one is replaced, whole.
        for step in (98, 99):
            inq.save_sharded(folder / "again", first.model, first.optimizer, first.run, {"step": step})
        assert inq.load_sharded(folder / "again", first.model, first.optimizer, first.run) == {"step": 99}
        dist.barrier()
        assert [p.name for p in folder.iterdir() if ".tmp" in p.name] == []
        dist.barrier()
        if rank == 0:
            # For the test itself, which loads the checkpoint in one process.
            files.write_safetensors(folder / f"{saved_by}-end.safetensors", end, {})
    # Tensors only: no pickle by whatever name.
    kept = {p.suffix for p in (folder / "fsdp2").iterdir()}
    assert kept == {".json", ".safetensors"}


def saved_and_gone_on(path):
    """A run of which there is a checkpoint, one step further."""
    t = Training("fsdp2")
    next(iter(t.run))
    t.one_step()
    inq.save_sharded(path, t.model, t.optimizer, t.run, {"step": 1})
    t.one_step()
    return t


def damaged_checkpoints(folder):
    """What one rank finds is an error on all, and changes nothing on any."""
    rank, path = dist.get_rank(), folder / "damaged"
    t = saved_and_gone_on(path)
    before = flattened(state_of(t))

    def flip():
        # The last byte of the second shard: rank 1 has it in its share.
        shard = sorted(path.glob("shard-*"))[1]
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)

    def refused(damage, kind, text, other):
        if rank == 0:
            damage()
        dist.barrier()
        with raises(*((kind, text) if rank == 1 else (other, "expected"))):
            inq.load_sharded(path, t.model, t.optimizer, t.run)
        assert_equal(flattened(state_of(t)), before)
        dist.barrier()

    refused(flip, inq.CheckpointError, "damaged data", inq.PeerError)
    refused(lambda: flip() or (path / "shard-00009.safetensors").write_bytes(b""), inq.CheckpointError,
            "expected the files", inq.CheckpointError)  # fmt: skip
    wide = Training("fsdp2", width=8)
    if rank == 0:
        (path / "shard-00009.safetensors").unlink()
    dist.barrier()
    with raises(ValueError, "model: fc.weight: expected torch.float32 [8, 112], got torch.float32 [9, 112]"):
        inq.load_sharded(path, wide.model, wide.optimizer, wide.run)
    other = Training("fsdp2", partition="random")
    before = flattened(state_of(other))
    with raises(ValueError, "partition: expected 'random'"):
        inq.load_sharded(path, other.model, other.optimizer, other.run)
    assert_equal(flattened(state_of(other)), before)


def taking_over_fails(folder):
    """What fails on one rank after all checks, such as for want of memory, is undone on all, and nobody waits."""
    rank, path = dist.get_rank(), folder / "taken"
    t = saved_and_gone_on(path)
    before, load, calls = flattened(state_of(t)), t.optimizer.load_state_dict, []

    def fails_once(state):
        calls.append(state)
        if rank == 1 and len(calls) == 1:
            raise torch.OutOfMemoryError("out of memory")
        load(state)

    t.optimizer.load_state_dict = fails_once
    with raises(*((torch.OutOfMemoryError, "out of memory") if rank == 1 else (inq.PeerError, "rank 1"))):
        inq.load_sharded(path, t.model, t.optimizer, t.run)
    assert_equal(flattened(state_of(t)), before)
    assert inq.load_sharded(path, t.model, t.optimizer, t.run) == {"step": 1}


def saving_fails(folder):
    """What fails on one rank fails on all, and the old checkpoint is still there."""
    rank, path = dist.get_rank(), folder / "failing"
    t = Training("fsdp2")

    def save(extra, to=path):
        inq.save_sharded(to, t.model, t.optimizer, t.run, extra)

    save({"step": 1})
    with raises(*((TypeError, "got object") if rank == 1 else (inq.PeerError, "rank 1"))):
        save({"step": 2, "bad": object() if rank == 1 else None})
    with raises(*((FileNotFoundError, "no such directory") if rank == 0 else (ValueError, "rank 0"))):
        save({"step": 2}, folder / "nowhere" / "run")
    # A full disk, where this rank writes its JSON; then where torch writes its tensors.
    write_text, writer = files.write_text, torch.distributed.checkpoint.HuggingFaceStorageWriter.write_data

    def full(*_, **__):
        raise OSError(28, "No space left on device", "somewhere")

    for place, name, old in (
        (files, "write_text", write_text),
        (torch.distributed.checkpoint.HuggingFaceStorageWriter, "write_data", writer),
    ):
        if rank == 1:
            setattr(place, name, full)
        try:
            with raises((OSError, inq.PeerError), "rank 1" if rank == 0 else "No space left"):
                save({"step": 2})
        finally:
            setattr(place, name, old)
    # Ranks that hold different tensors would mistake them for each other.
    if rank == 1:
        t.optimizer.state[t.plain.fc.weight]["more"] = torch.zeros(3)
    with raises(*((ValueError, "others on rank 1") if rank == 1 else (inq.PeerError, "rank 1"))):
        save({"step": 2})
    t.optimizer.state.clear()
    assert inq.load_sharded(path, t.model, t.optimizer, t.run) == {"step": 1}
    dist.barrier()
    assert [p.name for p in folder.iterdir() if ".tmp" in p.name] == []


PAIR = (
    *(one_hash, names_do_not_depend_on_ddp, nothing_is_gathered, after_an_evaluation, surgery),
    *(wrong_models, wrong_states, checkpoints, damaged_checkpoints, taking_over_fails, saving_fails),
)


# --- on four ranks ----------------------------------------------------------------------------------------------------

SHAPES = ((7, 5), (3, 2, 3, 3), (1, 9), (9, 17))
FORMATS = (
    *(inq.Format(4), inq.Format(2, "dense", granularity="channel"), inq.Format.paper(5)),
    inq.Format(3, granularity="channel", exponent="max"),
)


def decided(mesh, placements, dtype, fmt, partition, which, seed):
    """Two portions of weights of several shapes and kinds, decided together, against the definition on the whole."""
    narrow = torch.float32 if dtype == torch.float64 else dtype
    every = [
        # float64's lowest bits, too.
        (shape, kind, w if dtype == narrow else w.double() * (1 + 2.0**-45))
        for i, shape in enumerate(SHAPES)
        for kind, w in kinds(shape, narrow, seed + i).items()
    ]
    chance = random.Random(seed)
    every = chance.sample(every, 7)
    ws = [w.clone() for *_, w in every]
    masks, keeps = zip(*(random_masks(w.numel(), which, seed) for w in ws), strict=True)
    masks, keeps = list(map(torch.clone, masks)), list(keeps)
    for w, keep in zip(ws, keeps, strict=True):
        if keep is not None:
            w.masked_fill_(~reference.unpack_bits(keep, w.shape), 0.0)
    n1s = [torch.zeros(w.shape[0], 1, dtype=torch.int8) for w in ws]
    seeds = [chance.getrandbits(62) for _ in ws]
    rows = [distributed.Rows.of("w", distribute_tensor(w, mesh, placements)) for w in ws]

    def part(bits, i):
        return None if bits is None else reference.pack_bits(rows[i].take(reference.unpack_bits(bits, ws[i].shape)))

    mine = [
        [each.take(w).clone() for each, w in zip(rows, ws, strict=True)],
        [part(mask, i) for i, mask in enumerate(masks)],
        [each.take(n1).clone() for each, n1 in zip(rows, n1s, strict=True)],
        [part(keep, i) for i, keep in enumerate(keeps)],
    ]
    for derive in (True, False):
        free = [candidates(mask, keep, w.numel()) for mask, keep, w in zip(masks, keeps, ws, strict=True)]
        counts = [chance.choice((0, n // 3, n // 2, n)) for n in free]
        how = (fmt, partition == "random", seeds)
        reference.freeze_portion_(ws, masks, n1s, keeps, counts, derive, *how)
        distributed.freeze_portion_(rows, *mine, counts, derive, *how)
        for i, (shape, kind, _) in enumerate(every):
            where = (shape, kind, dtype, fmt, partition, which, derive)
            assert same_bits(mine[0][i], rows[i].take(ws[i])), where
            bits = rows[i].take(reference.unpack_bits(masks[i], shape))
            assert torch.equal(reference.unpack_bits(mine[1][i], bits.shape), bits), where
            assert torch.equal(mine[2][i], rows[i].take(n1s[i])), where


def decisions(folder):
    """Rows on four ranks, some of which hold none, and on two of two by two, which hold the same."""
    flat, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    seed = 0
    for i, dtype in enumerate((torch.float64, torch.float32, torch.bfloat16, torch.float16)):
        for j, fmt in enumerate(FORMATS):
            seed += 1
            partition = ("magnitude", "random")[(i + j) % 2]
            which = ("none", "half", "keep", "both")[seed % 4]
            mesh, placements = ((flat, [Shard(0)]), (square, [Replicate(), Shard(0)]))[seed % 3 == 0]
            decided(mesh, placements, dtype, fmt, partition, which, seed)


def chunks_of_one_rank(folder):
    """More weights than are counted at once."""
    before, reference.CHUNK = reference.CHUNK, 16
    try:
        mesh = init_device_mesh("cpu", (4,))
        for partition in ("magnitude", "random"):
            decided(mesh, [Shard(0)], torch.float32, inq.Format(4), partition, "both", 1)
    finally:
        reference.CHUNK = before


def hybrid_sharding(folder):
    """FSDP2 on a mesh of two by two, where two ranks hold the same rows: as one process."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "rows"))
    model, alone = Wide(), Wide()
    fully_shard(model, mesh=mesh)
    runs = [
        inq.INQ(m, torch.optim.SGD(m.parameters(), 0.1), inq.Format(4), PORTIONS, "random", skip="skipped")
        for m in (model, alone)
    ]
    for _ in zip(*runs, strict=True):
        for name in runs[0].formats:
            assert same_bits(whole(model.get_submodule(name).weight), alone.get_submodule(name).weight.detach())
            assert torch.equal(whole(runs[0].frozen(name)), runs[1].frozen(name))
    # Two ranks have the same rows: one of them writes them.
    inq.save_sharded(folder / "hybrid", model, runs[0].optimizer, runs[0])
    again = Wide()
    fully_shard(again, mesh=init_device_mesh("cpu", (4,)))
    run = inq.INQ(again, torch.optim.SGD(again.parameters(), 0.1), inq.Format(4), PORTIONS, "random", skip="skipped")
    inq.load_sharded(folder / "hybrid", again, run.optimizer, run)
    for name in run.formats:
        assert torch.equal(whole(run.frozen(name)), runs[1].frozen(name))
        assert same_bits(whole(again.get_submodule(name).weight), alone.get_submodule(name).weight.detach())


FOUR = (decisions, chunks_of_one_rank, hybrid_sharding)


# --- ranks that are killed --------------------------------------------------------------------------------------------

# (rank, step, place): who is killed with SIGKILL in each life, between its gradients and its step, or while saving:
# when its tensors are written, before the index is, or when the new directory is there and the old one not yet deleted.
LIVES = {
    "ddp": ((1, 2, "step"), (0, 4, "exchange"), None),
    "fsdp2": ((0, 2, "step"), (1, 3, "save"), (0, 5, "index"), None),
}


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def arm(t, place):
    """The next time that this rank comes to ``place``, it is killed."""
    if place == "step":
        t.optimizer.register_step_pre_hook(die)
    elif place == "save":
        sharded.file_sha256 = die
    elif place == "index":
        write_text = files.write_text
        files.write_text = lambda path, text: (die if path.name == files.TRAINING_INDEX else write_text)(path, text)
    else:
        exchange = files._exchange
        files._exchange = lambda *paths: die(exchange(*paths))


def life(folder, wrap, number, kill):
    """Train from the last checkpoint, saving after each step; the end is written to ``folder``."""
    t = Training(wrap, **SCHEDULES[1])
    path = folder / f"{wrap}-run"
    if path.exists():
        t.step = inq.load_sharded(path, t.model, t.optimizer, t.run)["step"]
    for portion in t.run:
        while t.step < STEPS * (PORTIONS.index(portion) + 1):
            if kill is not None and kill[:2] == (dist.get_rank(), t.step):
                arm(t, kill[2])
            t.one_step()
            inq.save_sharded(path, t.model, t.optimizer, t.run, {"step": t.step})
    assert t.moved == 0
    files.write_safetensors(folder / f"{wrap}-{dist.get_rank()}.safetensors", t.weights(), {})


# --- processes --------------------------------------------------------------------------------------------------------


def start(folder, name, size, scenarios):
    """Fork ``size`` ranks that go through the scenarios; their process ids."""
    children = []
    for rank in range(size):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            torch.set_num_threads(1)
            store = f"file://{folder}/{name}-store"
            dist.init_process_group(
                "gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=60)
            )
            (folder / f"{name}-failed-{rank}.json").write_text(json.dumps(failures(folder, rank, scenarios)))
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            # Not sys.exit: the parent's buffers and handlers are not the child's.
            os._exit(code)
    return children


def failures(folder, rank, scenarios):
    failed = {}
    for name, scenario in scenarios.items():
        began = time.process_time()
        try:
            scenario(folder)
        except Exception:
            failed[name] = traceback.format_exc()
            return failed  # the other ranks are somewhere else now
        if "INQ_TIMES" in os.environ:
            print(f"rank {rank}: {name}: {time.process_time() - began:.2f} s", file=sys.stderr)
    dist.destroy_process_group()
    return failed


def wait(children, seconds):
    """Their exit codes, by rank; who is not done after so many seconds is killed."""
    end, codes = time.monotonic() + seconds, {}
    while len(codes) < len(children):
        for rank, child in enumerate(children):
            if rank not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > end:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return codes


def reported(folder, name, codes):
    found = {}
    for rank, code in codes.items():
        path = folder / f"{name}-failed-{rank}.json"
        found[rank] = json.loads(path.read_text()) if path.exists() else {"exit": f"code {code}"}
    return {rank: what for rank, what in found.items() if what}


def lives(folder):
    """Ranks are started until a whole life was lived; what went otherwise than it should."""
    wrong = {}
    for wrap, kills in LIVES.items():
        for number, kill in enumerate(kills):
            name = f"{wrap}-life-{number}"
            children = start(folder, name, 2, {name: lambda f, w=wrap, n=number, k=kill: life(f, w, n, k)})
            codes = wait(children, 60)
            if kill is None:
                if what := reported(folder, name, codes):
                    wrong[name] = what
            elif codes[kill[0]] != -signal.SIGKILL:
                wrong[name] = {kill[0]: {"was not killed": f"{kill}, {reported(folder, name, codes)}"}}
    return wrong


GROUPS = {"pair": (2, PAIR), "four": (4, FOUR)}


def main(folder: Path, groups: str) -> None:
    report = {}
    for group in groups.split(","):
        if group == "lives":
            report |= lives(folder)
            continue
        size, scenarios = GROUPS[group]
        codes = wait(start(folder, group, size, {s.__name__: s for s in scenarios}), 300)
        if what := reported(folder, group, codes):
            report[group] = what
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
