"""The list that ends ECOSYSTEM.md: every awkward input just works, or meets one error that names the tensor, what was
expected and what came, and changes nothing."""

import copy

import pytest
import torch
from torch import nn

import inq_kernels as inq

FMT = inq.Format(4)


def packed_linear(n=3, k=40, fmt=FMT):
    torch.manual_seed(0)
    return inq.Linear.from_float(nn.Linear(k, n), fmt)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "count"), [(float("nan"), "1 NaN and 0 Inf"), (float("-inf"), "0 NaN and 1 Inf")])
@pytest.mark.parametrize(
    "what", ["exponents", "quantize", "quantize_with_mask", "pack", "from_float", "convert", "INQ"]
)
def test_nan_and_inf_weights(what, value, count):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 6))
    with torch.no_grad():
        model[1].weight[2, 3] = value
    before = copy.deepcopy(model.state_dict())
    w = model[1].weight

    def start():
        next(iter(inq.INQ(model, torch.optim.SGD(model.parameters(), 0.1), FMT)))

    call = {
        "exponents": lambda: inq.exponents(w, FMT),
        "quantize": lambda: inq.quantize(w, FMT),
        "quantize_with_mask": lambda: inq.quantize_with_mask(w, None, 0.5, FMT),
        "pack": lambda: inq.pack(w, FMT),
        "from_float": lambda: inq.Linear.from_float(model[1], FMT),
        "convert": lambda: inq.convert(model, FMT),
        "INQ": start,
    }[what]
    name = {"convert": "layer '1'", "INQ": "layer '1'"}.get(what, f"inq.*{what}: w")
    with pytest.raises(ValueError, match=f"{name}.*: expected finite values, got {count} of 30"):
        call()
    assert type(model[1]) is nn.Linear
    assert torch.equal(before["0.weight"], model[0].weight)
    assert torch.equal(torch.nan_to_num(before["1.weight"]), torch.nan_to_num(w.detach()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_wrong_dtypes(dtype):
    layer = packed_linear()
    with pytest.raises(TypeError, match=f"inq.linear: x: expected activations of dtype .*, got {dtype}"):
        layer(torch.zeros(2, 40).to(dtype))
    with pytest.raises(TypeError, match=f"inq.pack: w_hat: expected a weight of dtype .*, got {dtype}"):
        inq.pack(torch.zeros(2, 40).to(dtype), FMT)
    with pytest.raises(TypeError, match=f"inq.unpack: dtype: expected .*, got {dtype}"):
        inq.unpack(layer.packed, dtype)


def test_the_short_way_to_the_cpus_kernel_hides_no_error():
    """What the kernel's backend would refuse first, by its own name, the checks explain."""
    layer = packed_linear()
    layer(torch.zeros(2, 40))  # lays the weight out
    layer.backend = "cpu"
    with pytest.raises(TypeError, match="Packed weights are uint8"):
        layer(torch.zeros(2, 40, dtype=torch.int64))
    with pytest.raises(ValueError, match="inq.linear: x: expected device cpu of the weight, got meta"):
        layer(torch.zeros(2, 40, device="meta"))
    row = inq.ops.prepack(inq.pack(torch.ones(3), inq.Format(4)), "cpu16")
    for x in (torch.tensor(1.0), torch.tensor(1.0, requires_grad=True)):
        with pytest.raises(
            ValueError, match=r"inq.linear: x: expected \[..., K\] for a weight of shape \[3\], got \[\]"
        ):
            inq.linear(x, row)


def test_wrong_devices():
    layer = packed_linear()
    with pytest.raises(ValueError, match="inq.linear: x: expected device cpu of the weight, got meta"):
        layer(torch.zeros(2, 40, device="meta"))
    with pytest.raises(ValueError, match=r"inq.linear: bias: expected shape \[3\] on cpu, got \[3\] on meta"):
        inq.linear(torch.zeros(2, 40), layer.packed, torch.zeros(3, device="meta"))
    with pytest.raises(ValueError, match="inq.quantize: w: expected a weight with values, got one on the meta device"):
        inq.quantize(torch.zeros(2, 2, device="meta"), FMT)


def test_gradients_on_packed_weights():
    layer = packed_linear()
    with pytest.raises(ValueError, match="inq.Linear.requires_grad_: packed weights take no gradient"):
        layer.requires_grad_()
    scale = torch.ones(3, 1, requires_grad=True)
    scaled = inq.PackedWeight(layer.weight, layer.weight_exp, scale, FMT, (3, 40))
    with pytest.raises(ValueError, match="weight_scale: expected requires_grad=False: packed weights take no gradient"):
        inq.linear(torch.zeros(2, 40), scaled)


def test_wrong_shapes():
    layer = packed_linear()
    with pytest.raises(ValueError, match=r"x: expected \[..., K\] for a weight of shape \[3, 40\], got \[2, 41\]"):
        layer(torch.zeros(2, 41))
    with pytest.raises(ValueError, match="inq.quantize: w: expected rank ≥ 1 and at least one element"):
        inq.quantize(torch.zeros(0, 3), FMT)
    with pytest.raises(ValueError, match=r"weight: expected shape \[3, 20\], got \[3, 19\]"):
        inq.PackedWeight(torch.zeros(3, 19, dtype=torch.uint8), layer.weight_exp, None, FMT, (3, 40))


def test_wrong_types():
    layer, w = packed_linear(), torch.randn(3, 40)
    for call in (
        lambda: inq.exponents(w, 5),
        lambda: inq.quantize(w, 5),
        lambda: inq.quantize_with_mask(w, None, 0.5, 5),
        lambda: inq.pack(w, 5),
    ):
        with pytest.raises(TypeError, match="fmt: expected an inq.Format, got 5"):
            call()
    with pytest.raises(TypeError, match="inq.linear: packed: expected an inq.PackedWeight, got Tensor"):
        inq.linear(w, w)
    with pytest.raises(TypeError, match="inq.unpack: packed: expected an inq.PackedWeight, got Tensor"):
        inq.unpack(w)
    with pytest.raises(TypeError, match="inq.linear: x: expected a torch.Tensor, got NoneType"):
        inq.linear(None, layer.packed)
    with pytest.raises(TypeError, match="inq.linear: bias: expected a torch.Tensor, got list"):
        inq.linear(w, layer.packed, [0.0])
    with pytest.raises(ValueError, match=r"PackedWeight: shape: expected rank ≥ 1, got \(\)"):
        inq.PackedWeight(layer.weight, layer.weight_exp, None, FMT, ())
    conv = inq.Conv2d.from_float(nn.Conv2d(2, 3, 3), FMT)
    with pytest.raises(ValueError, match="inq.conv2d: groups: expected an int ≥ 1, got 0"):
        inq.conv2d(torch.zeros(1, 2, 5, 5), conv.packed, groups=0)


def test_a_layer_of_zeros_packs_but_cannot_be_retrained():
    layer = nn.Linear(9, 4)
    nn.init.zeros_(layer.weight)
    packed = inq.Linear.from_float(layer, FMT)
    assert not packed.weight.any()
    assert torch.equal(packed(torch.ones(2, 9)), layer.bias.expand(2, 4))
    run = inq.INQ(layer, torch.optim.SGD(layer.parameters(), 0.1), FMT)
    with pytest.raises(ValueError, match="expected some nonzero values to choose n1 from, got 36 zeros"):
        next(iter(run))


def test_out_of_memory_leaves_the_model_as_it_was(monkeypatch):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    modules, before = list(model), copy.deepcopy(model.state_dict())
    calls = []

    def pack(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return original(*arguments)

    original = inq.ops.pack
    monkeypatch.setattr(inq.ops, "pack", pack)
    with pytest.raises(torch.OutOfMemoryError):
        inq.convert(model, FMT)
    assert len(calls) == 2
    assert list(model) == modules
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


# --- what just works --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 7, 31, 33, 100])
@pytest.mark.parametrize("n", [1, 3])
def test_k_that_is_no_multiple_of_32_and_n_of_1(n, k):
    for fmt in (FMT, inq.Format(5, "dense", "channel"), inq.Format(2)):
        layer = packed_linear(n, k, fmt)
        x = torch.randn(4, k)
        torch.testing.assert_close(layer(x), layer.to_float()(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40), (40,), (2, 3, 40), (1, 2, 3, 40)])
def test_batch_0_and_any_leading_dimensions(shape):
    layer = packed_linear()
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 3)
    y.sum().backward()
    assert x.grad.shape == x.shape
    conv = inq.Conv2d.from_float(nn.Conv2d(2, 3, 3), FMT)
    assert conv(torch.zeros(0, 2, 5, 5)).shape == (0, 3, 3, 3)


def test_x_that_is_not_contiguous():
    layer = packed_linear()
    x = torch.randn(40, 6)
    for view in (x.T, torch.randn(6, 80)[:, ::2], torch.randn(40)[None].expand(6, 40)):
        assert not view.is_contiguous()
        assert torch.equal(layer(view), layer(view.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_subnormal_weights(dtype):
    """They quantize by the same equation: levels under 2^-126 are 0, and n1 is clamped there."""
    w = torch.tensor([[1.0, 2.0**-126, 0.74 * 2.0**-126, 1e-40, 0.0]], dtype=torch.float64).to(dtype)
    assert inq.quantize(w, inq.Format.paper(5)).tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]]
    tiny = w[:, 1:]
    assert inq.exponents(tiny, inq.Format.paper(5)).item() == -126
    assert inq.quantize(tiny, inq.Format.paper(5)).tolist() == [[2.0**-126, 0.0, 0.0, 0.0]]
