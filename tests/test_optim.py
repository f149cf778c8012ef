"""inq.optim: torch.optim's steps, state and errors; with inq.INQ the mask goes inside the step."""

import copy

import pytest
import torch
from support import generator, same_bits
from torch import nn

import inq_kernels as inq
from inq_kernels.reference import pack_bits

PAIRS = [
    (inq.optim.SGD, torch.optim.SGD, {}),
    (inq.optim.SGD, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    (inq.optim.SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    (inq.optim.SGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.2, "maximize": True}),
    (inq.optim.AdamW, torch.optim.AdamW, {}),
    (inq.optim.AdamW, torch.optim.AdamW, {"betas": (0.8, 0.9), "eps": 1e-4, "weight_decay": 0.2, "maximize": True}),
]
pairs = pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS, ids=[f"{p[0].__name__} {[*p[2]]}" for p in PAIRS])
SHAPES = [(5, 3), (7,), (2, 3, 3, 3), (65,)]


def parameters(dtype=torch.float32):
    g = generator(1)
    return [nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for shape in SHAPES]


def give_gradients(params, step, skip=()):
    g = generator(100 + step)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=g).to(p.dtype)
        p.grad = None if i in skip else grad


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))


def train(net, optimizer, steps, seed=0):
    g = generator(seed)
    for _ in range(steps):
        x, y = torch.randn(8, 1, 8, 8, generator=g), torch.randint(10, (8,), generator=g)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pairs
def test_it_is_torch(dtype, ours, theirs, options):
    a, b = parameters(dtype), parameters(dtype)
    # Two groups, a learning rate schedule, and a parameter without a gradient every now and then.
    groups = [[{"params": p[:2]}, {"params": p[2:], "lr": 0.03}] for p in (a, b)]
    left, right = ours(groups[0], 0.1, **options), theirs(groups[1], 0.1, **options)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (left, right)]
    for step in range(6):
        for params, optimizer, schedule in zip((a, b), (left, right), schedules, strict=True):
            give_gradients(params, step, skip=(1,) if step % 2 else (3,))
            optimizer.step()
            schedule.step()
        for p, q in zip(a, b, strict=True):
            assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)
    # torch's optimizer goes on from our state, and ours from torch's.
    saved = [copy.deepcopy(o.state_dict()) for o in (left, right)]
    for group in saved[0]["param_groups"]:
        assert {k: v for k, v in saved[1]["param_groups"][0].items() if k in group}.keys() == group.keys()
    right.load_state_dict({**saved[1], "state": saved[0]["state"]})
    left.load_state_dict({**saved[0], "state": saved[1]["state"]})
    for params, optimizer in ((a, left), (b, right)):
        give_gradients(params, 9)
        optimizer.step()
    for p, q in zip(a, b, strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pairs
def test_masked_weights_and_their_state_keep_their_bits(dtype, ours, theirs, options):
    masked, free = parameters(dtype), parameters(dtype)
    held = [torch.rand(shape, generator=generator(i)) < 0.5 for i, shape in enumerate(SHAPES)]
    left, right = ours(masked, 0.1, **options), ours(free, 0.1, **options)
    for step in range(4):
        if step == 2:
            for p, h in zip(masked, held, strict=True):
                left.set_mask(p, pack_bits(h))
            before = [(p.detach().clone(), copy.deepcopy(left.state[p])) for p in masked]
        give_gradients(masked, step)
        give_gradients(free, step)
        if step >= 2:
            for p, h in zip(masked, held, strict=True):
                p.grad[h] = float("nan")
        left.step()
        right.step()
    for p, q, h, (value, state) in zip(masked, free, held, before, strict=True):
        assert same_bits(p.detach()[h], value[h])
        assert same_bits(p.detach()[~h], q.detach()[~h])
        assert not torch.equal(p.detach()[~h], value[~h])
        for name in left._state_names if state else ():
            assert same_bits(left.state[p][name][h], state[name][h])
            assert same_bits(left.state[p][name][~h], right.state[q][name][~h])
    left.set_mask(masked[0], None)
    give_gradients(masked, 7)
    left.step()
    assert not torch.equal(masked[0].detach()[held[0]], before[0][0][held[0]])


def test_momenta_of_held_weights_start_at_zero():
    # Also where they are made while the weight is held.
    p = nn.Parameter(torch.ones(70))
    optimizer = inq.optim.SGD([p], 0.1, momentum=0.9)
    optimizer.set_mask(p, pack_bits(torch.arange(70) % 2 == 0))
    p.grad = torch.ones(70)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["momentum_buffer"], (torch.arange(70) % 2).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pairs
def test_state_of_16_bit_parameters_stays_float32(dtype, ours, theirs, options):
    a = parameters(dtype)
    optimizer = ours(a, 0.1, **options)
    for step in range(3):
        give_gradients(a, step)
        optimizer.step()
    b = [nn.Parameter(p.detach().clone()) for p in a]
    other = ours(b, 0.1, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for params, o in ((a, optimizer), (b, other)):
        give_gradients(params, 5)
        o.step()
    for p, q in zip(a, b, strict=True):
        assert same_bits(p.detach(), q.detach())
        for name in optimizer._state_names if optimizer.state[p] else ():
            assert optimizer.state[p][name].dtype == torch.float32
            assert same_bits(optimizer.state[p][name], other.state[q][name])
            assert optimizer.state[p][name].data_ptr() != other.state[q][name].data_ptr()


def test_a_closure_runs_with_gradients_and_its_value_comes_back():
    p = nn.Parameter(torch.ones(3))
    optimizer = inq.optim.SGD([p], 0.5)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 3
    assert torch.equal(p.detach(), torch.zeros(3))
    assert optimizer.step() is None


def test_nothing_to_do():
    p = nn.Parameter(torch.ones(3))
    for optimizer in (inq.optim.SGD([p], 0.5, momentum=0.9), inq.optim.AdamW([p])):
        optimizer.step()
        assert torch.equal(p.detach(), torch.ones(3))
        assert not optimizer.state


def test_with_a_grad_scaler():
    p = nn.Parameter(torch.ones(3))
    optimizer = inq.optim.AdamW([p], 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for loss in (p.sum(), p.sum() * float("inf")):
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    # The second step was skipped.
    assert float(optimizer.state[p]["step"]) == 1


def test_copies_start_without_masks():
    p = nn.Parameter(torch.ones(3))
    optimizer = inq.optim.SGD([p], 0.5)
    optimizer.set_mask(p, torch.tensor([7], dtype=torch.uint8))
    other = copy.deepcopy(optimizer)
    (q,) = other.param_groups[0]["params"]
    q.grad = torch.ones(3)
    other.step()
    assert torch.equal(q.detach(), torch.full((3,), 0.5))


def test_errors():
    p = nn.Parameter(torch.ones(9))
    for options, message in (
        ({"lr": -1}, "SGD: lr: expected a finite number ≥ 0, got -1"),
        ({"lr": float("nan")}, "SGD: lr: "),
        ({"lr": 1, "momentum": -0.1}, "SGD: momentum: "),
        ({"lr": 1, "weight_decay": -0.1}, "SGD: weight_decay: "),
        ({"lr": 1, "nesterov": True}, "SGD: nesterov: expected a momentum above 0"),
        ({"lr": 1, "momentum": 0.9, "dampening": 0.1, "nesterov": True}, "dampening 0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            inq.optim.SGD([p], **options)
    for options, message in (
        ({"lr": -1}, "AdamW: lr: "),
        ({"eps": -1}, "AdamW: eps: "),
        ({"weight_decay": -1}, "AdamW: weight_decay: "),
        ({"betas": (0.9, 1.0)}, "AdamW: betas: expected two numbers"),
        ({"betas": (0.9,)}, "AdamW: betas: "),
    ):
        with pytest.raises(ValueError, match=message):
            inq.optim.AdamW([p], **options)
    for name in ("foreach", "fused", "capturable", "differentiable"):
        with pytest.raises(TypeError, match=name):
            inq.optim.AdamW([p], **{name: True})
        with pytest.raises(TypeError, match=name):
            inq.optim.SGD([p], 0.1, **{name: True})
    for dtype in (torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=f"params: expected parameters of float64.*got {dtype}"):
            inq.optim.AdamW([nn.Parameter(torch.zeros(3, dtype=dtype))])
    optimizer = inq.optim.AdamW([p])
    bits = torch.zeros(2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="set_mask: param: expected one of the optimizer's"):
        optimizer.set_mask(nn.Parameter(torch.ones(9)), bits)
    with pytest.raises(TypeError, match="set_mask: mask: expected a uint8 tensor, got torch.bool"):
        optimizer.set_mask(p, torch.zeros(9, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"set_mask: mask: expected shape \[2\], got \[3\]"):
        optimizer.set_mask(p, torch.zeros(3, dtype=torch.uint8))
    p.grad = torch.ones(9).to_sparse()
    with pytest.raises(RuntimeError, match=r"inq.optim.AdamW: gradient .*\[9\]: expected a dense one"):
        optimizer.step()


OPTIMIZERS = {
    "sgd": lambda params: inq.optim.SGD(params, 0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda params: inq.optim.AdamW(params, 1e-2),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("pruned", [False, True])
def test_inq_gives_its_masks_to_the_step(make, pruned, monkeypatch):
    net = model()
    optimizer = make(net.parameters())
    masks = {"3": torch.rand(net[3].weight.shape, generator=generator(5)) < 0.7} if pruned else None
    run = inq.INQ(net, optimizer, inq.Format(4), prune_masks=masks)
    # Before the first portion everything moves, and gets momenta: also what is pruned then.
    train(net, optimizer, 2)
    restored = []
    for layer in run._layers.values():
        monkeypatch.setattr(layer, "restore", lambda name=layer.name, r=layer.restore: (restored.append(name), r()))
    for _ in run:
        start = copy.deepcopy(net.state_dict())
        optimizer_start = copy.deepcopy({n: optimizer.state.get(net[int(n)].weight, {}) for n in ("0", "3")})
        restored.clear()
        train(net, optimizer, 4)
        assert restored == []
        for name in ("0", "3"):
            held = run.frozen(name) | (~masks[name] if masks and name in masks else False)
            weight = net[int(name)].weight
            assert same_bits(weight.detach()[held], start[f"{name}.weight"][held])
            for key in optimizer._state_names if optimizer_start[name] else ():
                assert same_bits(optimizer.state[weight][key][held], optimizer_start[name][key][held])
            assert bool(held.all()) or not torch.equal(weight.detach(), start[f"{name}.weight"])
    # Exactly: convert refuses what is not representable.
    inq.convert(net, run.formats)
    assert isinstance(net[3], inq.Linear)
    run.close()
    assert not optimizer._masks


def test_a_weight_that_the_optimizer_does_not_step_is_still_written_back():
    net = model()
    optimizer = inq.optim.SGD(net[0].parameters(), 0.1)
    with pytest.warns(UserWarning, match="not among its parameters"):
        run = inq.INQ(net, optimizer, inq.Format(5))
    next(iter(run))
    frozen, before = run.frozen("3"), net[3].weight.detach().clone()
    with torch.no_grad():
        net[3].weight.add_(1)
    train(net, optimizer, 1)
    assert same_bits(net[3].weight.detach()[frozen], before[frozen])
    run.close()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_goes_on_bit_for_bit(make, dtype, tmp_path):
    def start():
        net = model()
        for parameter in net[3].parameters():
            parameter.data = parameter.data.to(dtype)
        net[3].register_forward_pre_hook(lambda _, x: (x[0].to(dtype),))
        net[3].register_forward_hook(lambda _, __, y: y.float())
        optimizer = make(net.parameters())
        return net, optimizer, inq.INQ(net, optimizer, inq.Format(5))

    def go_on(net, optimizer, run):
        for portion in run:
            train(net, optimizer, 3, seed=int(portion * 100))

    net, optimizer, run = start()
    steps = iter(run)
    next(steps)
    train(net, optimizer, 2)
    next(steps)
    train(net, optimizer, 2)
    inq.save_training(tmp_path / "t", net, optimizer, run)
    resumed = start()
    inq.load_training(tmp_path / "t", *resumed)
    # What is frozen is held right away.
    held = resumed[2].frozen("3")
    before = resumed[0][3].weight.detach().clone()
    for objects in ((net, optimizer, run), resumed):
        train(objects[0], objects[1], 2, seed=3)
    assert same_bits(resumed[0][3].weight.detach()[held], before[held])
    for objects in ((net, optimizer, run), resumed):
        go_on(*objects)
    for (name, value), other in zip(net.state_dict().items(), resumed[0].state_dict().values(), strict=True):
        assert same_bits(value, other), name


@pytest.mark.parametrize("make", [inq.optim.SGD, inq.optim.AdamW])
def test_autograd_notices_a_step_between_forward_and_backward(make):
    w = torch.nn.Parameter(torch.ones(4))
    optimizer = make([w], lr=0.5)
    w.sum().backward()
    out = (w * w).sum()
    before = w._version
    optimizer.step()
    assert w._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_another_optimizers_state_is_refused():
    w = torch.nn.Parameter(torch.ones(4))
    other = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    w.sum().backward()
    other.step()
    optimizer = inq.optim.AdamW([w])
    with pytest.raises(ValueError, match="load_state_dict: expected a hyperparameter 'betas', got none"):
        optimizer.load_state_dict(other.state_dict())
    coupled = torch.optim.Adam([w], weight_decay=0.1)
    with pytest.raises(ValueError, match="expected decoupled weight decay without amsgrad, got another"):
        optimizer.load_state_dict(coupled.state_dict())
    optimizer.state[w]["exp_avg"] = torch.zeros(4)
    with pytest.raises(RuntimeError, match="expected step, exp_avg and exp_avg_sq, got no step"):
        optimizer.step()


def test_masks_and_gradients_that_do_not_fit():
    w = torch.nn.Parameter(torch.ones(32, dtype=torch.bfloat16))
    optimizer = inq.optim.SGD([w], lr=1.0)
    with pytest.raises(ValueError, match="set_mask: mask: expected one with values, got one on the meta device"):
        optimizer.set_mask(w, torch.zeros(4, dtype=torch.uint8, device="meta"))
    optimizer.set_mask(w, torch.tensor([255, 9, 0, 9, 0, 9, 0, 9], dtype=torch.uint8)[::2])
    w.sum().backward()
    optimizer.step()
    assert w.tolist() == [1.0] * 8 + [0.0] * 24
    w.grad = None
    w.grad_dtype = torch.float32
    w.grad = torch.ones(32)
    with pytest.raises(RuntimeError, match="expected torch.bfloat16, got torch.float32"):
        optimizer.step()
