"""inq.save_training and load_training: a run goes on bit for bit from anywhere, and a bad file changes nothing."""

import collections
import copy
import hashlib
import json
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import inq_kernels as inq
from inq_kernels.files import read_header, read_tensors, write_safetensors

PORTIONS = (0.5, 1.0)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, amsgrad=True),
    "adam-tensor-lr": lambda p: torch.optim.Adam(p, torch.tensor(0.01), foreach=False),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.5, max_iter=3, history_size=3),
}


def reordered(objects):
    """The same optimizer over the same parameters in another order: it would take over momenta of others."""
    model, _, run = objects
    run.close()
    opt = OPTIMIZERS["sgd"](list(model.parameters())[::-1])
    schedulers = [torch.optim.lr_scheduler.MultiStepLR(opt, [2, 4]), torch.optim.lr_scheduler.ReduceLROnPlateau(opt)]
    return model, opt, inq.INQ(model, opt, inq.Format(3), PORTIONS, lr_schedulers=schedulers)


def make(optimizer="sgd", portions=PORTIONS, width=6, schedule=torch.optim.lr_scheduler.MultiStepLR):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.Dropout(0.3), nn.Linear(width, 3))
    opt = OPTIMIZERS[optimizer](model.parameters())
    schedulers = [
        schedule(opt, 2 if schedule is torch.optim.lr_scheduler.StepLR else [2, 4]),
        torch.optim.lr_scheduler.ReduceLROnPlateau(opt),
    ]
    return model, opt, inq.INQ(model, opt, inq.Format(3), portions, lr_schedulers=schedulers)


def train(model, opt, run, step=0, stop_at=None, save=None):
    x, t = torch.linspace(-1, 1, 40).view(8, 5), torch.arange(8) % 3
    for portion in run:
        while step < 5 * (PORTIONS.index(portion) + 1):
            torch.manual_seed(step)

            def closure():
                opt.zero_grad()
                loss = F.cross_entropy(model(x), t)
                loss.backward()
                return loss

            loss = opt.step(closure).detach()
            run.lr_schedulers[0].step()
            run.lr_schedulers[1].step(float(loss))
            step += 1
            if step == stop_at:
                return save()
    return None


@pytest.mark.parametrize("stop_at", [3, 5, 8])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resume_in_every_optimizer(tmp_path, optimizer, stop_at):
    whole = make(optimizer)
    train(*whole)
    path = tmp_path / "run.safetensors"
    first = make(optimizer)
    extra = {"best": float("inf"), "seen": (1, 2), "table": {3: "x", "$tensor": None}, "ema": torch.ones(2)}
    train(*first, stop_at=stop_at, save=lambda: inq.save_training(path, *first, extra))
    second = make(optimizer)
    torch.manual_seed(99)
    back = inq.load_training(path, *second)
    assert torch.equal(back.pop("ema"), torch.ones(2))
    assert back == {k: v for k, v in extra.items() if k != "ema"}
    train(*second, step=stop_at)
    for name, expected in whole[0].state_dict().items():
        assert torch.equal(second[0].state_dict()[name], expected), name
    assert second[1].param_groups[0]["lr"] == whole[1].param_groups[0]["lr"]


def test_random_states_are_restored(tmp_path):
    objects = make()
    inq.save_training(tmp_path / "run.safetensors", *objects)
    drawn = torch.rand(3), random.random()
    inq.load_training(tmp_path / "run.safetensors", *objects)
    assert torch.equal(torch.rand(3), drawn[0])
    assert random.random() == drawn[1]


def test_schedulers_keep_their_types(tmp_path):
    """JSON has neither int keys nor Counters; MultiStepLR's milestones are both."""
    *objects, run = make()
    inq.save_training(tmp_path / "run.safetensors", *objects, run)
    fresh = make()
    inq.load_training(tmp_path / "run.safetensors", *fresh)
    milestones = fresh[2].lr_schedulers[0].milestones
    assert milestones == collections.Counter({2: 1, 4: 1})
    assert isinstance(milestones, collections.Counter)


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"f": len}, r"state\['extra'\]\['f'\]: .* got builtin_function_or_method"),
        ({"a": [1, {2}]}, r"state\['extra'\]\['a'\]\[1\]: .* got set"),
        ({"d": torch.float32}, "got dtype"),
        ({"s": "\udcff.txt"}, r"state\['extra'\]\['s'\]: expected text, got a string that UTF-8 cannot hold"),
        ({"i": 10**4500}, r"state\['extra'\]\['i'\]: expected an int of at most 1024 bits"),
        ({"n": nested(600)}, "expected at most 64 levels of nesting"),
    ],
)
def test_what_cannot_be_stored_is_named_and_the_old_file_stays(tmp_path, value, where):
    path = tmp_path / "run.safetensors"
    objects = make()
    inq.save_training(path, *objects)
    before = path.read_bytes()
    with pytest.raises(TypeError, match=where):
        inq.save_training(path, *objects, value)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


def test_too_much_text_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="expected at most 4194304 bytes of numbers and strings"):
        inq.save_training(tmp_path / "run.safetensors", *make(), {"log": "x" * 5_000_000})
    assert not list(tmp_path.iterdir())


class Versioned(nn.Linear):
    """A module that migrates the state of older versions, as some of torch's and torchvision's do."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version") != 2:
            state_dict[prefix + "bias"] = torch.zeros_like(self.bias)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_versions_of_modules_are_kept(tmp_path):
    model = nn.Sequential(Versioned(3, 3))
    opt = torch.optim.SGD(model.parameters(), 0.1)
    run = inq.INQ(model, opt, inq.Format(3))
    bias = model[0].bias.detach().clone()
    inq.save_training(tmp_path / "run.safetensors", model, opt, run)
    inq.load_training(tmp_path / "run.safetensors", model, opt, run)
    assert torch.equal(model[0].bias, bias)


def test_the_first_hyperparameters_survive_a_resume(tmp_path):
    """A portion restores what the groups were when the first run was made, not when it was resumed."""
    objects = make()
    next(iter(objects[2]))
    inq.save_training(tmp_path / "run.safetensors", *objects)
    fresh = make()
    fresh[1].param_groups[0]["momentum"] = 0.5
    for groups in fresh[2]._initial_groups:
        groups[0]["momentum"] = 0.5
    inq.load_training(tmp_path / "run.safetensors", *fresh)
    list(fresh[2])
    assert fresh[1].param_groups[0]["momentum"] == 0.9


def state_of(model, opt, run):
    return copy.deepcopy((model.state_dict(), opt.state_dict(), run.state_dict(), torch.get_rng_state()))


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    else:
        assert a == b


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: make(width=7), r"model: 0.weight: expected torch.float32 \[7, 5\], got torch.float32 \[6, 5\]"),
        (lambda: make("adamw"), "optimizer: expected AdamW, got SGD"),
        (lambda: reordered(make()), r"optimizer: expected groups of the parameters .*, got"),
        (lambda: make(schedule=torch.optim.lr_scheduler.StepLR), "lr_schedulers: expected .*'StepLR'.*, got"),
        (lambda: make(portions=(0.4, 1.0)), r"portions: expected \[0.4, 1.0\]"),
    ],
)
def test_a_checkpoint_of_something_else_changes_nothing(tmp_path, other, message):
    path = tmp_path / "run.safetensors"
    objects = make()
    train(*objects, stop_at=3, save=lambda: inq.save_training(path, *objects))
    others = other()
    before = state_of(*others)
    with pytest.raises(ValueError, match=message):
        inq.load_training(path, *others)
    assert_same(before, state_of(*others))


def rewrite(path, change):
    """Change the JSON of a checkpoint and its checksum with it, as somebody who means harm would."""
    header = read_header(path)
    tensors, metadata = read_tensors(path, header), dict(header.metadata)
    state = json.loads(metadata["inq_training"])
    change(state, metadata)
    metadata["inq_training"] = json.dumps(state)
    metadata["inq_training_sha256"] = hashlib.sha256(metadata["inq_training"].encode()).hexdigest()
    write_safetensors(path, tensors, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, m: m.update(inq_training_version="2"), "inq_training_version: expected '1', got '2'"),
        (lambda s, m: m.pop("inq_training_version"), "expected a file of inq.save_training"),
        (lambda s, m: m.update(inq_checksums="{}"), "inq_checksums: expected one for each"),
        (lambda s, m: s.pop("rng"), "expected the parts"),
        (lambda s, m: s.update(extra={"$tensor": "t.999"}), r"\$tensor: expected what save_training writes"),
        (lambda s, m: s.update(extra={"$pickle": "gASV"}), r"expected what save_training writes, got \$pickle"),
        (lambda s, m: s.update(inq=5), "expected a state as inq.save_training writes it"),
        # Who compares these gets a RuntimeError. Found by make fuzz.
        (lambda s, m: s.update(inq={"$tensor": "t.0"}), "expected a state as inq.save_training writes it"),
        (lambda s, m: s["inq"].update(seed={"$tensor": "t.0"}), "expected a state as inq.save_training writes it"),
        (lambda s, m: s["optimizer"].pop("parameters"), "expected a state as inq.save_training writes it"),
        (lambda s, m: s["rng"].update(python=5), "expected a state as inq.save_training writes it, got .*rng|int"),
        (lambda s, m: s["rng"].update(torch={"$tensor": "t.0"}), "expected a state as .*rng: expected uint8 tensors"),
        (lambda s, m: s["inq"]["lr_schedulers"][0].update(state=5), "expected a state as inq.save_training writes it"),
        (lambda s, m: s.update(extra=nested(70)), "expected at most 64 levels of nesting"),
        (lambda s, m: s["model_metadata"].update({"": 5}), "expected a state that can be loaded"),
        (lambda s, m: s["optimizer"]["state"].update(state=5), "expected a state that can be loaded"),
    ],
)
def test_forged_files_are_refused_and_change_nothing(tmp_path, change, message):
    path = tmp_path / "run.safetensors"
    objects = make()
    train(*objects, stop_at=3, save=lambda: inq.save_training(path, *objects))
    rewrite(path, change)
    # Others than those that were saved: a load that stops halfway must show.
    fresh = make()
    before = state_of(*fresh)
    with pytest.raises(inq.CheckpointError, match=message):
        inq.load_training(path, *fresh)
    assert_same(before, state_of(*fresh))


def test_no_state_freezes_weights_before_the_first_portion():
    """They would be held at values that nobody has checked. Found by make fuzz."""
    objects = make()
    before, state = state_of(*objects), objects[2].state_dict()
    next(iter(state["layers"].values()))["mask"][0] = 1
    with pytest.raises(
        ValueError, match="layer '0': mask: expected no frozen weights before the first portion, got some"
    ):
        objects[2].load_state_dict(state)
    assert_same(before, state_of(*objects))


@pytest.mark.parametrize("where", ["header", "data"])
def test_a_flipped_bit_is_found(tmp_path, where):
    path = tmp_path / "run.safetensors"
    objects = make()
    inq.save_training(path, *objects)
    data = bytearray(path.read_bytes())
    position = data.index(b"last_epoch") + 15 if where == "header" else len(data) - 3
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(inq.CheckpointError, match="sha256"):
        inq.load_training(path, *objects)


def test_a_state_cannot_take_the_place_of_a_method(tmp_path):
    """torch's schedulers make attributes of whatever their state holds."""
    path = tmp_path / "run.safetensors"
    objects = make()
    inq.save_training(path, *objects)
    for part in ("lr_schedulers", "initial_lr_schedulers"):
        inq.save_training(path, *objects)
        rewrite(path, lambda s, m, part=part: s["inq"][part][0].get("state", s["inq"][part][0]).update(step=5))
        fresh = make()
        with pytest.raises(ValueError, match=r"lr_schedulers: expected no methods in a state, got \['step'\]"):
            inq.load_training(path, *fresh)
        assert callable(fresh[2].lr_schedulers[0].step)
