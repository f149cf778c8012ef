"""inq.DNS: worked by hand, beside a textbook loop with every kind of optimizer, stopped anywhere, and INQ after it."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from support import same_bits
from torch import nn

import inq_kernels as inq
from inq_kernels.dns import thresholds
from inq_kernels.format import frozen_count

FMT = inq.Format(4)
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.1, foreach=True),
    "adam-fused": lambda p: torch.optim.Adam(p, 0.02, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.005, momentum=0.9),
    "inq-sgd": lambda p: inq.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "inq-adamw": lambda p: inq.optim.AdamW(p, 0.02, weight_decay=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.5, max_iter=3, history_size=3),
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


def batch(step=0):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 1, 8, 8, generator=generator), torch.randint(5, (16,), generator=generator)


def closure_of(model, optimizer, step):
    x, t = batch(step)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), t)
        loss.backward()
        return loss

    return closure


def make(optimizer="sgd", scale=1, **arguments):
    model = net()
    with torch.no_grad():
        model[4].weight.mul_(scale)
    opt = OPTIMIZERS[optimizer](model.parameters())
    return model, opt, inq.DNS(model, opt, **{"c_rate": 0.3, "iter_stop": 12, "gamma": 0.1, **arguments})


def train(model, opt, steps):
    for step in steps:
        opt.step(closure_of(model, opt, step))


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_thresholds_by_hand():
    """|w| of the nonzero weights: 1 and 3, so μ = 2 and σ = 1. c_rate ½: 2 + ½ = 2.5; 0.9 and 1.1 of it: 2.25, 2.75."""
    w = torch.tensor([[1.0, 0.0, -3.0], [0.0, 0.0, 0.0]])
    assert thresholds(w, 0.5) == pytest.approx((2.25, 2.75))
    # c_rate −1: 2 − 1 = 1. c_rate −3: max(2 − 3, 0) = 0.
    assert thresholds(w, -1.0) == pytest.approx((0.9, 1.1))
    assert thresholds(w, -3.0) == (0.0, 0.0)
    assert thresholds(torch.zeros(2, 2), 1.0) == (0.0, 0.0)


def test_surgery_by_hand():
    """W = (3, 1, 2): μ = 2, c_rate 0, so a = 1.8 and b = 2.2. gamma 0: the mask is updated at every step. lr is 1."""
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 1.0, 2.0]]))
    opt = torch.optim.SGD(model.parameters(), 1.0)
    run = inq.DNS(model, opt, 0.0, gamma=0.0, iter_stop=4)
    row = run.report()[0]
    assert (row.a, row.b) == pytest.approx((1.8, 2.2))

    def step(*gradient):
        model.weight.grad = torch.tensor([gradient])
        opt.step()
        return model.weight.detach()[0].tolist(), run.masks()[""][0].tolist()

    # 3 ≥ b stays; 1 < a goes; 2 lies between, and stays as it was.
    assert model.weight.tolist() == [[3.0, 0.0, 2.0]]
    # W = (3, 2, 1.875): the pruned 1 moved to 2, which lies between now: it stays pruned. 1.875 ≥ a stays.
    assert step(0.0, -1.0, 0.125) == ([3.0, 0.0, 1.875], [True, False, True])
    # W = (1.75, 2.25, 1.875): 1.75 < a goes; 2.25 ≥ b is spliced back with the value that it has grown to.
    assert step(1.25, -0.25, 0.0) == ([0.0, 2.25, 1.875], [False, True, True])
    # W = (1.75, 2.25, 1.5): the last one goes.
    assert step(0.0, 0.0, 0.375) == ([0.0, 2.25, 0.0], [False, True, False])
    # Step 4 is iter_stop: W = (4.75, 2.25, 1.5) would splice, and the mask stays.
    assert step(-3.0, 0.0, 0.0) == ([0.0, 2.25, 0.0], [False, True, False])
    assert run.dense("").tolist() == [[4.75, 2.25, 1.5]]
    row = run.report()[0]
    assert (row.kept, row.numel, row.updates, row.pruned, row.spliced) == (1, 3, 4, 3, 1)
    assert "33.3" in str(run.report())


def test_the_probability_by_hand():
    """(1 + ½·2)^−2 = ¼ and (1 + ½·6)^−2 = 1/16; 0 from iter_stop on."""
    _, _, run = make(gamma=0.5, power=2.0, iter_stop=7)
    assert [run.probability(i) for i in (0, 2, 6, 7)] == [1.0, 0.25, 0.0625, 0.0]


def test_updates_come_as_often_as_the_probability_says():
    """At 0.5 each, over 400 steps: a mean of 200, standard deviation 10; and every layer draws for itself."""
    _, _, run = make(gamma=1.0)
    layers = run._layers
    drawn = {name: [layer.draw(i) < 0.5 for i in range(400)] for name, layer in layers.items()}
    assert all(160 < sum(values) < 240 for values in drawn.values())
    assert 140 < sum(a == b for a, b in zip(*drawn.values(), strict=True)) < 260
    assert make(seed=1)[2]._layers["0"].draw(3) != layers["0"].draw(3)


# --- beside a textbook loop -------------------------------------------------------------------------------------------


class Masked(torch.autograd.Function):
    """W ⊙ T, whose gradient reaches all of W."""

    @staticmethod
    def forward(ctx, w, mask):
        return torch.where(mask, w, 0.0)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Textbook(nn.Module):
    """``net()`` computing with W ⊙ T in its forward pass: no hooks, nothing is put anywhere."""

    def __init__(self, run):
        super().__init__()
        self.net = net()
        self.masks = run.masks()

    def forward(self, x):
        conv, bn, relu, flatten, linear = self.net
        x = relu(bn(F.conv2d(x, Masked.apply(conv.weight, self.masks["0"]), conv.bias)))
        return F.linear(flatten(x), Masked.apply(linear.weight, self.masks["4"]), linear.bias)

    def update(self, run, iteration):
        for name, mask in self.masks.items():
            layer = run._layers[name]
            if iteration < 12 and layer.draw(iteration) < (1 + 0.1 * iteration) ** -1:
                size = self.net.get_submodule(name).weight.detach().abs()
                self.masks[name] = torch.where(size < layer.a, False, torch.where(size >= layer.b, True, mask))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_is_the_textbook_loop_bit_for_bit(optimizer):
    model, opt, run = make(optimizer)
    textbook = Textbook(run)
    other = OPTIMIZERS[optimizer](textbook.parameters())
    for step in range(15):
        train(model, opt, [step])
        train(textbook, other, [step])
        textbook.update(run, step + 1)
        for name, mask in textbook.masks.items():
            dense = textbook.net.get_submodule(name).weight.detach()
            assert same_bits(run.dense(name), dense)
            assert torch.equal(run.masks()[name], mask)
            assert same_bits(model.get_submodule(name).weight.detach(), torch.where(mask, dense, 0.0))
    rows = run.report()
    assert all(r.updates > 1 for r in rows), "the test proves less unless masks change"
    assert sum(r.spliced for r in rows) > 0, "and unless weights come back"


def test_hooks_of_the_user_see_what_the_model_computes_with():
    model, opt, run = make()
    seen = []
    opt.register_step_post_hook(lambda *_: seen.append(model[4].weight.detach().clone()))
    train(model, opt, range(3))
    assert torch.equal(seen[-1], model[4].weight)
    assert not seen[-1][~run.masks()["4"]].any()
    pruned = seen[-1] == 0
    run.close()
    train(model, opt, range(3))
    assert (model[4].weight[pruned] != 0).any(), "closed: nothing holds the weights any more"


def test_a_c_rate_for_each_layer():
    model = net()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    run = inq.DNS(model, opt, 0.0, iter_stop=5, overrides={"4": 1.0}, skip="0")
    assert run.layers == ("4",)
    assert (run.report()[0].a, run.report()[0].b) == thresholds(net()[4].weight, 1.0)
    assert bool((model[0].weight != 0).all())


# --- whatever happens in between --------------------------------------------------------------------------------------


def raises():
    raise RuntimeError("out of memory")


def test_a_step_that_raises_and_the_end_after_it(tmp_path):
    """The next step begins where that one did; a checkpoint of in between is one of before; and finish prunes."""
    model, opt, run = make("sgd")
    beside = make("sgd")
    for each in (model, opt), beside[:2]:
        train(*each, range(4))
    with pytest.raises(RuntimeError, match="out of memory"):
        opt.step(raises)
    inq.save_training(tmp_path / "run.safetensors", model, opt, run)
    second = make("sgd")
    inq.load_training(tmp_path / "run.safetensors", *second)
    for each in (model, opt), beside[:2], second[:2]:
        train(*each, range(4, 7))
    for name, value in beside[0].state_dict().items():
        assert same_bits(model.state_dict()[name], value), name
        assert same_bits(second[0].state_dict()[name], value), name
    with pytest.raises(RuntimeError, match="out of memory"):
        opt.step(raises)
    for name, mask in run.finish().items():
        assert not model.get_submodule(name).weight[~mask].any()
        assert same_bits(model.get_submodule(name).weight.detach(), beside[0].get_submodule(name).weight.detach())


def test_the_end_leaves_alone_what_was_loaded_before_it():
    model, opt, run = make()
    train(model, opt, range(2))
    other = net().state_dict()
    model.load_state_dict(other)
    run.close()
    assert same_bits(model.state_dict()["4.weight"], other["4.weight"])


def test_a_run_that_is_closed_twice_takes_no_weights_from_another():
    model, opt, run = make()
    run.close()
    other = inq.INQ(model, opt, FMT)
    run.close()
    with pytest.raises(ValueError, match="expected a weight of no other run, got one of another inq.INQ"):
        inq.DNS(model, opt, 0.3, iter_stop=9)
    other.close()
    inq.DNS(model, opt, 0.3, iter_stop=9)
    other.close()
    with pytest.raises(ValueError, match="got one of another inq.DNS"):
        inq.INQ(model, opt, FMT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_amid_the_run(dtype):
    """W, its state and the model are of the new dtype."""
    model, opt, run = make()
    train(model, opt, range(2))
    before, masks = run.dense("4"), run.masks()
    model.to(dtype)
    assert same_bits(run.dense("4"), before.to(dtype))
    run.load_state_dict(run.state_dict())
    assert same_bits(model[4].weight.detach(), torch.where(masks["4"], before.to(dtype), 0.0))
    x, t = batch(0)
    opt.zero_grad()
    F.cross_entropy(model(x.to(dtype)), t).backward()
    opt.step()
    assert run.dense("4").dtype == model[4].weight.dtype == dtype
    assert run.finish().keys() == {"0", "4"}


def test_a_weight_that_becomes_nan_is_not_hidden_by_pruning():
    """|NaN| is not under a: T stays, and the model shows it."""
    model, opt, run = make(gamma=0.0)
    at = tuple(run.masks()["4"].nonzero()[0].tolist())
    closure_of(model, opt, 0)()
    model[4].weight.grad[at] = math.nan
    opt.step()
    assert run.masks()["4"][at]
    assert model[4].weight[at].isnan()
    masks = run.finish()
    with pytest.raises(ValueError, match="layer '4': expected finite values, got 1 NaN"):
        next(iter(inq.INQ(model, opt, FMT, prune_masks=masks)))


def test_a_step_that_a_gradient_scaler_leaves_out_counts_for_nothing():
    model, opt, run = make("sgd")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, spoil in enumerate((False, True, False)):
        x, t = batch(step)
        opt.zero_grad()
        scaler.scale(F.cross_entropy(model(x), t)).backward()
        before = run.dense("4")
        if spoil:
            model[0].weight.grad[0] = math.inf
        scaler.step(opt)
        scaler.update()
        assert torch.equal(before, run.dense("4")) == spoil
    assert run.state_dict()["iteration"] == 2


def test_weights_that_take_no_gradient_or_are_in_several_groups():
    model = net()
    model[0].weight.requires_grad_(False)
    opt = torch.optim.SGD([{"params": [model[4].weight]}, {"params": [model[4].bias], "lr": 0.2}], 0.1, momentum=0.9)
    run = inq.DNS(model, opt, 0.3, iter_stop=9)
    before = run.dense("0")
    train(model, opt, range(3))
    assert same_bits(run.dense("0"), before)
    assert not torch.equal(run.dense("4"), net()[4].weight)
    assert not model[0].weight.requires_grad
    for name, mask in run.finish().items():
        assert same_bits(mask, model.get_submodule(name).weight != 0)


def test_a_copy_of_the_model_is_a_plain_one():
    model, opt, run = make()
    copied = copy.deepcopy(model)
    train(model, opt, range(2))
    assert not torch.equal(copied[4].weight, model[4].weight)
    inq.DNS(copied, torch.optim.SGD(copied.parameters(), 0.1), 0.3, iter_stop=9)
    assert run.layers == ("0", "4")


def test_what_is_handed_out_or_in_is_a_copy():
    _, _, run = make()
    state, masks, dense = run.state_dict(), run.masks(), run.dense("4")
    first = copy.deepcopy(state)
    run.load_state_dict(state)
    for tensor in (masks["4"], dense, state["dense"]["4"], state["layers"]["4"]["mask"]):
        tensor.zero_()
    after = run.state_dict()
    assert torch.equal(after["layers"]["4"]["mask"], first["layers"]["4"]["mask"])
    assert torch.equal(after["dense"]["4"], first["dense"]["4"])


# --- stopped and resumed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [1, 7, 13])
@pytest.mark.parametrize("optimizer", ["sgd", "inq-adamw", "lbfgs"])
def test_resume_bit_for_bit(optimizer, stop_at, tmp_path):
    model, opt, run = make(optimizer)
    train(model, opt, range(16))
    first = make(optimizer)
    train(*first[:2], range(stop_at))
    inq.save_training(tmp_path / "run.safetensors", *first, {"step": stop_at})
    # Thresholds are those of the weights that the run began with, not of these.
    second = make(optimizer, scale=2)
    assert inq.load_training(tmp_path / "run.safetensors", *second) == {"step": stop_at}
    for name, value in first[0].state_dict().items():
        assert same_bits(second[0].state_dict()[name], value)
    train(*second[:2], range(stop_at, 16))
    for name, value in model.state_dict().items():
        assert same_bits(second[0].state_dict()[name], value), name
    assert second[2].report() == run.report()
    assert all(same_bits(second[2].dense(name), run.dense(name)) for name in run.layers)


def changed(state, path, value):
    state = copy.deepcopy(state)
    *path, last = path
    inner = state
    for key in path:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return state


BAD_STATES = {
    "iter_stop": (("iter_stop",), 13, "iter_stop: expected 12, got 13"),
    "gamma": (("gamma",), 0.5, "gamma: expected 0.1, got 0.5"),
    "seed": (("seed",), 3, "seed: expected 0, got 3"),
    "version": (("version",), 2, "version: expected 1, got 2"),
    "kind": (("kind",), "inq.INQ", "kind: expected 'inq.DNS', got 'inq.INQ'"),
    "no-layers": (("layers",), None, r"expected a state with the keys .*, got one without \['layers'\]"),
    "other-layers": (("layers",), {}, r"layers: expected \['0', '4'\], got \[\]"),
    "other-dense": (("dense",), {}, r"layers: expected \['0', '4'\], got \[\]"),
    "iteration": (("iteration",), -1, "iteration: expected an int ≥ 0, got -1"),
    "dense-shape": (("dense", "4"), torch.zeros(3), r"layer '4': dense: expected torch.float32 \[5, 144\]"),
    "dense-type": (("dense", "4"), 3, "layer '4': dense: expected a tensor, got 3"),
    "mask": (("layers", "4", "mask"), torch.zeros(5, 144), r"layer '4': mask: expected torch.bool \[5, 144\]"),
    "no-mask": (("layers", "4", "mask"), None, r"layer '4': expected a state with the keys .*without \['mask'\]"),
    "a": (("layers", "0", "a"), "x", "layer '0': a: expected a float, got 'x'"),
    "updates": (("layers", "0", "updates"), 1.5, "layer '0': updates: expected an int, got 1.5"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_states_of_other_runs_are_refused_and_change_nothing(case):
    path, value, message = BAD_STATES[case]
    model, opt, run = make()
    train(model, opt, range(3))
    before = copy.deepcopy((model.state_dict(), run.state_dict()))
    with pytest.raises(ValueError, match=message):
        run.load_state_dict(changed(run.state_dict(), path, value))
    for old, now in zip(before, (model.state_dict(), run.state_dict()), strict=True):
        assert str(old) == str(now)


def test_inq_refuses_a_checkpoint_of_surgery(tmp_path):
    model, opt, run = make()
    inq.save_training(tmp_path / "run.safetensors", model, opt, run)
    run.close()
    with pytest.raises(ValueError, match="expected a state with the keys"):
        inq.load_training(tmp_path / "run.safetensors", model, opt, inq.INQ(model, opt, FMT))


def test_several_ranks_of_fsdp_have_another_file(tmp_path):
    model, opt, run = make()
    for call in (inq.save_sharded, inq.load_sharded):
        with pytest.raises(TypeError, match=rf"{call.__name__}: run: expected an inq.INQ, got DNS: save_training"):
            call(tmp_path / "run", model, opt, run)


# --- INQ after it -----------------------------------------------------------------------------------------------------


def test_inq_on_the_surviving_weights(tmp_path):
    """Zeros stay zero, portions are of the nonzero weights, and a run that is stopped amid them goes on."""

    def after_surgery():
        model, opt, run = make()
        train(model, opt, range(14))
        masks = run.finish()
        return model, opt, masks, inq.INQ(model, opt, FMT, inq.DNS_PORTIONS, prune_masks=masks)

    model, opt, masks, run = after_surgery()
    assert all(0 < int(mask.sum()) < mask.numel() for mask in masks.values())
    path = tmp_path / "run.safetensors"
    for number, portion in enumerate(run):
        for name, mask in masks.items():
            assert int(run.frozen(name).sum()) == frozen_count(portion, int(mask.sum()))
        for step in range(2):
            train(model, opt, [step])
            assert all(not model.get_submodule(name).weight[~mask].any() for name, mask in masks.items())
        if number == 4:
            inq.save_training(path, model, opt, run)
    second = after_surgery()
    inq.load_training(path, second[0], second[1], second[3])
    for number, _ in enumerate(second[3], 4):
        train(second[0], second[1], range(2) if number > 4 else ())
    for name, value in model.state_dict().items():
        assert same_bits(second[0].state_dict()[name], value), name
    inq.convert(model, run.formats)
    for name, mask in masks.items():
        w = inq.unpack(model.get_submodule(name).packed)
        assert not w[~mask].any()
        # A survivor may be rounded to zero, too.
        assert 0.5 < (w[mask] != 0).double().mean() <= 1
    assert (inq.DNS_PORTIONS[0], inq.DNS_PORTIONS[-1]) == (0.05, 1.0)


def test_finish_refuses_a_layer_of_nothing():
    model, opt, run = make(gamma=0.0)
    with torch.no_grad():
        run._dense["4"].mul_(1e-3)
    opt.step(lambda: None)
    with pytest.raises(ValueError, match="weight of layer '4': expected some weights to be kept, got none"):
        run.finish()
    run.report()
    run.close()
    for call in (run.finish, run.state_dict):
        with pytest.raises(RuntimeError, match="expected a run in use, got one that was closed"):
            call()


# --- mistakes ---------------------------------------------------------------------------------------------------------


def with_nan():
    model = net()
    with torch.no_grad():
        model[4].weight[0, 0] = math.nan
    return model


BAD_ARGUMENTS = {
    "optimizer": (dict(optimizer=object()), TypeError, "inq.DNS: optimizer: expected a torch.optim.Optimizer"),
    "model": (dict(model=object()), TypeError, "inq.DNS: model: expected a torch.nn.Module, got object"),
    "c_rate": (dict(c_rate="1"), TypeError, "inq.DNS: c_rate: expected a number, got '1'"),
    "c_rate-nan": (dict(c_rate=math.nan), ValueError, "inq.DNS: c_rate: expected a finite number, got nan"),
    "c_rate-all": (dict(c_rate=50.0), ValueError, "layer '0': expected some weight of at least .* prunes all 36"),
    "override": (dict(overrides={"4": None}), TypeError, r"overrides\['4'\]: expected a number, got None"),
    "override-typo": (dict(overrides={"fc": 1.0}), ValueError, "overrides: expected a pattern that matches"),
    "overrides": (dict(overrides=[1.0]), TypeError, "overrides: expected a mapping from names, got list"),
    "gamma": (dict(gamma=-1.0), ValueError, "gamma: expected a finite number ≥ 0, got -1.0"),
    "power": (dict(power=True), TypeError, "power: expected a number, got True"),
    "iter_stop": (dict(iter_stop=0), ValueError, "iter_stop: expected at least 1, got 0"),
    "iter_stop-type": (dict(iter_stop=1.5), TypeError, "iter_stop: expected an int, got 1.5"),
    "seed": (dict(seed="a"), TypeError, "seed: expected an int, got 'a'"),
    "skip": (dict(skip="fc"), ValueError, "inq.DNS: skip: expected a pattern that matches a module, got 'fc'"),
    "skip-all": (dict(skip="*"), ValueError, "inq.DNS: model: expected at least one"),
    "nan": (dict(model=with_nan()), ValueError, "layer '4': expected finite values, got 1 NaN and 0 Inf of 720"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_have_one_clear_error_and_change_nothing(case):
    arguments, kind, message = BAD_ARGUMENTS[case]
    model = net()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(kind, match=message):
        inq.DNS(**{"model": model, "optimizer": opt, "c_rate": 0.3, "iter_stop": 9, **arguments})
    assert not opt._optimizer_step_post_hooks
    assert not opt._optimizer_step_pre_hooks
    assert bool((model[4].weight != 0).all())
    inq.DNS(model, opt, 0.3, iter_stop=9)


def test_one_run_at_a_time_holds_a_weight():
    model, opt, run = make()
    with pytest.raises(ValueError, match=r"layer '0': expected a weight of no other run, got one of another inq.DNS"):
        inq.INQ(model, opt, FMT)
    run.close()
    inq.INQ(model, opt, FMT).close()
    make()


def test_weights_that_were_replaced_are_noticed():
    model, _, run = make()
    model[4] = nn.Linear(144, 5)
    with pytest.raises(ValueError, match=r"layer '4': expected the Parameter of when .* make a new inq.DNS"):
        run.state_dict()


def test_unknown_names_are_named():
    _, _, run = make()
    with pytest.raises(KeyError, match=r"expected one of the modules \['0', '4'\], got 'fc'"):
        run.dense("fc")
    run.close()
    with pytest.raises(RuntimeError, match="inq.DNS: expected a run in use, got one that was closed"):
        run.dense("4")


def test_a_weight_outside_the_optimizer_is_warned_about():
    model = net()
    with pytest.warns(UserWarning, match=r"inq.DNS: optimizer: the weights of \['4'\]") as caught:
        inq.DNS(model, torch.optim.SGD(model[0].parameters(), 0.1), 0.3, iter_stop=9)
    assert caught[0].filename == __file__
