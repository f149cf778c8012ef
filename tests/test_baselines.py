"""TWN, BWN and uniform integers by hand, and the straight-through estimator beside a textbook loop."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import same_bits
from torch import nn

import inq_kernels as inq
from inq_kernels.baselines.binary import BWN
from inq_kernels.baselines.straight_through import StraightThrough, first_and_last, project_
from inq_kernels.baselines.ternary import TWN
from inq_kernels.baselines.uniform import Uniform

quick = settings(max_examples=60, deadline=None)
METHODS = {
    "twn": TWN(),
    "bwn": BWN(),
    "int4": Uniform(4),
    "int3-channel": Uniform(3, "channel"),
}
weights = st.lists(st.floats(-8, 8, width=32), min_size=12, max_size=12).map(lambda v: torch.tensor(v).view(3, 2, 2))


# --- formulas by hand -------------------------------------------------------------------------------------------------


def test_twn_by_hand():
    """E|w| = (2 + 1 + 0.5 + 0.5)/4 = 1, so Δ = 0.7: 2 and −1 are above, α = (2 + 1)/2 = 1.5."""
    w = torch.tensor([[2.0, -1.0], [0.5, -0.5]])
    assert TWN()(w).tolist() == [[1.5, -1.5], [0.0, 0.0]]
    # Δ = 1: 1 is not above it. Δ = 0.25: all are, α = 1.
    assert TWN(1.0)(w).tolist() == [[2.0, 0.0], [0.0, 0.0]]
    assert TWN(0.25)(w).tolist() == [[1.0, -1.0], [1.0, -1.0]]
    size = TWN().size("fc", w)
    # 4 weights of 2 bits are a byte; one α.
    assert (size.codes, size.padding, size.scales, size.nonzero) == (8, 0, 32, 2)
    # +, −, 0, 0: ¼, ¼, ½: 2 + 2 + 1 + 1 bits.
    assert size.entropy == 6.0


def test_bwn_by_hand():
    """Each output filter has its own α: (2 + 1)/2 = 1.5 and (0.5 + 0)/2 = 0.25; 0 counts as positive."""
    w = torch.tensor([[2.0, -1.0], [-0.5, 0.0]])
    assert BWN()(w).tolist() == [[1.5, -1.5], [-0.25, 0.25]]
    size = BWN().size("fc", w)
    # 4 bits, and 4 more fill up the byte; two α.
    assert (size.codes, size.padding, size.scales, size.nonzero) == (4, 4, 64, 4)
    assert size.entropy == 4.0


def test_uniform_by_hand():
    """3 bits: q from −3 to 3. s = 6/3 = 2: 6 → 3, −3 → −1.5 → −2 (ties to even), 1 → 0.5 → 0, 2.5 → 1.25 → 1.
    A channel: s = 2, and 2.5/3 for the second row: −2.5 → −3, 1 → 1.2 → 1."""
    w = torch.tensor([[6.0, -3.0], [1.0, 2.5]])
    assert Uniform(3)(w).tolist() == [[6.0, -4.0], [0.0, 2.0]]
    assert torch.allclose(Uniform(3, "channel")(w), torch.tensor([[6.0, -4.0], [2.5 / 3, 2.5]]))
    tensor, channel = (Uniform(3, granularity).size("fc", w) for granularity in ("tensor", "channel"))
    assert (tensor.codes, tensor.padding, tensor.scales, tensor.nonzero) == (12, 4, 32, 3)
    assert (channel.codes, channel.scales, channel.nonzero) == (12, 64, 4)
    assert Uniform(2)(w).tolist() == [[6.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_uniform_is_torchs_fake_quantization(bits):
    w = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(bits))
    q = Uniform(bits).largest
    scale = float(w.abs().max().double() / q)
    theirs = torch.fake_quantize_per_tensor_affine(w, scale, 0, -q, q)
    assert torch.allclose(Uniform(bits)(w), theirs, rtol=1e-6)
    scales = (w.flatten(1).abs().amax(1).double() / q).float()
    theirs = torch.fake_quantize_per_channel_affine(w, scales, torch.zeros(8, dtype=torch.int32), 0, -q, q)
    assert torch.allclose(Uniform(bits, "channel")(w), theirs, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_zeros_and_dtypes(method, dtype):
    w = torch.zeros(4, 3, dtype=dtype)
    assert same_bits(method(w), w)
    assert method.size("fc", w).nonzero == 0
    assert method(torch.randn(4, 3).to(dtype)).dtype == dtype


@quick
@given(weights)
def test_the_scales_are_those_of_least_squared_error(w):
    """TWN's α for its signs, BWN's α and signs for each filter: no other is nearer to W."""
    for method in (TWN(), BWN()):
        projected = method(w).double()
        error = (w.double() - projected).square().sum()
        for factor in (0.9, 0.99, 1.01, 1.1):
            assert (w.double() - factor * projected).square().sum() >= error - 1e-9


@quick
@given(weights, st.sampled_from(list(METHODS.values())))
def test_a_projection_is_one(w, method):
    once = method(w)
    assert torch.allclose(method(once), once, rtol=1e-5)
    assert len(once[0].unique()) <= {TWN: 3, BWN: 2}.get(type(method), 15)


@pytest.mark.parametrize("method", [TWN(), BWN()])
def test_packed_with_their_scale_as_row_scale(method):
    w = torch.randn(6, 20, generator=torch.Generator().manual_seed(2))
    packed = method.pack(w)
    assert torch.allclose(inq.unpack(packed), method(w), rtol=1e-6)
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(inq.linear(x, packed), x @ method(w).T, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((1,), "bits: expected 2 to 8"), ((4.0,), "bits: expected 2 to 8"), ((4, "row"), "granularity: exp")],
)
def test_uniform_refuses_others(arguments, message):
    with pytest.raises(ValueError, match=message):
        Uniform(*arguments)


# --- training ---------------------------------------------------------------------------------------------------------


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 1, 8, 8, generator=generator), torch.randint(5, (16,), generator=generator)


def train(model, optimizer, steps):
    for step in steps:
        x, t = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), t).backward()
        optimizer.step()


class Estimator(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, method):
        return method(w)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Textbook(nn.Module):
    """``net()`` with its middle layer projected in the forward pass."""

    def __init__(self, method):
        super().__init__()
        self.net, self.method = net(), method

    def forward(self, x):
        first, relu, conv, _, flatten, last = self.net
        x = F.conv2d(relu(first(x)), Estimator.apply(conv.weight, self.method), conv.bias)
        return last(flatten(relu(x)))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_training_is_the_textbook_loop_bit_for_bit(method):
    model, textbook = net(), Textbook(method)
    optimizer, other = (torch.optim.Adam(m.parameters(), 0.02, weight_decay=0.01) for m in (model, textbook))
    assert first_and_last(model) == ("0", "5")
    run = StraightThrough(model, optimizer, method, skip=first_and_last(model))
    first = method(net()[2].weight.detach())
    assert same_bits(model[2].weight.detach(), first)
    for step in range(6):
        train(model, optimizer, [step])
        train(textbook, other, [step])
        assert same_bits(run.dense("2"), textbook.net[2].weight.detach())
        assert same_bits(model[2].weight.detach(), method(textbook.net[2].weight.detach()))
        assert same_bits(model[0].weight.detach(), textbook.net[0].weight.detach())
    assert not torch.equal(model[2].weight.sign(), first.sign()), "the test proves nothing unless it moved"
    (size,) = run.sizes()
    assert (size.name, size.nonzero) == ("2", int((model[2].weight != 0).sum()))


def test_resume_bit_for_bit(tmp_path):
    def make(method=METHODS["twn"]):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        return model, optimizer, StraightThrough(model, optimizer, method)

    whole, first, second = make(), make(), make()
    train(*whole[:2], range(6))
    train(*first[:2], range(3))
    inq.save_training(tmp_path / "run.safetensors", *first)
    inq.load_training(tmp_path / "run.safetensors", *second)
    train(*second[:2], range(3, 6))
    for name, value in whole[0].state_dict().items():
        assert same_bits(second[0].state_dict()[name], value)
    other = make(METHODS["bwn"])
    with pytest.raises(ValueError, match=r"method: expected BWN\(\), got 'TWN\(delta=0.7\)'"):
        inq.load_training(tmp_path / "run.safetensors", *other)


def test_projection_alone():
    model = net()
    sizes = project_(model, Uniform(4), skip="5")
    assert [size.name for size in sizes] == ["0", "2"]
    assert same_bits(model[2].weight.detach(), Uniform(4)(net()[2].weight.detach()))
    assert torch.equal(model[5].weight, net()[5].weight)
    assert first_and_last(nn.Sequential(nn.Linear(2, 2))) == ("0",)


class Fails:
    def __call__(self, weight):
        if weight.dim() == 2:
            raise RuntimeError("no such weight")
        return weight.sign()

    def size(self, name, weight):
        raise NotImplementedError


def test_a_method_that_fails_leaves_nothing_behind():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(RuntimeError, match="no such weight"):
        StraightThrough(model, optimizer, Fails())
    # The class in place of TWN() could be called with a weight, too.
    for method, got in ((TWN, "the class TWN itself"), (torch.sign, "<built-in method sign")):
        for call in (lambda m: StraightThrough(model, optimizer, m), lambda m: project_(model, m)):
            with pytest.raises(TypeError, match=f"method: expected a quantizer of weights.* got {got}"):
                call(method)
    assert not optimizer._optimizer_step_pre_hooks
    assert all(same_bits(value, net().state_dict()[name]) for name, value in model.state_dict().items())
    StraightThrough(model, optimizer, TWN())


def test_nan_is_refused_and_changes_nothing():
    model = net()
    with torch.no_grad():
        model[5].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"baselines.project_: weight of layer '5': expected finite values, got 1 NaN"):
        project_(model, Uniform(4))
    assert same_bits(model[0].weight.detach(), net()[0].weight.detach())


def test_a_closed_run_has_no_sizes():
    """An empty list would make the meter count everything as float."""
    model = net()
    run = StraightThrough(model, torch.optim.SGD(model.parameters(), 0.1), TWN())
    run.close()
    with pytest.raises(RuntimeError, match="baselines.StraightThrough: expected a run in use, got one that was closed"):
        run.sizes()
