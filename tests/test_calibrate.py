"""inq.calibrate: the update is GPTQ's, convolutions are linear layers over patches, and nothing is half done."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from support import DTYPES, FORMATS, generator, same_bits
from torch import nn

import inq_kernels as inq

FMT = inq.Format(4, granularity="channel")


def correlated(count, k, seed=0, dtype=torch.float32):
    """[count, k]: inputs that share a few directions, as activations do."""
    g = generator(seed)
    mix = torch.randn(k, k, generator=generator(k)) * torch.linspace(2, 0.05, k)[:, None]
    return (torch.randn(count, k, generator=g) @ mix).to(dtype)


def textbook(w, x, fmt, n1, damping):
    """GPTQ as its paper defines it, an inverse for each column: w [N, K] float64, x [samples, K] float64."""
    h = x.T @ x
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    left = h.diagonal().argsort(descending=True, stable=True).tolist()
    w, q = w.clone(), torch.zeros_like(w)
    while left:
        inverse = torch.linalg.inv(h[left][:, left])
        k = left[0]
        q[:, k] = inq.quantize(w[:, k : k + 1], fmt, n1)[:, 0]
        w[:, left] -= ((w[:, k] - q[:, k]) / inverse[0, 0])[:, None] * inverse[0]
        left = left[1:]
    return q


def output_error(x, w, w_hat):
    return float(F.linear(x.double(), w.double() - w_hat.double()).square().sum())


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize(("k", "damping"), [(5, 0.5), (140, 0.01)])
def test_the_update_is_gptqs(fmt, k, damping):
    """140 columns are more than one block."""
    torch.manual_seed(k)
    model = nn.Sequential(nn.Linear(k, 6))
    w, x = model[0].weight.detach().double(), correlated(300, k)
    inq.calibrate(model, [x], fmt, damping=damping)
    expected = textbook(w, x.double(), fmt, model[0].weight_exp.detach(), damping)
    assert torch.equal(inq.unpack(model[0].packed, torch.float64), expected)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("rule", ["mse", "max"])
def test_it_loses_less_than_plain_rounding_and_its_report_says_how_much(granularity, rule):
    torch.manual_seed(0)
    fmt = inq.Format(4, granularity=granularity, exponent=rule)
    layer = nn.Linear(64, 32)
    with torch.no_grad():
        # Near powers of two times a real scale of each row: what row scales are for.
        near = inq.quantize(torch.randn(32, 64) * 0.1, inq.Format(4)) + 0.004 * torch.randn(32, 64)
        layer.weight.copy_(near * torch.linspace(1, 2, 32)[:, None])
    w = layer.weight.detach().clone()
    plain = inq.quantize(w, fmt)
    models = [nn.Sequential(copy.deepcopy(layer)) for _ in range(2)]
    x, unseen = correlated(500, 64), correlated(500, 64, seed=1)
    reports = [inq.calibrate(m, [x], fmt, row_scales=scales) for m, scales in zip(models, (False, True), strict=True)]
    signal = output_error(x, w, 0 * w)
    errors = []
    for model, report, scales in zip(models, reports, (False, True), strict=True):
        w_hat = inq.unpack(model[0].packed)
        (row,) = report.layers
        assert (row.name, row.format, row.inputs, row.row_scales) == ("0", fmt, 500, scales)
        assert 10 ** (row.output_db / 10) == pytest.approx(signal / output_error(x, w, w_hat), rel=1e-6)
        assert 10 ** (row.plain_db / 10) == pytest.approx(signal / output_error(x, w, plain), rel=1e-6)
        assert "outputs dB" in str(report)
        assert f"{row.output_db:.1f}" in str(report)
        errors.append(output_error(unseen, w, w_hat))
    unseen_plain = output_error(unseen, w, plain)
    assert errors[0] < 0.5 * unseen_plain
    assert errors[1] < 0.3 * errors[0]
    if granularity == "tensor":
        assert all(len(m[0].weight_exp.unique()) == 1 for m in models)


def test_mse_weighs_columns_by_their_inputs():
    """One column has all the energy: n1 suits it, though other weights are larger."""
    model = nn.Sequential(nn.Linear(8, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.125] + [1.0] * 7]))
    x = torch.randn(100, 8, generator=generator()) * torch.tensor([100.0] + [0.01] * 7)
    inq.calibrate(model, [x], inq.Format(2, granularity="channel"))
    assert model[0].weight_exp.item() == -3
    assert inq.exponents(torch.tensor([[0.125] + [1.0] * 7]), inq.Format(2)).item() == 0


CONVOLUTIONS = {
    "plain": dict(stride=2, padding=1),
    "dilated": dict(dilation=2, padding=(2, 1)),
    "same": dict(padding="same", kernel_size=(2, 4)),
    "valid": dict(padding="valid"),
    "reflect": dict(padding=1, padding_mode="reflect"),
    "circular": dict(stride=2, padding=(1, 0), padding_mode="circular"),
    "groups": dict(groups=2, padding=1),
    "depthwise": dict(groups=4, bias=False),
}


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_a_convolution_is_a_linear_layer_over_patches(kind, scales):
    """Patches as the convolution itself sees them: its outputs with one weight 1 and the others 0."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, **{"kernel_size": 3, **CONVOLUTIONS[kind]}).double()
    x = torch.randn(5, 4, 9, 8, generator=generator()).double()
    w, k, per_group = conv.weight.detach().clone(), conv.weight[0].numel(), 8 // conv.groups
    patches = []
    for one in range(k):
        probe = copy.deepcopy(conv).requires_grad_(False)
        probe.bias = None
        probe.weight.view(8, k).copy_(F.one_hot(torch.full((8,), one), k))
        patches.append(probe(x))
    patches = torch.stack(patches, -1)  # [B, 8, H, W, k]
    model = nn.Sequential(conv)
    inq.calibrate(model, list(x.split(2)), FMT, row_scales=scales)
    for group in range(conv.groups):
        rows = slice(group * per_group, (group + 1) * per_group)
        linear = nn.Linear(k, per_group, bias=False).double()
        linear.weight = nn.Parameter(w[rows].reshape(per_group, k))
        alone = nn.Sequential(linear)
        inq.calibrate(alone, [patches[:, rows.start].reshape(-1, k)], FMT, row_scales=scales)
        expected = inq.unpack(alone[0].packed, torch.float64)
        got = inq.unpack(model[0].packed, torch.float64)[rows].reshape(per_group, k)
        # Sums over inputs in another order may move a fitted scale by a rounding.
        assert torch.allclose(got, expected, rtol=1e-6, atol=0)


def test_images_without_a_batch_and_of_any_memory_format():
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(3, 4, 3))
    x = torch.randn(6, 3, 8, 8, generator=generator())
    other = copy.deepcopy(conv).to(memory_format=torch.channels_last)
    inq.calibrate(conv, list(x), FMT)
    inq.calibrate(other, [x.to(memory_format=torch.channels_last)], FMT)
    assert torch.equal(inq.unpack(conv[0].packed), inq.unpack(other[0].packed))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("scales", [False, True])
def test_weights_on_the_grid_stay_as_they_are(fmt, scales):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 8))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(inq.quantize(layer.weight, fmt))
    weights = [model[i].weight.detach().clone() for i in (0, 2)]
    report = inq.calibrate(model, [correlated(100, 24)], fmt, row_scales=scales)
    assert all(torch.equal(inq.unpack(model[i].packed), w) for i, w in zip((0, 2), weights, strict=True))
    assert all(m.sqnr_db == float("inf") for m in report.modules if m.packed)


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Dropout(0.5), nn.Linear(12, 4))


@pytest.mark.parametrize("sequential", [True, False])
def test_what_the_second_layer_is_calibrated_on(sequential):
    model, x = two_layers(), correlated(80, 16)
    second = nn.Sequential(copy.deepcopy(model[3]))
    first = nn.Sequential(copy.deepcopy(model[0]), nn.Tanh())
    before = first(x)
    inq.calibrate(model, [x], FMT, sequential=sequential)
    inq.calibrate(first, [x], FMT)
    with torch.no_grad():
        inq.calibrate(second, [first[0].to_float()(x).tanh() if sequential else before], FMT)
    for got, expected in ((model[0], first[0]), (model[3], second[0])):
        assert torch.equal(inq.unpack(got.packed), inq.unpack(expected.packed))
    assert model.training
    assert model[2].training


def test_layers_are_taken_in_the_order_in_which_they_run():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.second(input=self.first(x).tanh())

    torch.manual_seed(0)
    model, x = Backwards(), correlated(60, 8)
    straight = nn.Sequential(copy.deepcopy(model.first), nn.Tanh(), copy.deepcopy(model.second))
    inq.calibrate(model, [x], FMT)
    inq.calibrate(straight, [x], FMT)
    assert torch.equal(inq.unpack(model.second.packed), inq.unpack(straight[2].packed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scales", [False, True])
def test_dtypes(dtype, scales):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8)).to(dtype)
    x = correlated(64, 16, dtype=dtype)
    dense = model(x).detach()
    inq.calibrate(model, [x], inq.Format(5, granularity="channel"), row_scales=scales)
    assert model[0].bias.dtype == dtype
    y = model(x).detach()
    assert y.dtype == dtype
    assert (y.double() - dense.double()).square().sum() < 0.03 * dense.double().square().sum()
    # Every value exists in float16 where the weight was of it.
    if dtype == torch.float16 and not scales:
        inq.unpack(model[0].packed, torch.float16)


def test_what_a_batch_may_be():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(8, 4)

        def forward(self, x, y):
            return self.layer(x + y)

    x, y = correlated(40, 8), torch.randn(40, 8, generator=generator())
    expected = None
    for batches, forward in (
        ([(x, y)], None),
        ([[x, y]], None),
        ([{"x": x, "y": y}], None),
        (((a, b) for a, b in [(x[:15], y[:15]), (x[15:], y[15:])]), None),
        ([((x, y), "label")], lambda model, batch: model(*batch[0])),
    ):
        model = Model()
        inq.calibrate(model, batches, FMT, forward=forward)
        codes = inq.unpack(model.layer.packed)
        assert expected is None or torch.equal(codes, expected)
        expected = codes


def test_batches_may_share_memory_that_is_not_all_of_them():
    """Views with one beginning; a mask that is always the same, beside what is deeper than the check looks."""
    x, mask = correlated(40, 16), torch.ones(40, 1)
    inq.calibrate(two_layers(), (x[:n] for n in (8, 16, 40)), FMT)
    parts = (([x[i : i + 20]], mask[:20]) for i in (0, 20))
    inq.calibrate(two_layers(), parts, FMT, forward=lambda model, batch: model(batch[0][0] * batch[1]))


def test_inputs_that_are_always_zero_and_rows_of_zeros():
    torch.manual_seed(0)
    layer = nn.Linear(12, 5)
    with torch.no_grad():
        layer.weight[2] = 0
    x = correlated(60, 12)
    x[:, [3, 7]] = 0
    for scales in (False, True):
        for granularity in ("tensor", "channel"):
            model = nn.Sequential(copy.deepcopy(layer))
            fmt = inq.Format(4, granularity=granularity)
            inq.calibrate(model, [x], fmt, row_scales=scales)
            w_hat = inq.unpack(model[0].packed)
            assert not w_hat[2].any()
            if not scales:
                plain = inq.quantize(layer.weight, fmt, model[0].weight_exp)
                assert torch.equal(w_hat[:, [3, 7]], plain[:, [3, 7]])
    # All inputs zero: plain rounding, not an error.
    model = nn.Sequential(copy.deepcopy(layer))
    inq.calibrate(model, [torch.zeros(4, 12)], FMT)
    assert torch.equal(inq.unpack(model[0].packed), inq.quantize(layer.weight, FMT))


def test_row_scales_reach_as_far_as_rows_are_apart():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 6))
    with torch.no_grad():
        model[0].weight.mul_(2.0 ** torch.tensor([[0.0], [-20], [-40], [-70], [-100], [-110]]))
    w, other = model[0].weight.detach().double(), copy.deepcopy(model)
    inq.calibrate(model, [correlated(80, 16)], inq.Format(4), row_scales=True)
    inq.calibrate(other, [correlated(80, 16)], FMT, row_scales=True)
    w_hat = inq.unpack(model[0].packed, torch.float64)
    assert torch.equal(w_hat, inq.unpack(other[0].packed, torch.float64))
    assert ((w_hat - w).norm(dim=1) < 0.5 * w.norm(dim=1)).all()


def test_a_file_holds_the_row_scales(tmp_path):
    model, x = two_layers().eval(), correlated(80, 16)
    other = copy.deepcopy(model)
    inq.calibrate(model, [x], FMT, row_scales=True)
    assert model[0].weight_scale.shape == (12, 1)
    inq.save(model, tmp_path / "m.safetensors")
    inq.load(tmp_path / "m.safetensors", other)
    assert same_bits(model(x), other(x))


def test_names_patterns_and_shared_modules():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.Linear(8, 8), shared, nn.Linear(8, 8))
    bias = shared.bias
    with pytest.warns(UserWarning, match="only 33% of the parameter bytes were packed"):
        report = inq.calibrate(model, [correlated(50, 8)], {"0": inq.Format(3), "3": inq.Format(5)}, skip="3")
    assert model[0] is model[2]
    assert isinstance(model[0], inq.Linear)
    assert model[0].bias is bias
    assert [(m.name, m.packed, m.reason) for m in report.modules] == [
        ("0", True, ""),
        ("1", False, "no format for its name"),
        ("3", False, "skipped by '3'"),
    ]
    # It runs twice on each input.
    assert report.layers[0].inputs == 100


class Explodes(nn.Module):
    """Raises when the second layer's inputs are collected: passes are for the order, the first layer, the second."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x


def not_finite(x):
    x = x.clone()
    x[0, 2], x[1, 3], x[5, 5] = float("nan"), float("inf"), float("-inf")
    return x


X = correlated(50, 16)
FAILURES = {
    "forward": (lambda m: m.insert(1, Explodes()), [X], {}, torch.OutOfMemoryError, "out of memory"),
    "no batches": (None, [], {}, ValueError, "inq.calibrate: batches: expected at least one, got none"),
    "tensor": (None, X, {}, TypeError, "batches: expected an iterable of batches, got Tensor: put a single batch"),
    "dict": (None, {"x": X}, {}, TypeError, "batches: expected an iterable of batches, got dict"),
    "number": (None, 3, {}, TypeError, "batches: expected an iterable of batches, got int"),
    "one buffer": (
        None, (X for _ in range(3)), {}, ValueError,
        "batches: expected memory of its own for each, got batches 0 and 1 in the same: what fills one buffer",
    ),
    "inputs": (
        None, [X, not_finite(X)], {}, ValueError,
        "layer '0': inputs: expected finite values, got 1 NaN and 2 Inf of 800",
    ),
    "not reached": (
        None, [X], {"forward": lambda m, x: m[0](x)}, ValueError, r"layers \['3'\]: expected some input from the",
    ),
    "empty batch": (None, [X[:0]], {}, ValueError, r"layers \['0'\]: expected some input from the batches, got none"),
    "weight": (
        lambda m: nn.init.constant_(m[3].weight, float("nan")), [X], {}, ValueError,
        "layer '3': weight: expected finite values, got 48 NaN",
    ),
    "singular": (
        None, [X[:3]], {"damping": 0}, ValueError,
        "layer '0': expected a positive definite H, got one that is not: raise damping",
    ),
    "damping": (None, [X], {"damping": -1}, ValueError, "damping: expected a finite number ≥ 0, got -1"),
    "damping text": (None, [X], {"damping": "1"}, TypeError, "damping: expected a number ≥ 0, got '1'"),
    "row_scales": (None, [X], {"row_scales": 1}, TypeError, "row_scales: expected a bool, got 1"),
    "sequential": (None, [X], {"sequential": None}, TypeError, "sequential: expected a bool, got None"),
    "forward function": (None, [X], {"forward": 3}, TypeError, "forward: expected a function of model and batch"),
    "skip": (None, [X], {"skip": "fc"}, ValueError, "inq.calibrate: skip: expected a pattern that matches a module"),
    "format": (None, [X], {"fmt": 4}, TypeError, r"inq.calibrate: fmt: '\*': expected an inq.Format, got 4"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAILURES)
def test_after_an_error_the_model_is_as_it_was(kind):
    spoil, batches, arguments, error, message = FAILURES[kind]
    model = two_layers()
    model[3].eval()
    if spoil is not None:
        spoil(model)
    modules, parameters = list(model), list(model.parameters())
    modes = [module.training for module in modules]
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        inq.calibrate(model, batches, **{"fmt": FMT, **arguments})
    assert all(a is b for a, b in zip(model, modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(v, state[k]) or kind == "weight" for k, v in model.state_dict().items())
    assert [module.training for module in modules] == modes
    assert not any(module._forward_pre_hooks for module in modules)


@pytest.mark.parametrize("fails", [False, True])
def test_statistics_that_a_forward_trains_are_as_they_were(fails):
    model = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 4), nn.BatchNorm1d(4))
    state = copy.deepcopy(model.state_dict())
    buffers = dict(model.named_buffers())

    def forward(model, batch):
        model.train()(batch)
        model[2].register_buffer("running_mean", torch.ones(4))
        if fails:
            raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake") if fails else contextlib.nullcontext():
        inq.calibrate(model, [correlated(50, 16)], FMT, forward=forward)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in state.items() if not name.startswith("1."))
    assert all(model.get_buffer(name) is buffer for name, buffer in buffers.items())


def test_the_model_itself_and_the_type():
    with pytest.raises(ValueError, match=r"cannot replace the model itself: .* put it into nn.Sequential"):
        inq.calibrate(nn.Linear(16, 2), [X], FMT)
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got int"):
        inq.calibrate(3, [X], FMT)
