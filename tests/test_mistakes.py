"""The 13 mistakes of other INQ implementations (PAPER.md), one test each, numbered as there.

``make mutants`` (tests/mutants.py) puts every one of them into a copy of the code and sees its test fail.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import inq_kernels as inq

FMT = inq.Format.paper(4)


def one_layer(weight, fmt=FMT, portions=(0.5, 1.0), optimizer=None, **arguments):
    """A Linear that holds ``weight`` [N, K], its optimizer and its run."""
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        model.weight.copy_(weight)
    opt = optimizer(model.parameters()) if optimizer else torch.optim.SGD(model.parameters(), 0.0)
    return model, opt, inq.INQ(model, opt, fmt, portions, **arguments)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.mark.parametrize("bits", inq.PAPER_PORTIONS)
def test_01_a_frozen_weight_is_never_opened_again(bits):
    """The mask is OR-ed, not recomputed from all |w|: weights that outgrow frozen ones do not replace them."""
    model, _, run = one_layer(gaussian(40, 50), inq.Format.paper(bits), inq.PAPER_PORTIONS[bits])
    before = None
    for _ in run:
        frozen = run.frozen("")
        assert before is None or not (before & ~frozen).any()
        before = frozen
        with torch.no_grad():
            model.weight[~frozen] *= 3


def test_02_a_weight_retrained_past_the_largest_power_saturates():
    """n1 is fixed early and equation (4), read literally, sends |w| ≥ 1.5·2^n1 to 0: the largest weight dies."""
    model, _, run = one_layer(torch.tensor([[1.0, 0.6, 0.5, -0.3]]))
    turns = iter(run)
    next(turns)
    with torch.no_grad():
        model.weight[0, 2], model.weight[0, 3] = 1.7, -5.0
    next(turns)
    assert model.weight.tolist() == [[1.0, 0.5, 1.0, -1.0]]


def test_03_n1_stays_when_the_maximum_grows():
    """Re-deriving n1 from the current maximum re-quantizes frozen weights: 0.125 drifts to 0.25."""
    model, _, run = one_layer(torch.tensor([[1.0, 0.125, 0.1, 0.01]]), inq.Format.paper(4), (0.5, 0.75, 1.0))
    turns = iter(run)
    next(turns)
    assert model.weight[0, :2].tolist() == [1.0, 0.125]
    with torch.no_grad():
        model.weight[0, 2] = 64.0
    n1 = run.n1("")
    next(turns)
    assert torch.equal(run.n1(""), n1)
    assert model.weight[0, :2].tolist() == [1.0, 0.125]


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_04_ties_go_up_at_every_bit_width(bits):
    """(α+β)/2 ≤ |w| belongs to β, at each of the format's bin edges; the width is a parameter."""
    fmt = inq.Format.paper(bits)
    powers = [2.0**-j for j in range({2: 1, 3: 2, 4: 4, 5: 8}[bits])]
    edges = [0.75 * p for p in powers[:-1]] + [0.5 * powers[-1]]
    w = torch.tensor([[1.0, *edges, *(-e for e in edges), 0.499 * powers[-1]]])
    assert inq.quantize(w, fmt).tolist() == [[1.0, *powers, *(-p for p in powers), 0.0]]


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.5),
        lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.5),
        lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.5, fused=True),
    ],
)
def test_05_neither_weight_decay_nor_momentum_moves_a_frozen_weight(optimizer):
    model, opt, run = one_layer(gaussian(8, 8), optimizer=optimizer)
    for _ in range(3):  # momentum of what is frozen later
        model(torch.ones(2, 8)).sum().backward()
        opt.step()
    for _ in run:
        frozen, w = run.frozen(""), model.weight.detach().clone()
        for _ in range(3):
            model(torch.ones(2, 8)).sum().backward()
            opt.step()
        assert torch.equal(model.weight[frozen], w[frozen])


def test_05b_the_gradient_is_masked_before_it_is_clipped():
    model, opt, run = one_layer(gaussian(8, 8))
    next(iter(run))
    model(torch.ones(2, 8)).sum().backward()
    assert not model.weight.grad[run.frozen("")].any()
    assert model.weight.grad[~run.frozen("")].all()


@pytest.mark.parametrize("numel", [1, 2, 31, 33, 1000])
def test_06_the_last_portion_leaves_nothing_unquantized(numel):
    """``index = int(count·0) − 1 = −1`` read out of bounds and left weights as they were."""
    model, _, run = one_layer(gaussian(1, numel) + 0.01)
    list(run)
    assert run.frozen("").all()
    assert torch.equal(inq.quantize(model.weight, inq.Format.paper(4), run.n1("")), model.weight)


def test_07_layers_are_recognised_by_type_not_by_name():
    model = nn.ModuleDict({"conv_bn": nn.Conv2d(1, 4, 3), "fc": nn.BatchNorm2d(4), "norm": nn.GroupNorm(2, 4)})
    before = copy.deepcopy(model.state_dict())
    run = inq.INQ(model, torch.optim.SGD(model.parameters(), 0.1), inq.Format(4), (1.0,))
    list(run)
    assert list(run.formats) == ["conv_bn"]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"conv_bn.weight"}


def test_08_the_largest_weights_freeze_first():
    w = torch.tensor([[0.9, -0.1, 0.2, -0.8]])
    _, _, run = one_layer(w)
    next(iter(run))
    assert run.frozen("").tolist() == [[True, False, False, True]]


def test_09_resume_keeps_the_portion_the_masks_and_the_optimizer(tmp_path):
    def make():
        return one_layer(gaussian(8, 8), optimizer=lambda p: torch.optim.SGD(p, 0.01, momentum=0.9))

    def step(model, opt):
        opt.zero_grad()
        F.mse_loss(model(torch.eye(8)), torch.ones(8, 8)).backward()
        opt.step()

    model, opt, run = make()
    turns = iter(run)
    next(turns)
    step(model, opt)
    inq.save_training(tmp_path / "run.safetensors", model, opt, run)
    again = make()
    inq.load_training(tmp_path / "run.safetensors", *again)
    assert again[2].portion == 0.5
    assert torch.equal(again[2].frozen(""), run.frozen(""))
    assert next(iter(again[2])) == 0.5, "the portion in progress comes first"
    step(model, opt)
    step(again[0], again[1])
    assert torch.equal(model.weight, again[0].weight)


def test_10_more_weights_than_torch_quantile_takes():
    """torch.quantile stops at 2^24 elements, and a Python loop over as many weights would take minutes."""
    numel = 2**24 + 9
    model, _, run = one_layer(torch.linspace(0.01, 1.0, numel).view(1, -1), inq.Format.paper(5))
    next(iter(run))
    assert int(run.frozen("").sum()) == (numel + 1) // 2
    assert not run.frozen("")[0, : numel // 2].any()


def test_11_random_partition_and_portions_are_of_the_weights_that_count():
    """Counted over the weight, not the activations; n2 as in equation (3); pruned zeros do not count."""
    w = gaussian(6, 10)
    kept = torch.zeros(6, 10, dtype=torch.bool)
    kept[:, :4] = True
    model, _, run = one_layer(w, partition="random", prune_masks={"": kept})
    next(iter(run))
    assert int(run.frozen("").sum()) == 12
    list(run)
    assert (model.weight != 0).any()
    assert not model.weight[~kept].any()
    smallest = float(model.weight.detach()[kept].abs().min())
    n1 = int(run.n1("")[0])
    assert smallest in (0.0, *(2.0**k for k in range(n1 - 3, n1 + 1))), "four magnitudes at 4 bits"
    assert inq.Format.paper(4).n2(0) == -3


def test_12_the_mask_takes_one_bit_a_weight():
    _, _, run = one_layer(gaussian(100, 80), inq.Format.paper(5))
    next(iter(run))
    layer = run._layers[""]
    held = [v for v in vars(layer).values() if isinstance(v, torch.Tensor) and v is not layer.weight]
    assert layer.mask.numel() * layer.mask.element_size() == 1000
    assert sum(t.numel() * t.element_size() for t in held) == 8000 * (1 + 5) // 8 + 100


def test_13_batch_norm_is_folded_into_the_row_scale():
    """Folded into the weights they would be no powers of two any more."""
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5).eval()
    for tensor in (bn.running_mean, bn.weight, bn.bias):
        nn.init.normal_(tensor)
    nn.init.uniform_(bn.running_var, 0.3, 3.0)
    packed = inq.Conv2d.from_float(conv, inq.Format(4))
    folded = inq.fold_batchnorm(packed, bn)
    assert torch.equal(folded.weight, packed.weight)
    assert torch.equal(folded.weight_exp, packed.weight_exp)
    assert packed.weight_scale is None
    x = torch.randn(2, 2, 6, 6)
    assert torch.allclose(folded(x), bn(packed(x)), atol=1e-5)
