"""INQ on several ranks: distributed.py and sharded.py. What the ranks do and assert is in distributed_ranks.py."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_ranks import SCHEDULES, Training, assert_same
from support import same_bits

import inq_kernels as inq
from inq_kernels import files, reference
from inq_kernels.distributed import flat_bits, row_bits

RANKS = Path(__file__).with_name("distributed_ranks.py")


def launch(folder, groups):
    result = subprocess.run(
        [sys.executable, str(RANKS), str(folder), groups],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    lines = [
        f"{group}, rank {rank}, {name}: {error}"
        for group, ranks in report.items()
        for rank, failed in ranks.items()
        for name, error in failed.items()
    ]
    assert not report, "\n".join(lines) + result.stderr


def load_tensors(path):
    return files.read_tensors(path, files.read_header(path))


def test_two_ranks(tmp_path):
    """One hash of one process, DDP and FSDP2, and of ranks that are killed with SIGKILL at a step and while saving;
    checkpoints across them; what fails on one rank fails on all."""
    launch(tmp_path, "pair,lives")
    expected = Training("none", **SCHEDULES[1]).finish()
    for name in ("ddp-0", "ddp-1", "fsdp2-0", "fsdp2-1"):
        assert_same(load_tensors(tmp_path / f"{name}.safetensors"), expected)
    # In one process, without torch.distributed, the run goes on to the same end.
    for name, arguments in (("fsdp2", SCHEDULES[3]), ("ddp", SCHEDULES[1])):
        alone = Training("none", **arguments)
        random_state = torch.get_rng_state()
        extra = inq.load_sharded(tmp_path / name, alone.model, alone.optimizer, alone.run)
        assert extra["rank"] == 0
        assert torch.equal(torch.get_rng_state(), random_state), "these are of other ranks"
        alone.step = extra["step"]
        assert_same(alone.finish(), load_tensors(tmp_path / f"{name}-end.safetensors"))


def test_four_ranks(tmp_path):
    """n1 and what is frozen, decided together, are those of the definition: every dtype, ties, ranks without a row."""
    launch(tmp_path, "four")


@pytest.mark.parametrize("shape", [(3, 5), (4, 8), (1, 17), (0, 3), (6, 2, 3)])
def test_masks_by_rows(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    rows = row_bits(reference.pack_bits(mask), shape)
    assert rows.shape == (shape[0], -(-mask[:1].numel() // 8) if shape[0] else 1)
    for row, flags in zip(rows, mask, strict=True):
        assert torch.equal(row, reference.pack_bits(flags))
    assert torch.equal(flat_bits(rows, shape), reference.pack_bits(mask))


def test_ranks_of_a_part_of_a_weight():
    whole = reference.random_keys(1000, 12345, torch.device("cpu"))
    for first in (0, 1, 999, 1 << 40):
        part = reference.random_keys(10, reference.seed_at(12345, first), torch.device("cpu"))
        if first < 900:
            assert torch.equal(part, whole[first : first + 10])
        assert torch.equal(part[5:], reference.random_keys(5, reference.seed_at(12345, first + 5), part.device))


def test_a_wrapper_of_an_optimizer_is_refused():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="a wrapper of it, Wrapper: pass what it wraps"):
        inq.INQ(model, Wrapper(torch.optim.SGD(model.parameters(), 0.1)), inq.Format(4))


# --- files, in one process --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("sharded") / "run"
    t = Training("none", **SCHEDULES[1])
    next(iter(t.run))
    t.one_step()
    inq.save_sharded(path, t.model, t.optimizer, t.run, {"step": 1, "seen": torch.tensor(5)})
    return path


def test_one_process_alone(checkpoint):
    t = Training("none", **SCHEDULES[1])
    extra = inq.load_sharded(checkpoint, t.model, t.optimizer, t.run)
    t.step = extra["step"]
    # A number stays one, without a dimension.
    assert same_bits(extra["seen"], torch.tensor(5))
    assert_same(t.finish(), Training("none", **SCHEDULES[1]).finish())


def index_of(folder):
    index = json.loads((folder / "inq_training.json").read_text())
    return index, json.loads(index["content"])


def write_index(folder, index, content):
    index["content"] = json.dumps(content)
    index["sha256"] = hashlib.sha256(index["content"].encode()).hexdigest()
    (folder / "inq_training.json").write_text(json.dumps(index))


def shard_of(folder):
    return next(folder.glob("*.safetensors"))


def forged(change):
    """Change the index's content, and its checksum with it, as somebody who means harm would."""

    def damage(folder):
        index, content = index_of(folder)
        change(index, content)
        write_index(folder, index, content)

    return damage


def reshard_file(change):
    """Change the shard's metadata of parts, and the checksums with it."""

    def damage(folder):
        shard = shard_of(folder)
        header = files.read_header(shard)
        tensors, metadata = files.read_tensors(shard, header), dict(header.metadata)
        places = json.loads(metadata["DCP_SHARDING_INFO"])
        change(tensors, places)
        files.write_safetensors(shard, tensors, {**metadata, "DCP_SHARDING_INFO": json.dumps(places)})
        index, content = index_of(folder)
        content["files"][shard.name] = hashlib.sha256(shard.read_bytes()).hexdigest()
        write_index(folder, index, content)

    return damage


def flip(folder):
    data = bytearray(shard_of(folder).read_bytes())
    data[-1] ^= 1
    shard_of(folder).write_bytes(data)


def stray_link(folder):
    shard = shard_of(folder)
    outside = folder.parent / shard.name
    shard.rename(outside)
    shard.symlink_to(outside)


DAMAGE = {
    "no index": (lambda f: (f / "inq_training.json").unlink(), "expected a file, got No such file"),
    "another file": (lambda f: (f / "inq_training.json").write_text("{}"), "expected the index of a checkpoint"),
    "newer": (forged(lambda i, c: i.update(inq_sharded_version=2)), "inq_sharded_version: expected 1, got 2"),
    "version": (forged(lambda i, c: i.update(inq_sharded_version=True)), "expected the index of a checkpoint"),
    "changed text": (
        lambda f: (f / "inq_training.json").write_text((f / "inq_training.json").read_text().replace("SGD", "sgd")
                                                       .replace("AdamW", "Adamw")),
        "expected the text that its sha256 names",
    ),
    "keys": (forged(lambda i, c: c.pop("files")), "expected world_size, state, tensors and files"),
    "world": (forged(lambda i, c: c.update(world_size=0)), "world_size: expected an int of at least 1, got 0"),
    "escape": (forged(lambda i, c: c["files"].update({"../x.safetensors": ""})), "files: expected names as"),
    "file": (forged(lambda i, c: c["files"].clear()), "expected the files"),
    "own": (forged(lambda i, c: c["files"].pop("rank-00000.json")), "expected rank-00000.json among them"),
    "dtype": (forged(lambda i, c: c["tensors"]["t.0"].__setitem__(0, "C64")), "expected a dtype and a shape"),
    "shape": (forged(lambda i, c: c["tensors"]["t.0"].__setitem__(1, [1 << 60])), "shape: expected"),
    "name": (forged(lambda i, c: c["tensors"].update({"../x": ["F32", [1]]})), "expected tensor names"),
    "too many": (forged(lambda i, c: c["tensors"].update({"t.999": ["F32", [1]]})), "expected 1 values in all files"),
    "parts": (forged(lambda i, c: c["state"].pop("inq")), "expected the parts"),
    "pickle": (forged(lambda i, c: c["state"].update(inq={"$pickle": "gASV"})), r"got \$pickle"),
    "layers": (forged(lambda i, c: c["state"]["inq"]["layers"].pop("fc")), "layers: expected"),
    "state": (forged(lambda i, c: c["state"].update(inq=5)), "expected a state as inq.save_sharded writes it"),
    "other": (forged(lambda i, c: c["state"]["optimizer"].update(type="SGD")), "optimizer: expected AdamW, got SGD"),
    "mask": (
        forged(lambda i, c: c["state"]["inq"]["layers"]["fc"].update(mask={"$tensor": "t.0"})), "mask: expected one",
    ),
    "no shape": (
        forged(lambda i, c: c["state"]["inq"]["layers"]["fc"].update(shape=[])), "layer 'fc': shape: expected .*, got",
    ),
    "flip": (flip, "damaged data"),
    "text of a rank": (lambda f: (f / "rank-00000.json").write_text("{}"), "damaged data"),
    "missing": (lambda f: shard_of(f).unlink(), "expected the files"),
    "stray": (lambda f: (f / "model.safetensors").write_bytes(b"PK\x03\x04"), "expected the files"),
    "link": (stray_link, "expected a file inside"),
    "cut": (lambda f: shard_of(f).write_bytes(shard_of(f).read_bytes()[:-1]), "expected .* bytes of tensors"),
    "hole": (reshard_file(lambda t, p: (t.pop("t.0"), p.pop("t.0"))), "t.0': expected 45 values in all files, got 0"),
    "place": (reshard_file(lambda t, p: p["t.0"].update(saved_offsets=[1, 0, 0, 0])), "expected a part of"),
    "places": (reshard_file(lambda t, p: p.pop("t.0")), "expected an entry for each"),
    "rank": (reshard_file(lambda t, p: p["t.0"].update(saved_offsets=[0])), "expected 4 saved_offsets"),
    "unknown": (reshard_file(lambda t, p: (t.update(x=torch.ones(1)), p.update(x={}))), "tensor 'x'"),
    "kind": (reshard_file(lambda t, p: t.update({"t.0": t["t.0"].double()})), "tensor 't.0': expected torch.float32"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_and_forged_checkpoints_change_nothing(what, checkpoint, tmp_path):
    damage, message = DAMAGE[what]
    folder = tmp_path / "run"
    shutil.copytree(checkpoint, folder)
    damage(folder)
    t = Training("none", **SCHEDULES[1])
    before, random_state = t.weights(), torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        inq.load_sharded(folder, t.model, t.optimizer, t.run)
    assert_same(t.weights(), before)
    assert t.run.portion == 0
    assert not t.optimizer.state
    assert torch.equal(torch.get_rng_state(), random_state)


def test_only_checkpoints_are_replaced(tmp_path):
    t = Training("none")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    with pytest.raises(inq.CheckpointError, match="an older checkpoint to replace"):
        inq.save_sharded(tmp_path / "photos", t.model, t.optimizer, t.run)


def test_state_that_files_cannot_hold(tmp_path):
    t = Training("none")
    with pytest.raises(TypeError, match="expected dense tensors"):
        inq.save_sharded(tmp_path / "run", t.model, t.optimizer, t.run, {"x": torch.ones(2, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="give large things to extra as tensors"):
        inq.save_sharded(tmp_path / "run", t.model, t.optimizer, t.run, {"x": "y" * 5_000_000})
    assert list(tmp_path.iterdir()) == []
