"""inq.Linear and inq.Conv2d in place of torch.nn's; convert is all or nothing and says what stayed float, and why."""

import copy
import math
import pickle

import numpy
import pytest
import torch
import torch.nn.functional as F
from support import compiles
from torch import nn
from torch.nn.utils import prune

import inq_kernels as inq

FMT = inq.Format(4)


def quantized(module, fmt=FMT):
    """The float module with the weights that its packed form will have."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        module.weight.copy_(inq.quantize(module.weight, fmt))
    return module


CONVOLUTIONS = {
    "plain": dict(kernel_size=3),
    "stride": dict(kernel_size=3, stride=2, padding=1),
    "same": dict(kernel_size=(3, 2), padding="same", dilation=2),
    "valid": dict(kernel_size=3, padding="valid", bias=False),
    "depthwise": dict(kernel_size=3, groups=4, padding=(2, 0)),
    "circular": dict(kernel_size=3, padding=1, padding_mode="circular"),
    "reflect-same": dict(kernel_size=3, padding="same", padding_mode="reflect"),
}


@pytest.mark.parametrize("fmt", [inq.Format(2), inq.Format(5, "dense", "channel")])
@pytest.mark.parametrize("kind", ["linear", "linear-no-bias", *CONVOLUTIONS])
def test_from_float_computes_what_the_quantized_module_does_and_to_float_gives_it_back(kind, fmt):
    torch.manual_seed(0)
    if kind in CONVOLUTIONS:
        m, x, packed_type = nn.Conv2d(4, 8, **CONVOLUTIONS[kind]), torch.randn(2, 4, 9, 8), inq.Conv2d
    else:
        m, x, packed_type = nn.Linear(13, 7, bias=kind == "linear"), torch.randn(2, 3, 13), inq.Linear
    m.eval()
    fake = quantized(m, fmt)
    packed = packed_type.from_float(m, fmt)
    assert isinstance(packed, type(m))
    assert not packed.training
    torch.testing.assert_close(packed(x), fake(x), rtol=1e-5, atol=1e-6)
    back = packed.to_float()
    assert type(back) is type(m)
    assert back.extra_repr() == m.extra_repr()
    assert torch.equal(back.weight, fake.weight)
    assert torch.equal(back(x), fake(x))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("levels", ["paper", "dense"])
@pytest.mark.parametrize("rule", ["max", "mse"])
def test_weights_on_the_grid_are_kept_exactly_by_both_rules(rule, levels, granularity):
    """After INQ, n1 was fixed long ago and is not given again: any n1 without error will do, and one is found."""
    for bits in (2, 3, 4, 5):
        fmt = inq.Format(bits, levels, granularity, rule)
        m = nn.Linear(64, 4)
        with torch.no_grad():
            for n1 in (-3, -5):  # the first saturates nothing, the second nearly everything
                m.weight.copy_(inq.quantize(m.weight, fmt, torch.full((4, 1), n1, dtype=torch.int8)))
                assert torch.equal(inq.Linear.from_float(m, fmt).to_float().weight, m.weight)


def test_n1_can_be_given():
    m = nn.Linear(8, 4)
    n1 = torch.full((4, 1), -3, dtype=torch.int8)
    assert torch.equal(inq.Linear.from_float(m, FMT, n1).to_float().weight, inq.quantize(m.weight, FMT, n1))


def test_hooks_and_bias_gradient_settings_are_taken_over():
    m = nn.Linear(3, 2)
    m.bias.requires_grad_(False)
    calls = []
    m.register_forward_hook(lambda *_: calls.append("after"))
    m.register_forward_pre_hook(lambda *_, **__: calls.append("before"), with_kwargs=True)
    packed = inq.Linear.from_float(m, FMT)
    packed(torch.ones(1, 3))
    assert calls == ["before", "after"]
    assert not packed.bias.requires_grad


def test_handles_of_hooks_still_remove_them_after_convert():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    calls = []
    forward = model[0].register_forward_hook(lambda *_: calls.append("forward"))
    backward = model[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    inq.convert(model, FMT)
    model(torch.ones(1, 3, requires_grad=True)).sum().backward()
    assert calls == ["forward", "backward"]
    forward.remove()
    backward.remove()
    model(torch.ones(1, 3, requires_grad=True)).sum().backward()
    assert calls == ["forward", "backward"]


def test_a_failed_move_keeps_the_row_scale():
    packed = inq.fold_batchnorm(inq.Linear.from_float(nn.Linear(5, 3), FMT), nn.BatchNorm1d(3))

    def no_memory(_):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        packed._apply(no_memory)
    assert packed.weight_scale is not None


@compiles  # torch.func.jvp scripts something of torch's own
@pytest.mark.parametrize(
    "transform", [torch.func.grad, torch.func.vmap, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))]
)
def test_functorch_is_refused_instead_of_answered_with_zeros(transform):
    packed = inq.Linear.from_float(nn.Linear(5, 3), FMT).packed
    with pytest.raises(RuntimeError, match="one inside a torch.func transform"):
        transform(lambda x: inq.linear(x, packed).sum())(torch.randn(2, 5))


def test_a_bias_inside_a_transform_is_refused_too():
    """And one that a transform has leaked."""
    packed, leaked = inq.Linear.from_float(nn.Linear(5, 3), FMT).packed, []
    x = torch.randn(2, 5, requires_grad=True)

    def f(bias):
        leaked.append(bias)
        return inq.linear(x, packed, bias).sum()

    with pytest.raises(RuntimeError, match=r"bias: expected a plain tensor, got one inside a torch.func transform"):
        torch.func.grad(f)(torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"bias: expected a plain tensor, got one inside a torch.func transform"):
        f(leaked[0])


def test_gradients_reach_x_and_bias_only():
    packed = inq.Linear.from_float(nn.Linear(5, 3), FMT)
    x = torch.randn(4, 5, requires_grad=True)
    packed(x).sum().backward()
    torch.testing.assert_close(x.grad, packed.to_float().weight.sum(0).expand(4, 5))
    assert torch.equal(packed.bias.grad, torch.full((3,), 4.0))
    assert [n for n, p in packed.named_parameters() if p.requires_grad] == ["bias"]


def test_state_dict_round_trip_deepcopy_and_pickle():
    torch.manual_seed(0)
    source = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)).eval()
    inq.convert(source, FMT)
    source[0] = inq.fold_batchnorm(source[0], source[1])
    assert {k: str(v.dtype) for k, v in source[0].state_dict().items()} == {
        "weight": "torch.uint8",
        "weight_exp": "torch.int8",
        "weight_scale": "torch.float32",
        "bias": "torch.float32",
    }
    assert list(source[3].state_dict()) == ["weight", "bias", "weight_exp"]
    x = torch.randn(2, 2, 4, 4)
    with torch.device("meta"):
        empty = nn.Sequential(
            inq.Conv2d(2, 4, 3, fmt=FMT), nn.BatchNorm2d(4), nn.Flatten(), inq.Linear(16, 3, fmt=FMT)
        ).eval()
    filled = copy.deepcopy(empty).to_empty(device="cpu")
    filled.load_state_dict(source.state_dict())
    assigned = copy.deepcopy(empty)
    assigned.load_state_dict(source.state_dict(), assign=True)
    for other in (copy.deepcopy(source), pickle.loads(pickle.dumps(source)), filled, assigned):
        assert torch.equal(other(x), source(x))


BAD_STATES = {
    "float-weight": ({"weight": torch.randn(4, 4)}, r"weight: expected torch.uint8 \(packed\), got torch.float32"),
    "float-exp": ({"weight_exp": torch.zeros(4, 1)}, r"weight_exp: expected torch.int8 \(packed\), got torch.float32"),
    "half-scale": ({"weight_scale": torch.ones(4, 1).half()}, "weight_scale: expected torch.float32"),
    "shape": ({"weight": torch.zeros(4, 8, dtype=torch.uint8)}, r"weight: expected shape \[4, 4\], got \[4, 8\]"),
    "exp-shape": ({"weight_exp": torch.zeros(4, dtype=torch.int8)}, r"weight_exp: expected shape \[4, 1\], got \[4\]"),
    "scale-shape": ({"weight_scale": torch.ones(4)}, r"weight_scale: expected shape \[4, 1\], got \[4\]"),
    "reserved": ({"weight": torch.full((4, 4), 1, dtype=torch.uint8)}, "got 16 that are not canonical"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_state_dict_that_does_not_fit_is_refused(case):
    """torch alone would copy a float [4, 4] into uint8 [4, 4], value by value."""
    packed = inq.Linear.from_float(nn.Linear(4, 4), FMT)
    before = copy.deepcopy(packed.state_dict())
    change, message = BAD_STATES[case]
    with pytest.raises(RuntimeError, match=message):
        packed.load_state_dict({**before, **change})
    assert all(torch.equal(before[k], v) for k, v in packed.state_dict().items())
    assert packed.weight_scale is None


def test_dtypes_and_devices():
    packed = inq.fold_batchnorm(inq.Linear.from_float(nn.Linear(5, 3), FMT), nn.BatchNorm1d(3))
    scale = packed.weight_scale.detach().clone()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        moved = copy.deepcopy(packed).to(dtype)
        assert moved(torch.randn(2, 5, dtype=dtype)).dtype == dtype
        assert moved.bias.dtype == dtype
        assert moved.to(torch.float32).weight_scale.dtype == torch.float32
        assert torch.equal(moved.weight_scale, scale), "the row scale must not pass through a smaller dtype"
    meta = packed.to("meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert meta(torch.randn(2, 5, device="meta")).shape == (2, 3)


def test_autocast():
    packed = inq.Linear.from_float(nn.Linear(5, 3), FMT)
    conv = inq.Conv2d.from_float(nn.Conv2d(1, 2, 3), FMT)
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(torch.randn(2, 5)).dtype == torch.bfloat16
        assert conv(torch.randn(2, 1, 5, 5)).dtype == torch.bfloat16
        assert packed(torch.randn(2, 5, dtype=torch.float64)).dtype == torch.float64


@compiles
@pytest.mark.parametrize("dynamic", [True, False])
def test_compile_fullgraph(dynamic):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding="same"), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    inq.convert(model, FMT)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    for b in (2, 3, 5):
        x = torch.randn(b, 1, 4, 4)
        torch.testing.assert_close(compiled(x), model(x))


def test_uint8_activations_meet_a_named_error():
    """Some models cast their input with ``x.to(layer.weight.dtype)``."""
    packed = inq.Linear.from_float(nn.Linear(5, 3), FMT)
    with pytest.raises(TypeError, match=r"got torch.uint8. \(Packed weights are uint8: a model that casts its input"):
        packed(torch.randn(2, 5).to(packed.weight.dtype))


def test_packed_weights_refuse_gradients_and_initialisation():
    packed = inq.Linear.from_float(nn.Linear(5, 3), FMT)
    with pytest.raises(ValueError, match=r"inq.Linear.requires_grad_: packed weights take no gradient; for the bias"):
        packed.requires_grad_()
    assert not packed.requires_grad_(False).bias.requires_grad
    with pytest.raises(RuntimeError, match="no random initialisation"):
        packed.reset_parameters()
    with pytest.raises(TypeError, match="fmt: expected an inq.Format, got 4"):
        inq.Linear(5, 3, fmt=4)
    with pytest.raises(TypeError, match="expected a torch.nn.Linear, got Conv2d"):
        inq.Linear.from_float(nn.Conv2d(1, 1, 1), FMT)
    with pytest.raises(TypeError, match="expected a torch.nn.Conv2d, got Linear"):
        inq.Conv2d.from_float(nn.Linear(1, 1), FMT)


# --- batch norm -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_fold_batchnorm(kind, bias, affine):
    torch.manual_seed(0)
    if kind == "conv":
        m, bn, x = nn.Conv2d(3, 6, 3, bias=bias), nn.BatchNorm2d(6, affine=affine), torch.randn(2, 3, 7, 7)
        packed = inq.Conv2d.from_float(m, FMT)
    else:
        m, bn, x = nn.Linear(9, 6, bias=bias), nn.BatchNorm1d(6, affine=affine), torch.randn(5, 9)
        packed = inq.Linear.from_float(m, FMT)
    nn.init.normal_(bn.running_mean)
    nn.init.uniform_(bn.running_var, 0.2, 4.0)
    if affine:
        nn.init.normal_(bn.weight)  # of both signs
        nn.init.normal_(bn.bias)
    bn.eval()
    folded = inq.fold_batchnorm(packed, bn)
    torch.testing.assert_close(folded(x), bn(packed(x)), rtol=1e-5, atol=1e-5)
    # And once more: scales multiply.
    torch.testing.assert_close(inq.fold_batchnorm(folded, bn)(x), bn(bn(packed(x))), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(folded.to_float()(x), folded(x), rtol=1e-5, atol=1e-5)


def test_fold_batchnorm_refuses_what_it_cannot_fold():
    packed = inq.Linear.from_float(nn.Linear(3, 4), FMT)
    with pytest.raises(TypeError, match="module: expected inq.Linear or inq.Conv2d, got Linear"):
        inq.fold_batchnorm(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(TypeError, match="bn: expected a torch.nn.BatchNorm, got LayerNorm"):
        inq.fold_batchnorm(packed, nn.LayerNorm(4))
    with pytest.raises(ValueError, match="expected 4 features, got 5"):
        inq.fold_batchnorm(packed, nn.BatchNorm1d(5))
    with pytest.raises(ValueError, match="track_running_stats=False"):
        inq.fold_batchnorm(packed, nn.BatchNorm1d(4, track_running_stats=False))
    bn = nn.BatchNorm1d(4)
    bn.running_mean[1] = math.nan
    with pytest.raises(ValueError, match="bn: running_mean: expected finite values, got 1 that are not"):
        inq.fold_batchnorm(packed, bn)
    flat = nn.BatchNorm1d(4, eps=0)
    flat.running_var[0] = 0
    with pytest.raises(ValueError, match="running_var: expected var"):
        inq.fold_batchnorm(packed, flat)


# --- convert ----------------------------------------------------------------------------------------------------------


class OwnLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 2)


def patched(linear):
    linear.forward = lambda x: x
    return linear


def adapted(linear):
    linear.lora = nn.Linear(4, 2)
    linear.register_buffer("calls", torch.zeros(1))
    return linear


def zoo():
    tied = nn.Linear(4, 4)
    embedding = nn.Embedding(4, 4)
    head = nn.Linear(4, 4, bias=False)
    head.weight = embedding.weight
    return nn.ModuleDict(
        {
            "fc": nn.Linear(64, 64),
            "conv": nn.Conv2d(3, 32, 3),
            "conv1d": nn.Conv1d(3, 8, 3),
            "attention": nn.MultiheadAttention(4, 2),
            "encoder": nn.TransformerEncoderLayer(4, 2, 8),
            "decoder": nn.TransformerDecoderLayer(4, 2, 8),
            "embedding": embedding,
            "head": head,
            "own": OwnLinear(4, 4),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "pruned": prune.l1_unstructured(nn.Linear(4, 4), "weight", 2),
            "twice": nn.ModuleList([tied, tied]),
            "rnn": nn.LSTM(4, 4),
            "patched": patched(nn.Linear(4, 4)),
            "adapted": adapted(nn.Linear(4, 4)),
            "bias_pruned": prune.l1_unstructured(nn.Linear(4, 4), "bias", 2),
            "bn": nn.BatchNorm2d(4),
            "packed": inq.Linear.from_float(nn.Linear(4, 4), FMT),
        }
    )


def test_convert_reports_what_stayed_float_and_why():
    model = zoo()
    report = inq.convert(model, FMT)
    packed = {m.name for m in report.modules if m.packed}
    assert packed == {"fc", "conv", "decoder.linear1", "decoder.linear2", "twice.0", "adapted.lora"}
    assert model["twice"][0] is model["twice"][1]
    assert isinstance(model["twice"][1], inq.Linear)
    why = {m.name: m.reason for m in report.modules if not m.packed}
    assert why["conv1d"] == "no packed module for Conv1d"
    assert why["attention.out_proj"] == "MultiheadAttention reads its weight directly"
    assert why["encoder.linear1"] == "TransformerEncoderLayer reads its weight directly"
    assert why["head"] == "its weight is shared with 'embedding'"
    assert why["embedding"] == "no packed module for Embedding"
    assert why["own"] == "is a subclass of Linear, whose forward may differ"
    assert why["normed"].startswith("its weight is computed from other parameters")
    assert why["pruned"].startswith("its weight is computed from other parameters")
    assert why["patched"] == "its forward was replaced on the instance"
    assert why["adapted"] == "it carries more than weight and bias: lora, calls"
    assert why["bias_pruned"].startswith("it carries more than weight and bias: bias_")
    assert why["rnn"] == "no packed module for LSTM"
    assert why["packed"] == "is packed already"
    state = model.state_dict()
    stored = {id(p): state[name].nbytes for name, p in model.named_parameters(remove_duplicate=False)}
    assert report.bytes_after == sum(stored.values())
    assert 0.5 < report.packed_fraction < 1
    text = str(report)
    assert "rounded, SQNR 1" in text
    assert "float: no packed module for LSTM" in text


def test_convert_by_patterns():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    report = inq.convert(model, {"0": inq.Format(5), "[12]": inq.Format(2), "3": FMT}, skip="1", only=["0", "1", "2"])
    assert [m.reason for m in report.modules] == ["", "skipped by '1'", "", "not among only="]
    assert [type(m) for m in model] == [inq.Linear, nn.Linear, inq.Linear, nn.Linear]
    assert model[0].format.bits == 5
    assert model[2].format.bits == 2
    again = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert inq.convert(again, {"0": FMT}).modules[1].reason == "no format for its name"


def test_names_are_names_before_they_are_patterns():
    model = nn.ModuleDict({"a[0]": nn.Linear(8, 8), "*": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    fmts = {"*": inq.Format(2), "a[0]": inq.Format(3), "b": inq.Format(5)}
    inq.convert(model, fmts)
    assert [m.format.bits for m in model.values()] == [3, 2, 5]


def test_convert_keeps_the_bias_parameters():
    """An optimizer may hold them, and modules share them."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias = model[0].bias
    bias = model[0].bias
    inq.convert(model, FMT)
    assert model[0].bias is bias
    assert model[1].bias is bias


def test_tiny_float64_weights_are_not_called_exact():
    """Their squares underflow; they became zeros."""
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.float64))
    with torch.no_grad():
        model[0].weight.mul_(1e-200)
    assert inq.convert(model, FMT).modules[0].sqnr_db == 0


def test_numpy_integers_and_short_lists_as_torch_takes_them():
    for stride in (numpy.int64(2), [2], (2, 1)):
        m = nn.Conv2d(numpy.int64(2), 4, 3, stride=stride)
        x = torch.randn(1, 2, 7, 7)
        assert inq.Conv2d.from_float(m, FMT)(x).shape == m(x).shape


def test_lazy_modules_and_wrong_types_are_named():
    with pytest.raises(ValueError, match="layer '0': expected initialised weights"):
        inq.convert(nn.Sequential(nn.LazyLinear(3)), FMT)
    with pytest.raises(TypeError, match="inq.convert: fmt: .*expected an inq.Format, got 4"):
        inq.convert(nn.Sequential(nn.Linear(2, 2)), 4)
    with pytest.raises(TypeError, match="inq.convert: model: expected a torch.nn.Module, got int"):
        inq.convert(3, FMT)
    with pytest.raises(ValueError, match="weight: expected a weight with values, got one on the meta device"):
        inq.convert(nn.Sequential(nn.Linear(2, 2, device="meta")), FMT)


def test_unfreezing_a_whole_model_meets_torchs_error():
    """torch asks every parameter itself, so the message is torch's; the documented way passes over packed ones."""
    model = nn.Sequential(nn.Linear(8, 8))
    inq.convert(model, FMT)
    with pytest.raises(RuntimeError, match="only Tensors of floating point"):
        model.requires_grad_(True)
    for p in model.parameters():
        p.requires_grad_(p.is_floating_point())


def test_convert_warns_when_little_was_packed():
    model = nn.Sequential(nn.Embedding(1000, 8), nn.Linear(8, 8))
    with pytest.warns(UserWarning, match="only 1% of the parameter bytes were packed"):
        inq.convert(model, FMT)


@pytest.mark.parametrize("failure", ["nan", "memory"])
def test_a_failed_convert_leaves_the_model_as_it_was(monkeypatch, failure):
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(1, 1, 1), nn.Linear(8, 8))
    if failure == "nan":
        nn.init.constant_(model[2].weight, math.nan)
        expected = pytest.raises(ValueError, match=r"layer '2': .*weight: expected finite values, got 64 NaN and 0 Inf")
    else:

        def out_of_memory(*_):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(inq.Conv2d, "_fill", out_of_memory)
        expected = pytest.raises(torch.OutOfMemoryError)
    modules = list(model)
    before = copy.deepcopy(model.state_dict())
    with expected:
        inq.convert(model, FMT)
    assert all(a is b for a, b in zip(model, modules, strict=True))
    assert all(torch.equal(v, before[k]) or failure == "nan" for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(skip="fc"), r"skip: expected a pattern that matches a module, got 'fc'; there are \['', '0'\]"),
        (dict(only=["0", "1"]), "only: expected a pattern that matches a module, got '1'"),
        (dict(fmt={"fc": FMT}), "fmt: expected a pattern that matches a module, got 'fc'"),
    ],
)
def test_patterns_that_match_nothing(arguments, message):
    with pytest.raises(ValueError, match=message):
        inq.convert(nn.Sequential(nn.Linear(2, 2)), **{"fmt": FMT, **arguments})


def test_the_model_itself_cannot_be_swapped():
    with pytest.raises(ValueError, match=r"use inq.Linear.from_float"):
        inq.convert(nn.Linear(2, 2), FMT)
