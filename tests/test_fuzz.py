"""The readers of files on spoiled ones, without a fuzzer: `make fuzz` runs the same executions guided by coverage."""

import random
import re

import pytest
import torch
from fuzz import seeds, structure, targets

import inq_kernels as inq
from inq_kernels import file_format, sharded, transcode
from inq_kernels.integrations import exports, imports

RUNS = 4000


@pytest.fixture(scope="module")
def begin(tmp_path_factory):
    return targets.inputs(tmp_path_factory.mktemp("seeds"))


@pytest.fixture
def place():
    made, states = targets.Place(), (torch.get_rng_state(), random.getstate())
    yield made
    # Training checkpoints bring states of their own.
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    made.close()


def plain_mutation(rng):
    """What libFuzzer does, in its simplest form."""

    def mutate_bytes(data, limit):
        data = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data) + 1)
            data[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        return bytes(data[:limit])

    return mutate_bytes


def spoiled(begin, runs, seed=0):
    """Inputs that are up to three mutations away from a seed. Every target has its share, however few its seeds, and
    those that are no malformed ones, which come first, have most of it."""
    rng = random.Random(seed)
    by_target = {}
    for data in begin:
        by_target.setdefault(data[0], []).append(data)
    for _ in range(runs):
        pool = by_target[rng.randrange(len(targets.TARGETS))]
        data = pool[int(rng.random() ** 3 * len(pool))]
        for _ in range(rng.randrange(1, 4)):
            data = structure.mutate(
                data, seeds.MAX_BYTES, rng.getrandbits(32), plain_mutation(rng), targets.DIRECTORIES
            )
        yield data


def test_spoiled_files_are_refused_as_expected_or_are_good(begin, place):
    outcomes, messages = {}, set()
    for data in spoiled(begin, RUNS):
        number, error = targets.execute(data, place)
        accepted, refused = outcomes.get(number, (0, 0))
        outcomes[number] = (accepted + (error is None), refused + (error is not None))
        if error is not None:
            # Without what differs from file to file: names, numbers, values.
            messages.add(re.sub(r"'.*?'|\"[^\"]*\"|[-0-9]+|, got .*", "_", str(error).partition("safetensors")[2])[:60])
    # Else the spoiling is too weak, or too strong, to show anything.
    assert outcomes.keys() == set(range(len(targets.TARGETS)))
    assert all(accepted > 0 and refused > 100 for accepted, refused in outcomes.values()), outcomes
    assert len(messages) > 80, sorted(messages)


def test_every_seed_is_taken_apart_and_put_together(begin, place):
    for data in begin:
        if data[0] in targets.DIRECTORIES:
            files_of = structure.read_files(data[1:])
            assert structure.write_files(files_of) == data[1:]
        elif (parts := structure.take_apart(data[1:])) is not None:
            again = structure.take_apart(structure.put_together(parts, signed=False))
            assert (again.entries, again.metadata, again.data) == (parts.entries, parts.metadata, parts.data)


def test_a_mutation_is_the_same_for_the_same_seed(begin):
    first, again = (list(spoiled(begin, 200, seed=3)) for _ in range(2))
    assert first == again
    assert len(set(first)) > 150


def good(begin, number):
    """The first seed of a target that is accepted."""
    made = targets.Place()
    try:
        return next(d for d in begin if d[0] == number and targets.execute(d, made)[1] is None)
    finally:
        made.close()


def raises(error):
    def function(*args, **kwargs):
        raise error

    return function


NUMBERS = {target.name: number for number, target in enumerate(targets.TARGETS)}


@pytest.mark.parametrize(
    "error", [KeyError("x"), UnicodeDecodeError("utf-8", b"", 0, 1, "x"), MemoryError(), OSError(5)]
)
def test_other_errors_are_crashes(begin, place, monkeypatch, error):
    data = good(begin, NUMBERS["load_training"])
    monkeypatch.setattr(torch.optim.SGD, "load_state_dict", raises(error))
    monkeypatch.setattr(inq.training, "_REFUSED", ())
    with pytest.raises((type(error), targets.Violation)):
        targets.execute(data, place)


def test_a_warning_is_a_crash(begin, place, monkeypatch):
    data = good(begin, NUMBERS["load"])
    monkeypatch.setattr(file_format, "check_packed", lambda *args: targets.warnings.warn("odd", stacklevel=1))
    with pytest.raises(UserWarning, match="odd"):
        targets.execute(data, place)


def test_a_message_without_a_place_is_a_crash(begin, place, monkeypatch):
    data = good(begin, NUMBERS["load"])
    monkeypatch.setattr(file_format, "check_packed", raises(inq.CheckpointError("something is wrong")))
    with pytest.raises(targets.Violation, match="does not say where"):
        targets.execute(data, place)


@pytest.mark.parametrize("name", ["load into a model", "load_training", "load_sharded"])
def test_a_model_that_a_refused_file_has_changed_is_a_crash(begin, place, monkeypatch, name):
    data = good(begin, NUMBERS[name])

    def changes(path, *objects):
        with torch.no_grad():
            next(p for p in objects[0].parameters() if p.is_floating_point()).add_(1)
        raise inq.CheckpointError(f"{path}: refused too late")

    with monkeypatch.context() as patch:
        patch.setattr(inq, "load", changes)
        patch.setattr(inq, "load_training", changes)
        patch.setattr(inq, "load_sharded", changes)
        with pytest.raises(targets.Violation, match="something has changed"):
            targets.execute(data, place)
    targets._into.fresh()
    targets._resumed.fresh()


def test_random_states_that_a_refused_file_has_changed_are_a_crash(begin, place, monkeypatch):
    def changes(path, *objects):
        torch.rand(1)
        raise inq.CheckpointError(f"{path}: refused too late")

    data = good(begin, NUMBERS["load_sharded"])
    monkeypatch.setattr(inq, "load_sharded", changes)
    with pytest.raises(targets.Violation, match="something has changed"):
        targets.execute(data, place)


def flipped(function):
    """A conversion's step that gives the rows in another order."""

    def other(*args):
        result = function(*args)
        return {k: v.flip(0) for k, v in result.items()} if isinstance(result, dict) else result.flip(0)

    return other


def added(function):
    """A reader's step that gets the values wrong."""

    def other(path, tensors, *args):
        function(path, tensors, *args)
        for tensor in tensors.values():
            if tensor.is_floating_point():
                tensor += 1

    return other


@pytest.mark.parametrize(
    ("name", "module", "step", "wrong"),
    [
        ("import a file", imports, "_pack", lambda pack: lambda w, fmt: pack(w.flip(0), fmt)),
        ("import a directory", imports, "_pack", lambda pack: lambda w, fmt: pack(w.flip(0), fmt)),
        ("export to MXFP4", exports, "_encode", flipped),
        ("export to FP8", exports, "_encode", flipped),
        ("export to floats", transcode, "unpack_exactly", flipped),
        ("load_sharded", sharded, "_read", added),
    ],
)
def test_other_values_are_a_crash(begin, place, monkeypatch, name, module, step, wrong):
    data = good(begin, NUMBERS[name])
    monkeypatch.setattr(module, step, wrong(getattr(module, step)))
    with pytest.raises(targets.Violation, match="with other values than the file's"):
        targets.execute(data, place)


def test_what_a_refused_import_leaves_is_a_crash(begin, place, monkeypatch):
    def leaves(path, target):
        target.mkdir()
        raise inq.CheckpointError(f"{path}: refused too late")

    data = good(begin, NUMBERS["import a directory"])
    monkeypatch.setattr(imports, "import_packed", leaves)
    with pytest.raises(targets.Violation, match=r"refused, and left \['out'\]"):
        targets.execute(data, place)


def test_an_import_that_does_not_load_is_a_crash(begin, place, monkeypatch):
    data = good(begin, NUMBERS["import a directory"])
    monkeypatch.setattr(inq, "load", raises(inq.CheckpointError("x")))
    with pytest.raises(targets.Violation, match="what was written of it is refused"):
        targets.execute(data, place)


def test_an_index_of_shards_is_signed_again(begin, place):
    data = good(begin, NUMBERS["load_sharded"])
    files_of = structure.read_files(data[1:])
    shard = next(name for name in files_of if name.startswith("shard-"))
    files_of[shard] = files_of[shard][:-1] + bytes([files_of[shard][-1] ^ 1])
    assert "damaged data" in str(targets.execute(data[:1] + structure.write_files(files_of), place)[1])
    structure.sign_index(files_of)
    assert "damaged data" not in str(targets.execute(data[:1] + structure.write_files(files_of), place)[1])


def test_codes_that_no_one_checks_are_a_crash(begin, place, monkeypatch):
    """The fuzzing would notice if the loader let in codes that are not canonical: here the padding."""
    parts = structure.take_apart(good(begin, NUMBERS["load"])[1:])
    parts.data[parts.tensor("weight").stop - 1] = 0xFF
    data = bytes([NUMBERS["load"]]) + structure.put_together(parts)
    assert "expected canonical codes" in str(targets.execute(data, place)[1])
    monkeypatch.setattr(file_format, "check_packed", lambda *args: None)
    with pytest.raises(targets.Violation, match="packs to other codes"):
        targets.execute(data, place)
