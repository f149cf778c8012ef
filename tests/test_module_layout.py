"""A packed module holds its weight in one layout: its device's kernels', after the first call; files have another."""

import copy
import io
import threading

import pytest
import torch
from support import compiles, same_bits
from torch import nn

import inq_kernels as inq
from inq_kernels import layouts, ops

FMT = inq.Format(5, granularity="channel")


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return inq.Linear.from_float(nn.Linear(70, 20), FMT)


@pytest.fixture
def x():
    return torch.randn(3, 70, generator=torch.Generator().manual_seed(1))


def layout(module):
    return layouts.layout_of(module.weight)


def test_the_first_call_lays_out(layer, x):
    stored = layer.weight.clone()
    assert layout(layer) == "storage"
    y = layer(x)
    assert layout(layer) == "cpu16"
    assert layer.weight.numel() == 2 * 3 * 320
    assert not layer.weight.requires_grad
    assert same_bits(layer(x), y)
    assert same_bits(layer.state_dict()["weight"], stored)
    assert layout(layer) == "cpu16"


def test_one_layout_at_a_time(layer, x):
    layer(x)
    held = {id(t) for t in (*layer.parameters(), *layer.buffers())}
    tensors = [v for v in vars(layer).values() if isinstance(v, torch.Tensor)]
    assert len(held) == 3
    assert tensors == []
    assert layer.packed.weight is layer.weight
    assert layer.packed is layer.packed


def test_what_the_cpu_kernels_do_not_compute_stays_as_it_is(layer, x):
    layer(x.double())
    layer(x.half())
    assert layout(layer) == "storage"
    layer(x)
    # The reference reads every layout.
    assert torch.allclose(layer(x.double()).float(), layer(x), atol=1e-5)


def test_a_forced_reference_keeps_storage(layer, x):
    layer.backend = "reference"
    layer(x)
    assert layout(layer) == "storage"


def test_the_environment_forces_too(layer, x, monkeypatch):
    monkeypatch.setenv("INQ_BACKEND", "reference")
    layer(x)
    inq.prepack(layer)
    assert layout(layer) == "storage"


def test_prepack_walks_a_model(x):
    model = nn.Sequential(nn.Linear(70, 20), nn.ReLU(), nn.Conv1d(1, 1, 1))
    inq.convert(model, FMT, skip="2")
    assert layout(model[0]) == "cpu16"
    # What reads the weight directly finds the same layout after loading: a compiled model would not lay out again.
    model.load_state_dict(model.state_dict())
    assert layout(model[0]) == "cpu16"
    model[0]._lay_out("storage")
    assert inq.prepack(model) is model
    assert layout(model[0]) == "cpu16"
    with pytest.raises(TypeError, match=r"^inq.prepack: model: expected a torch.nn.Module, got PackedWeight$"):
        inq.prepack(model[0].packed)


def test_a_loaded_model_is_laid_out(tmp_path, layer, x):
    y = layer(x)
    inq.save(nn.Sequential(layer), tmp_path / "m.safetensors")
    other = inq.load(tmp_path / "m.safetensors", nn.Sequential(nn.Linear(70, 20)))
    assert layout(other[0]) == "cpu16"
    assert same_bits(other(x), y)


@pytest.mark.parametrize("keep_vars", [False, True])
def test_a_state_dict_in_and_out(layer, x, keep_vars):
    y = layer(x)
    state = layer.state_dict(keep_vars=keep_vars)
    assert all(isinstance(t, nn.Parameter) == keep_vars for t in state.values())
    for assign in (False, True):
        other = inq.Linear(70, 20, fmt=FMT)
        other(x)
        other.load_state_dict(state, assign=assign)
        assert same_bits(other(x), y)


def test_a_bad_state_dict_changes_nothing(layer, x):
    y = layer(x)
    state = layer.state_dict()
    state["weight"] = state["weight"][:, :5]
    with pytest.raises(RuntimeError, match=r"weight: expected shape \[20, 45\], got \[20, 5\]"):
        layer.load_state_dict(state)
    assert same_bits(layer(x), y)


def test_copies_and_pickles(layer, x):
    y = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert same_bits(other(x), y)
        assert other.weight.data_ptr() != layer.weight.data_ptr()
        assert other.packed.weight is other.weight


def test_moves_and_casts(layer, x):
    y = layer(x)
    layer.to(torch.bfloat16)
    assert layout(layer) == "cpu16"
    assert layer.bias.dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32
    layer.float()
    assert torch.allclose(layer(x), y, atol=0.01)
    layer.share_memory()
    layer(x)
    assert layer.weight.is_shared()
    meta = layer.to("meta")
    assert tuple(meta.weight.shape) == (20, 45)


def test_a_parameter_that_is_given_other_data(layer, x):
    y, stored = layer(x), layer.state_dict()["weight"]
    layer.weight.data = stored.clone()
    assert layer.packed.layout == "storage"
    assert same_bits(layer(x), y)


def test_all_parts_are_on_one_device(layer):
    packed = layer.packed
    with pytest.raises(ValueError, match=r"^weight_exp: expected device cpu of the weight, got meta$"):
        inq.PackedWeight(packed.weight, packed.weight_exp.to("meta"), None, FMT, packed.shape)


def test_inference_mode_leaves_nothing_behind(layer, x):
    with torch.inference_mode():
        y = layer(x)
    assert not layer.weight.is_inference()
    x.requires_grad_()
    layer(x).sum().backward()
    assert same_bits(layer(x).detach(), y.clone())


def test_many_threads_call_for_the_first_time(layer, x):
    expected = copy.deepcopy(layer)(x)
    results, barrier = [], threading.Barrier(8)

    def run():
        barrier.wait()
        results.append(layer(x))

    pool = [threading.Thread(target=run) for _ in range(8)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    assert len(results) == 8
    assert all(same_bits(y.detach(), expected.detach()) for y in results)


@compiles
@pytest.mark.parametrize("laid_out", [False, True])
def test_compiled_from_either_layout(layer, x, laid_out):
    expected = copy.deepcopy(layer)(x)
    if laid_out:
        inq.prepack(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(x).detach(), expected.detach())
    assert layout(layer) == ("cpu16" if laid_out else "storage")


def test_a_fake_tensor_mode_leaves_real_weights(layer, x):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = layer(mode.from_tensor(x))
    assert tuple(y.shape) == (3, 20)
    assert type(layer.weight.data) is torch.Tensor
    assert layer(x).isfinite().all()


def test_packed_weights_in_another_layout(layer):
    packed = layer.packed
    assert ops.prepack(packed, "storage") is packed
    tiled = ops.prepack(packed)
    assert (tiled.layout, tiled.shape, tiled.weight_exp) == ("cpu16", (20, 70), packed.weight_exp)
    assert same_bits(ops.prepack(tiled, "storage").weight, packed.weight)
    assert same_bits(inq.unpack(tiled), inq.unpack(packed))
    with pytest.raises(ValueError, match="layout: expected one of"):
        ops.prepack(packed, "tiles")
    with pytest.raises(ValueError, match=r"weight: expected shape \[2, 3, 320\], got \[20, 45\]"):
        inq.PackedWeight(packed.weight, packed.weight_exp, None, FMT, (20, 70), "cpu16")
