"""``inq.save`` and ``inq.load``: format version 1, all that is refused, and that a model is filled or untouched."""

import copy
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import textwrap
from contextlib import contextmanager, suppress

import malformed
import pytest
import torch
from golden import v1
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from malformed import CASES, good_bytes, good_entries
from support import FORMATS, generator, random_packed, same_bits
from torch import nn

import inq_kernels as inq
import inq_kernels.ops
from inq_kernels import checkpoint, file_format, files, transcode
from inq_kernels.checkpoint import inspect, verify

quick = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def small_model(seed=0):
    """A convolution, a norm with buffers, two Linear with and without bias, one of them twice."""
    torch.manual_seed(seed)
    shared = nn.Linear(8, 8)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 8, bias=False),
        shared, nn.ReLU(), shared, nn.Embedding(5, 8),
    )  # fmt: skip


FORMATS_OF_SMALL = {"0": inq.Format(5), "3": inq.Format(3, "dense", "channel"), "[46]": inq.Format(4)}


def converted(seed=0):
    model = small_model(seed)
    inq.convert(model, FORMATS_OF_SMALL)
    return model


def same_entry(a, b):
    if isinstance(a, inq.PackedWeight) != isinstance(b, inq.PackedWeight):
        return False
    if not isinstance(a, inq.PackedWeight):
        return same_bits(a, b)
    scales = a.weight_scale is None and b.weight_scale is None
    return (
        (a.format, a.shape) == (b.format, b.shape)
        and same_bits(a.weight, b.weight)
        and same_bits(a.weight_exp, b.weight_exp)
        and (scales or same_bits(a.weight_scale, b.weight_scale))
    )


def same_entries(a, b):
    return a.keys() == b.keys() and all(same_entry(a[name], b[name]) for name in a)


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def snapshot(model):
    """Everything that a failed load must leave: modules, tensors, their memory, their bits."""
    modules = [(name, id(m), type(m), m.training) for name, m in model.named_modules(remove_duplicate=False)]
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return modules, [(n, id(t), t.data_ptr(), t.requires_grad, t.detach().flatten().tolist()) for n, t in tensors]


# --- identity ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["model.safetensors", "model"], ids=["file", "directory"])
def path(request, tmp_path):
    return tmp_path / request.param


@quick
@given(
    fmt=st.sampled_from(FORMATS),
    granularity=st.sampled_from(["tensor", "channel"]),
    rule=st.sampled_from(["max", "mse"]),
    shape=st.one_of(
        st.tuples(st.integers(1, 9), st.integers(1, 40)),
        st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
        st.tuples(st.integers(1, 9)),
    ),
    scale=st.booleans(),
    dtype=st.sampled_from(list(files.DTYPES.values())),
    seed=st.integers(0, 1000),
)
def test_what_is_saved_is_loaded(tmp_path_factory, fmt, granularity, rule, shape, scale, dtype, seed):
    fmt = inq.Format(fmt.bits, fmt.levels, granularity, rule)
    entries = {
        "a.weight": random_packed(fmt, *shape, scale=scale, seed=seed),
        "a.bias": torch.randn(shape[0], generator=generator(seed)).to(dtype),
    }
    path = tmp_path_factory.mktemp("x") / "model.safetensors"
    inq.save(entries, path)
    assert same_entries(inq.load(path), entries)


def test_a_model_is_saved_and_loaded(path):
    model = converted()
    model[3]._set_codes(model[3].weight, model[3].weight_exp, torch.rand(8, 1))
    inq.save(model, path)
    inq.save(model, path)  # over the old one
    entries = inq.load(path)
    assert [name for name, value in entries.items() if isinstance(value, inq.PackedWeight)] == [
        "0.weight", "3.weight", "4.weight", "6.weight",
    ]  # fmt: skip
    assert set(entries) == {name for name in model.state_dict() if not name.endswith(("weight_exp", "weight_scale"))}
    for other in (small_model(1), converted(1), small_model(1).to("meta"), converted(1).to("meta")):
        if isinstance(other[0], inq.Conv2d):
            other[0].format = model[0].format
        assert inq.load(path, other) is other
        assert same_state(other, model)
        assert other[4] is other[6]
        assert isinstance(other[4], inq.Linear)
        assert not any(t.device.type == "meta" for t in other.state_dict().values())
        x = torch.randn(2, 3, 2, 2)
        assert same_bits(other.eval()[:7](x), model.eval()[:7](x))


def test_mapping_saves_what_was_loaded(path, tmp_path):
    inq.save(converted(), path)
    inq.save(inq.load(path), tmp_path / "again.safetensors")
    assert same_entries(inq.load(path), inq.load(tmp_path / "again.safetensors"))


def test_a_new_process_reads_the_same_bits(path):
    model = converted()
    inq.save(model, path)
    script = """
        import hashlib, sys
        import inq_kernels as inq
        for name, value in inq.load(sys.argv[1]).items():
            tensors = [value]
            if isinstance(value, inq.PackedWeight):
                tensors = [value.weight, value.weight_exp, inq.unpack(value)]
            print(name, *(hashlib.sha256(repr(t.tolist()).encode()).hexdigest() for t in tensors))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(path)], check=True, capture_output=True, text=True
    )
    lines = []
    for name, value in file_format_entries(model).items():
        tensors = [value]
        if isinstance(value, inq.PackedWeight):
            tensors = [value.weight, value.weight_exp, inq.unpack(value)]
        lines.append(" ".join([name, *(hashlib.sha256(repr(t.tolist()).encode()).hexdigest() for t in tensors)]))
    assert sorted(result.stdout.splitlines()) == sorted(lines)


def file_format_entries(model):
    """What the file should hold, told from the modules."""
    state, entries = model.state_dict(), {}
    for name, tensor in state.items():
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, (inq.Linear, inq.Conv2d)) and name.endswith("weight"):
            entries[name] = inq_kernels.ops.prepack(module.packed, "storage")
        elif not name.endswith(("weight_exp", "weight_scale")):
            entries[name] = tensor
    return entries


def test_the_format_on_disk_is_that_of_the_description(tmp_path):
    """Read with the safetensors library alone."""
    from safetensors import safe_open

    model = converted()
    inq.save(model, tmp_path / "model")
    assert sorted(os.listdir(tmp_path / "model")) == ["inq.json", "model.safetensors"]
    config = json.loads((tmp_path / "model" / "inq.json").read_text())
    four = {"bits": 4, "levels": "paper", "exponent_granularity": "tensor", "exponent_rule": "mse"}
    assert config == {
        "quant_method": "inq", "format_version": 1, **four, "ignore": [],
        "overrides": {
            "0": four | {"bits": 5},
            "3": {"bits": 3, "levels": "dense", "exponent_granularity": "channel", "exponent_rule": "mse"},
        },
        "producer": {"name": "inq_kernels", "version": inq.__version__},
    }  # fmt: skip
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    assert metadata["format"] == "pt"
    assert metadata["inq_format_version"] == "1"
    assert metadata["inq_manifest_sha256"] == hashlib.sha256(metadata["inq_manifest"].encode()).hexdigest()
    manifest = json.loads(metadata["inq_manifest"])
    assert manifest.keys() == tensors.keys() == model.state_dict().keys()
    weight = tensors["3.weight"]
    assert (weight.dtype, tuple(weight.shape)) == (torch.uint8, (8, 12))
    assert tuple(tensors["0.weight"].shape) == (8, 4 * 5)  # K = 27 is 4 groups of 8
    assert (tensors["3.weight_exp"].dtype, tuple(tensors["3.weight_exp"].shape)) == (torch.int8, (8, 1))
    n1 = tensors["3.weight_exp"]
    assert manifest["3.weight"] == {
        "sha256": hashlib.sha256(bytes(weight.flatten().tolist())).hexdigest(), "dtype": "float32", "shape": [8, 32],
        "bits": 3, "levels": "dense", "exponent_granularity": "channel", "exponent_rule": "mse",
        "exponent_range": [int(n1.min()), int(n1.max())],
    }  # fmt: skip
    assert manifest["7.weight"].keys() == {"sha256", "dtype", "shape"}
    inq.save(model, tmp_path / "one.safetensors")
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        assert json.loads(file.metadata()["inq_config"]) == config


# --- the golden file --------------------------------------------------------------------------------------------------


def test_the_golden_file_is_the_one_that_was_committed():
    content = v1.PATH.read_bytes()
    assert hashlib.sha256(content).hexdigest() == "46d0dedab466720f6025d43aa76e91e2e3e06d7721da77ddfa1447ff76a515d6"
    assert len(content) < 10_000


def test_the_golden_file_holds_what_it_always_held():
    entries, expected = inq.load(v1.PATH), v1.expected()
    assert list(entries) == list(expected)
    for name, value in expected.items():
        got = entries[name]
        if not isinstance(value, tuple):
            assert same_bits(got, value), name
            continue
        w, n1, scale, bits, levels = value
        assert (got.format.bits, got.format.levels, got.shape) == (bits, levels, tuple(w.shape)), name
        assert got.weight_exp.flatten().tolist() == n1, name
        assert (got.weight_scale is None) == (scale is None), name
        factor = 1 if scale is None else torch.tensor(scale, dtype=torch.float32).double()
        # + 0.0: what is 0 is +0, under a negative scale too.
        assert same_bits(inq.unpack(got, torch.float64), w.double() * factor + 0.0), name


@pytest.mark.parametrize("key", v1.CODES)
def test_the_golden_file_has_the_codes_of_the_definition(key):
    """The first row, decoded by hand: 0, then each magnitude with both signs."""
    bits, levels = key
    weight = inq.load(v1.PATH)[f"{levels[0]}{bits}.weight"].weight[0]
    stream = int.from_bytes(bytes(weight.tolist()), "little")
    codes = [stream >> bits * i & (1 << bits) - 1 for i in range(9)]
    every = [0, *v1.CODES[key]]
    assert codes == (every * 9)[:9]


# --- malformed files --------------------------------------------------------------------------------------------------


def test_the_corpus_is_large_and_its_base_is_good(tmp_path):
    assert len(CASES) >= 150
    assert same_entries(inq.load(malformed.File().sign().write(tmp_path)), good_entries())
    assert same_entries(inq.load(malformed.model_directory(tmp_path)), good_entries())


def test_shards_are_read(tmp_path):
    path = malformed.sharded_directory(tmp_path)
    assert same_entries(inq.load(path), good_entries())
    assert verify(path) == 6


def piece(names, config):
    """A file of some of the tensors of a good file: other programs split shards as they like."""
    file, whole = malformed.File(), malformed.File()
    file.data = bytearray()
    for name in list(whole.manifest):
        if name not in names:
            del file.header[name], file.manifest[name]
            continue
        begin = len(file.data)
        file.data += whole.tensor(name)
        file.header[name]["data_offsets"] = [begin, len(file.data)]
    return file.bytes(config=config)


def test_the_parts_of_a_weight_may_be_in_different_shards(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    shards = {
        "a.safetensors": ["fc.weight_exp"],
        "b.safetensors": ["fc.weight", "steps", "fc.bias"],
        "c.safetensors": ["fc.weight_scale", "norm.weight"],
    }
    for shard, names in shards.items():
        (path / shard).write_bytes(piece(names, config=False))
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "inq.json").write_text(json.dumps(malformed.File().config))
    assert same_entries(inq.load(path), good_entries())
    assert len(inspect(path).layers) == 1
    transcode.export_dense(path, tmp_path / "dense")
    assert sorted(os.listdir(tmp_path / "dense")) == ["b.safetensors", "c.safetensors", "model.safetensors.index.json"]


def virtual_memory():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


@contextmanager
def at_most(megabytes):
    """The process may take no more than so much memory in addition, of any kind, mapped files included."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (virtual_memory() + (megabytes << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_the_memory_limit_limits():
    with at_most(64), pytest.raises((MemoryError, RuntimeError)):
        torch.empty(128 << 20, dtype=torch.uint8)


@pytest.mark.parametrize("name", CASES)
def test_malformed_is_refused_with_its_message_before_any_large_allocation(tmp_path, monkeypatch, name):
    case = CASES[name]
    path = case.write(tmp_path)
    if not case.reads:
        monkeypatch.setattr(files, "open_tensors", lambda *args: pytest.fail("tensors were read"))
    model = nn.Module()
    model.fc, model.norm = nn.Linear(10, 3), nn.LayerNorm([2, 3], bias=False)
    model.register_buffer("steps", torch.tensor(0))
    before = snapshot(model)
    with at_most(64):
        for arguments in ((), (model,)):
            with pytest.raises(inq.CheckpointError, match=case.message) as caught:
                inq.load(path, *arguments)
            # One message that names the file and is short enough to be read.
            assert str(tmp_path) in str(caught.value)
            assert len(str(caught.value)) < 2000
    assert snapshot(model) == before


def test_a_claim_of_terabytes_in_a_manifest_that_agrees_with_itself(tmp_path):
    """All sizes fit together; only the file is short of four terabytes."""
    file = malformed.File()
    file.manifest["norm.weight"]["shape"] = [1 << 40]
    begin = file.header["norm.weight"]["data_offsets"][0]
    rest = [n for n in file.manifest if file.header[n]["data_offsets"][0] > begin]
    file.header["norm.weight"] = malformed.info("F32", [1 << 40], [begin, begin + (1 << 42)])
    for name in rest:
        file.header[name]["data_offsets"] = [o + (1 << 42) - 24 for o in file.header[name]["data_offsets"]]
    with at_most(64), pytest.raises(inq.CheckpointError, match=r"expected 43980465\d+ bytes of tensors, got \d+"):
        inq.load(file.write(tmp_path))


# --- fuzzing ----------------------------------------------------------------------------------------------------------


def mutate(content, rng):
    """One change: a bit, a byte, a piece cut out, put in, doubled or moved, or the end cut off; more often near the
    start, where the header is."""
    content = bytearray(content)
    at = rng.randrange(len(content) if rng.random() < 0.7 else min(len(content), 64))
    size = rng.choice([1, 1, 2, 4, 8, 100])
    kind = rng.randrange(8)
    if kind <= 1:
        content[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        content[at] = rng.choice(b'0123456789{}[],:"\\-e. \0\xffaZ')
    elif kind == 3:
        del content[at : at + size]
    elif kind == 4:
        content[at:at] = bytes(rng.randrange(256) for _ in range(size))
    elif kind == 5:
        content[at:at] = content[at : at + size]
    elif kind == 6:
        to = rng.randrange(len(content))
        content[to : to + size] = content[at : at + size]
    else:
        del content[at:]
    return bytes(content)


def loads_the_same_or_is_refused(path, content, good):
    path.write_bytes(content)
    try:
        entries = inq.load(path)
    except inq.CheckpointError:
        return False
    assert same_entries(entries, good), "loaded, but other values"
    return True


@pytest.mark.parametrize("seed", range(4))
def test_a_mutated_file_loads_the_same_or_is_refused(tmp_path, seed):
    rng, good, base = random.Random(seed), good_entries(), good_bytes()
    refused = sum(
        not loads_the_same_or_is_refused(tmp_path / "x.safetensors", mutate(base, rng), good) for _ in range(4000)
    )
    # Changes in the producer's name or the ignore list change no tensor; almost all else is noticed.
    assert refused > 3600


def test_every_byte_of_a_file_matters_or_changes_no_value(tmp_path):
    good, base = good_entries(), good_bytes()
    start = 8 + int.from_bytes(base[:8], "little")
    accepted = []
    for at in range(len(base)):
        content = bytearray(base)
        content[at] ^= 0x01
        if loads_the_same_or_is_refused(tmp_path / "x.safetensors", bytes(content), good):
            accepted.append(at)
    assert not [at for at in accepted if at >= start], "a changed bit of data was accepted"
    # In the header it is the producer (name and version), the free text "pt", and key names that are not ours.
    text = bytes(base[at] for at in accepted).decode()
    assert len(text) < 64, text


@quick
@given(data=st.data())
def test_mutations_that_hypothesis_finds(tmp_path_factory, data):
    content = bytearray(good_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(len(content) - 1, 0)))
        end = data.draw(st.integers(at, min(at + 40, len(content))))
        content[at:end] = data.draw(st.binary(max_size=40))
    path = tmp_path_factory.getbasetemp() / "hypothesis.safetensors"
    loads_the_same_or_is_refused(path, bytes(content), good_entries())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)


@quick
@given(data=st.data())
def test_any_json_in_any_place_loads_the_same_or_is_refused(tmp_path_factory, data):
    """Correctly signed, so that it is the checks behind the checksums that must hold."""
    file = malformed.File()
    where = data.draw(st.sampled_from(["header", "manifest", "config"]))
    tree = getattr(file, where)
    keys = [(tree, key) for key in tree]
    keys += [(tree[key], inner) for key in tree if isinstance(tree[key], dict) for inner in tree[key]]
    parent, key = data.draw(st.sampled_from(keys))
    if where == "header" and (key == "__metadata__" or parent is file.metadata):
        file.bytes()
        parent[key] = data.draw(json_values)
        content = malformed.assemble(file.header, file.data)
    else:
        parent[key] = data.draw(json_values)
        content = file.bytes()
    path = tmp_path_factory.getbasetemp() / "json.safetensors"
    path.write_bytes(content)
    # A lie that agrees with itself may load: a name in ignore, the dtype before packing. But nothing else is raised.
    with suppress(inq.CheckpointError):
        inq.load(path)


# --- into a model -----------------------------------------------------------------------------------------------------


def faults(model_path):
    """(what, a model that cannot take the file, the message)."""
    renamed = small_model()
    renamed.add_module("8", nn.Linear(2, 2))
    yield "missing", renamed, r"missing '8.bias', '8.weight'; unexpected none"
    fewer = small_model()[:7]
    yield "unexpected", fewer, r"missing none; unexpected '7.weight'"
    without = small_model()
    del without._modules["6"]
    yield "unexpected packed", without, r"missing none; unexpected .*'6.weight_exp'"
    wider = small_model()
    wider[7] = nn.Embedding(6, 8)
    yield "shape", wider, r"tensor '7.weight': expected torch.float32 \[6, 8\] of the model, got torch.float32 \[5, 8\]"
    half = small_model()
    half[1].half()
    yield "dtype", half, r"tensor '1.\w+': expected torch.float16 \[8\] of the model, got torch.float32 \[8\]"
    longer = small_model()
    longer[3] = nn.Linear(33, 8, bias=False)
    yield "packed shape", longer, r"tensor '3.weight': expected shape \[8, 33\] of the model's module, got \[8, 32\]"
    other = small_model()
    inq.convert(other, inq.Format(4))
    yield "format", other, r"tensor '0.weight': expected 4-bit paper.* of the model's module, got 5-bit paper"
    subclass = small_model()
    subclass[3] = type("MyLinear", (nn.Linear,), {})(32, 8, bias=False)
    yield "subclass", subclass, r"'3.weight': expected a module that can be packed, got MyLinear: is a subclass"
    embedding = small_model()
    embedding[3] = nn.Embedding(8, 32)
    yield "kind", embedding, r"'3.weight': expected a module that can be packed, got Embedding: no packed module"
    packed = converted()
    packed[7] = inq.Linear(8, 5, bias=False, fmt=inq.Format(4))
    yield "not packed", packed, r"'7.weight': expected a packed weight for the model's inq.Linear, got torch.float32"
    biased = small_model()
    biased[3] = nn.Linear(32, 8)
    yield "bias", biased, r"missing '3.bias'; unexpected none"
    tied = small_model()
    tied[3] = nn.Linear(32, 8, bias=False)
    tied.add_module("8", nn.Linear(32, 8, bias=False))
    tied[8].weight = tied[3].weight
    yield "tied", tied, r"'3.weight': expected a module that can be packed, got Linear: its weight is shared with '8'"


@pytest.mark.parametrize("index", range(12))
def test_a_model_that_does_not_fit_is_left_as_it_was(tmp_path, index):
    inq.save(converted(), tmp_path / "model.safetensors")
    cases = list(faults(tmp_path))
    assert len(cases) == 12
    _, model, message = cases[index]
    before = snapshot(model)
    with pytest.raises(inq.CheckpointError, match=f"model.safetensors: .*{message}"):
        inq.load(tmp_path / "model.safetensors", model)
    assert snapshot(model) == before


def test_damaged_data_leaves_the_model_as_it_was(tmp_path):
    path = tmp_path / "model.safetensors"
    inq.save(converted(), path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for model in (small_model(1), converted()):
        before = snapshot(model)
        with pytest.raises(inq.CheckpointError, match="damaged data"):
            inq.load(path, model)
        assert snapshot(model) == before


@pytest.mark.parametrize("step", range(30))
@pytest.mark.parametrize("start", ["float", "packed", "meta"])
def test_a_commit_that_fails_halfway_is_undone(tmp_path, monkeypatch, step, start):
    """An error after each step of the commit: whichever it is, all of the model is as it was."""
    inq.save(converted(), tmp_path / "model.safetensors")
    model = {"float": small_model, "packed": converted, "meta": lambda seed: small_model(seed).to("meta")}[start](1)
    if start == "packed":
        assert not same_state(model, converted())
    before = snapshot(model) if start != "meta" else [(n, id(p)) for n, p in model.state_dict(keep_vars=True).items()]
    remembered, real = 0, checkpoint._Undo.remember

    def interrupted(self, *args):
        nonlocal remembered
        remembered += 1
        if remembered > step:
            raise KeyboardInterrupt
        real(self, *args)

    monkeypatch.setattr(checkpoint._Undo, "remember", interrupted)
    try:
        inq.load(tmp_path / "model.safetensors", model)
    except KeyboardInterrupt:
        after = (
            snapshot(model) if start != "meta" else [(n, id(p)) for n, p in model.state_dict(keep_vars=True).items()]
        )
        assert after == before
    else:
        assert remembered <= step
        assert same_state(model, converted())
    assert step == 0 or remembered > 1


def test_parameters_stay_the_same_objects(tmp_path):
    """So that an optimizer made before goes on, and ties stay."""
    inq.save(converted(), tmp_path / "m.safetensors")
    for model in (small_model(1), converted(1)):
        ids = {name: id(p) for name, p in model.named_parameters() if name.endswith("bias") or name[0] in "17"}
        requires = {name: p.requires_grad for name, p in model.named_parameters()}
        inq.load(tmp_path / "m.safetensors", model)
        after = dict(model.named_parameters())
        assert {name: id(after[name]) for name in ids} == ids
        assert all(after[n].requires_grad == (requires[n] and after[n].dtype != torch.uint8) for n in ids)


def test_hooks_mode_strides_and_frozen_biases_stay(tmp_path):
    model = small_model(1)
    model.append(nn.Conv2d(2, 2, 3))
    model.eval().to(memory_format=torch.channels_last)
    source = converted()
    source.append(nn.Conv2d(2, 2, 3))
    inq.save(source, tmp_path / "m.safetensors")
    model[0].bias.requires_grad_(False)
    called = []
    model[3].register_forward_hook(lambda *args: called.append(1))
    inq.load(tmp_path / "m.safetensors", model)
    assert not any(m.training for m in model.modules())
    assert model[8].weight.is_contiguous(memory_format=torch.channels_last)
    assert same_bits(model[8].weight.contiguous(), source[8].weight)
    assert not model[0].bias.requires_grad
    model[3](torch.ones(1, 32))
    assert called == [1]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head, self.fc = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False), nn.Linear(4, 4)
        self.head.weight = self.embedding.weight
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("cache", torch.ones(2), persistent=False)


def tied():
    model = Tied()
    inq.convert(model, inq.Format(4))
    return model


@pytest.mark.filterwarnings("ignore:.*only .* of the parameter bytes were packed")
def test_tied_weights_are_stored_for_each_name_and_stay_tied(tmp_path):
    model = tied()
    inq.save(model, tmp_path / "m.safetensors")
    entries = inq.load(tmp_path / "m.safetensors")
    assert same_bits(entries["head.weight"], entries["embedding.weight"])
    assert set(entries) == {"embedding.weight", "head.weight", "fc.weight", "fc.bias", "steps"}
    with torch.device("meta"):
        on_meta = Tied()
    for other in (Tied(), on_meta):
        inq.load(tmp_path / "m.safetensors", other)
        assert other.head.weight is other.embedding.weight
        assert isinstance(other.head.weight, nn.Parameter)
        assert same_state(other, model)
    # The buffer that is not persistent is the caller's matter.
    assert other.cache.device.type == "meta"

    entries["head.weight"] = entries["head.weight"] + 1
    inq.save(entries, tmp_path / "m.safetensors")
    other = Tied()
    before = snapshot(other)
    with pytest.raises(inq.CheckpointError, match=r"'head.weight': expected the values of 'embedding.weight'.*shares"):
        inq.load(tmp_path / "m.safetensors", other)
    assert snapshot(other) == before


def test_a_shared_module_needs_the_same_values_under_each_name(tmp_path):
    entries = dict(file_format_entries(converted()))
    entries["6.weight"] = random_packed(inq.Format(4), 8, 8, n1=0)
    inq.save(entries, tmp_path / "m.safetensors")
    with pytest.raises(inq.CheckpointError, match="tensor '6.weight.*': expected the values of '4.weight"):
        inq.load(tmp_path / "m.safetensors", small_model())


def test_a_packed_module_alone(tmp_path):
    layer = inq.Linear.from_float(nn.Linear(9, 4), inq.Format(5))
    inq.save(layer, tmp_path / "m.safetensors")
    assert set(inq.load(tmp_path / "m.safetensors")) == {"weight", "bias"}
    other = inq.Linear(9, 4, fmt=inq.Format(5))
    assert same_state(inq.load(tmp_path / "m.safetensors", other), layer)
    with pytest.raises(inq.CheckpointError, match="got Linear: is the model itself: load into an inq.Linear"):
        inq.load(tmp_path / "m.safetensors", nn.Linear(9, 4))


def test_a_scale_comes_and_goes(tmp_path):
    layer = inq.Linear.from_float(nn.Linear(9, 4), inq.Format(5))
    with_scale = copy.deepcopy(layer)
    with_scale._set_codes(layer.weight, layer.weight_exp, torch.rand(4, 1))
    inq.save(layer, tmp_path / "without.safetensors")
    inq.save(with_scale, tmp_path / "with.safetensors")
    for path, expected in ((tmp_path / "with.safetensors", with_scale), (tmp_path / "without.safetensors", layer)):
        for start in (layer, with_scale):
            assert same_state(inq.load(path, copy.deepcopy(start)), expected)


def test_the_hub_s_cache_may_link_to_its_blobs(tmp_path):
    """snapshots/REVISION/model.safetensors is a link to ../../blobs/HASH; nothing else may leave the directory."""
    repository = tmp_path / "models--me--net"
    snapshot_directory = repository / "snapshots" / "abc"
    snapshot_directory.mkdir(parents=True)
    (repository / "blobs").mkdir()
    model = converted()
    inq.save(model, tmp_path / "model")
    for index, name in enumerate(["inq.json", "model.safetensors"]):
        (tmp_path / "model" / name).rename(repository / "blobs" / str(index))
        (snapshot_directory / name).symlink_to(f"../../blobs/{index}")
    assert same_state(inq.load(snapshot_directory, small_model(1)), model)
    (repository / "blobs" / "1").rename(tmp_path / "elsewhere")
    (repository / "blobs" / "1").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(inq.CheckpointError, match=r"model.safetensors: expected a file inside .*, got a link to"):
        inq.load(snapshot_directory)


def test_a_config_of_transformers_serves_as_well(tmp_path):
    path = malformed.model_directory(tmp_path)
    config = json.loads((path / "inq.json").read_text())
    (path / "config.json").write_text(
        json.dumps({"model_type": "x", "limit": float("inf"), "quantization_config": config})
    )
    assert same_entries(inq.load(path), good_entries())  # both, and they agree
    (path / "inq.json").unlink()
    assert same_entries(inq.load(path), good_entries())


# --- save refuses -----------------------------------------------------------------------------------------------------


class ExtraState(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = inq.Linear.from_float(nn.Linear(8, 8), inq.Format(4))

    def get_extra_state(self):
        return {"a": 1}


def _odd_name():
    model = converted()
    model.add_module("a/b", nn.Linear(2, 2))
    return model


def _negative_zero():
    model = converted()
    model[3]._lay_out("storage")
    model[3].weight.data[0, 0] = 0b100 | int(model[3].weight[0, 0]) & ~0b111
    return model


def _minus_128():
    model = converted()
    model[3].weight_exp.data[0] = -128
    return model


def _nan_scale():
    model = converted()
    model[3]._set_codes(model[3].weight, model[3].weight_exp, torch.full((8, 1), float("nan")))
    return model


def _unknown_layout():
    packed = random_packed(inq.Format(4), 2, 2)
    object.__setattr__(packed, "layout", "tiles")
    return {"a.weight": packed}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (small_model, ValueError, "expected at least one packed module, got none: call inq.convert first"),
        (ExtraState, ValueError, "expected a state_dict of parameters and persistent buffers, got '_extra_state'"),
        (_odd_name, inq.CheckpointError, "expected tensor names of 1 to 512 of .*, got 'a/b.weight'"),
        (_negative_zero, inq.CheckpointError, "tensor '3.weight': expected canonical codes .* got 1"),
        (_minus_128, inq.CheckpointError, r"tensor '3.weight_exp': expected exponents in .*, got \[-128"),
        (_nan_scale, inq.CheckpointError, "tensor '3.weight_scale': expected finite row scales, got 8 of 8"),
        (lambda: converted().to("meta"), ValueError, "tensor '0.weight_exp': expected a tensor with values, got one"),
        (lambda: inq.Linear(3, 0, bias=False, fmt=inq.Format(4)), inq.CheckpointError,
         r"tensor 'weight': expected a weight with elements, got shape \[0, 3\]"),
        (_unknown_layout, ValueError, r"layout: expected one of \('storage', 'cpu16', .*\), got 'tiles'"),
        (lambda: {"a": random_packed(inq.Format(4), 2, 2)}, inq.CheckpointError, "expected a packed weight's name to"),
        (lambda: {"weight": random_packed(inq.Format(4), 2, 2), "weight_exp": torch.ones(1)}, inq.CheckpointError,
         "expected each tensor once, got 'weight_exp' twice"),
        (lambda: {"a.weight": random_packed(inq.Format(4), 2, 2), "b.weight": torch.zeros(2, 1, dtype=torch.uint8),
                  "b.weight_exp": torch.zeros(2, 1, dtype=torch.int8)}, inq.CheckpointError,
         "tensor 'b.weight': expected a packed weight, since 'b.weight_exp' is there, got a plain one"),
        (lambda: {"weight": random_packed(inq.Format(4), 2, 2), ".weight": random_packed(inq.Format(5), 2, 2)},
         inq.CheckpointError, "tensor '.weight': expected a packed weight's name to"),
        (lambda: 3, TypeError, "expected a torch.nn.Module or a mapping, got int"),
    ],
)  # fmt: skip
def test_save_refuses_and_writes_nothing(path, make, error, message):
    inq.save(converted(), path)
    before = inq.load(path)
    with pytest.raises(error, match=message):
        inq.save(make(), path)
    assert same_entries(inq.load(path), before)
    assert os.listdir(path.parent) == [path.name]


def test_load_refuses_what_is_no_module(tmp_path):
    with pytest.raises(TypeError, match=r"inq.load: model: expected a torch.nn.Module, got dict"):
        inq.load(tmp_path / "m.safetensors", {})


def test_the_dtype_before_packing_is_recorded(tmp_path):
    def recorded(model):
        inq.save(model, tmp_path / "m.safetensors")
        manifest = file_format.open_checkpoint(tmp_path / "m.safetensors").manifest
        return {name: entry.dtype for name, entry in manifest.items() if entry.format}

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.LayerNorm(8))
    inq.convert(model, inq.Format(4))
    assert recorded(model) == {"0.weight": torch.float32, "1.weight": torch.float32}
    assert recorded(model.bfloat16()) == {"0.weight": torch.bfloat16, "1.weight": torch.bfloat16}
    # float16 does not hold 2^20, and a product with a row scale is no power of two.
    model.half()
    model[0].weight_exp.data[:] = 20
    assert recorded(model) == {"0.weight": torch.float32, "1.weight": torch.float16}
    model[1]._set_codes(model[1].weight, model[1].weight_exp, torch.ones(8, 1))
    assert recorded(model) == {"0.weight": torch.float32, "1.weight": torch.float32}


# --- inspect and verify -----------------------------------------------------------------------------------------------


def test_inspect_counts(path):
    fmt = inq.Format(2)
    # 16 weights: half zero, a quarter each of 1 and −1: 1.5 bits of entropy.
    w = torch.tensor([[0.0, 1.0, 0.0, -1.0] * 2, [0.0, 1.0, 0.0, -1.0] * 2])
    entries = {"a.weight": inq.pack(w, fmt), "n.weight": torch.ones(4, dtype=torch.float16), "i": torch.tensor(3)}
    inq.save(entries, path)
    summary = inspect(path)
    (layer,) = summary.layers
    assert (layer.name, layer.shape, layer.format, layer.exponents) == ("a", (2, 8), fmt, (0, 0))
    assert layer.bits == 8 * (4 + 2) / 16
    assert (layer.zeros, layer.entropy) == (0.5, 1.5)
    assert summary.float32_bytes == 64 + 16 + 8
    file = path if path.is_file() else path / "model.safetensors"
    assert summary.file_bytes == file.stat().st_size
    assert (summary.tensors, summary.files) == (4, 1)
    assert verify(path) == 4


def test_large_weights_are_checked_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(file_format, "_CHUNK", 16)
    entries = {"a.weight": random_packed(inq.Format(5), 9, 7), "b.weight": random_packed(inq.Format(3), 3, 50)}
    inq.save(entries, tmp_path / "m.safetensors")
    assert same_entries(inq.load(tmp_path / "m.safetensors"), entries)
    layers = {layer.name: layer for layer in inspect(tmp_path / "m.safetensors").layers}
    for name, packed in entries.items():
        zeros = (inq.unpack(packed) == 0).double().mean()
        assert layers[name.removesuffix(".weight")].zeros == pytest.approx(float(zeros), abs=1e-12)
    entries["a.weight"].weight[8, 4] |= 0x80  # the last code of the last row is padding
    with pytest.raises(inq.CheckpointError, match="got 1 that are not"):
        inq.save(entries, tmp_path / "m.safetensors")


# --- kill -9 ----------------------------------------------------------------------------------------------------------

KILLED = """
    import os, random, signal, sys, time
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    import inq_kernels as inq
    from inq_kernels.checkpoint import verify

    directory, kills = Path(sys.argv[1]), int(sys.argv[2])
    fmt = inq.Format(4)
    packed = inq.pack(inq.quantize(torch.randn(32, 32), fmt), fmt)
    states = [{"a.weight": packed, "n.weight": torch.full((10,), float(i))} for i in range(2)]
    paths = [directory / "m.safetensors", directory / "model"]

    def save(i):
        for path in paths:
            inq.save(states[i], path)

    start = time.monotonic()
    save(0)
    save(1)
    span = time.monotonic() - start
    seen, rng = set(), random.Random(1)
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            i = 0
            while True:
                save(i % 2)
                i += 1
        time.sleep(rng.random() * span)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert [verify(path) for path in paths] == [3, 3]
        seen.add(tuple(float(inq.load(path)["n.weight"][0]) for path in paths))
    print(len(seen))
"""


def test_killed_while_saving_the_checkpoint_verifies(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), "100"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 2  # kills at different moments
