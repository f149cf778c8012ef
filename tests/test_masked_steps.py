"""The fused steps are torch.optim's, and what the mask freezes keeps its bits: weight, momentum and moments."""

import pytest
import torch
from support import generator, same_bits

from inq_kernels.reference import pack_bits

ops = torch.ops.inq
SHAPES = [(3, 7), (5,), (2, 2, 3, 3)]
EMPTY = torch.empty(0, dtype=torch.uint8)

SGD = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"momentum": 0.9, "maximize": True, "weight_decay": 0.1},
    {"weight_decay": 0.1, "maximize": True},
]
ADAMW = [
    {},
    {"weight_decay": 0.0},
    {"betas": (0.5, 0.7), "eps": 1e-3, "weight_decay": 0.3},
    {"maximize": True},
]


class Sgd:
    """masked_sgd_ with the arguments and the state of torch.optim.SGD."""

    torch = torch.optim.SGD
    state = ("momentum_buffer",)

    def __init__(
        self, params, masks, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False
    ):
        self.params, self.masks, self.first = params, masks, True
        self.states = [[like_state(p) for p in params] if momentum else []]
        self.options = (lr, momentum, dampening, weight_decay, nesterov, maximize)

    def step(self, grads):
        ops.masked_sgd_(self.params, grads, *self.states, self.masks, *self.options, self.first)
        self.first = False


class AdamW:
    """masked_adamw_ with the arguments and the state of torch.optim.AdamW."""

    torch = torch.optim.AdamW
    state = ("exp_avg", "exp_avg_sq")

    def __init__(self, params, masks, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, maximize=False):
        self.params, self.masks, self.steps = params, masks, 0
        self.states = [[like_state(p) for p in params] for _ in range(2)]
        self.options = (lr, *betas, weight_decay, eps)
        self.maximize = maximize

    def step(self, grads):
        self.steps += 1
        ops.masked_adamw_(self.params, grads, *self.states, self.masks, *self.options, self.steps, self.maximize)


def like_state(p):
    """Zeros in float32, or float64 for float64 weights: where the arithmetic happens."""
    return torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))


def tensors(dtype, seed):
    g = generator(seed)
    return [torch.randn(shape, generator=g).to(dtype) for shape in SHAPES]


def random_masks(seed=9):
    g = generator(seed)
    return [torch.rand(shape, generator=g) < 0.5 for shape in SHAPES]


CASES = [(Sgd, o) for o in SGD] + [(AdamW, o) for o in ADAMW]
optimizers = pytest.mark.parametrize(
    ("optimizer", "options"), CASES, ids=[f"{c.__name__} {' '.join(o)}".strip() for c, o in CASES]
)


@optimizers
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_without_a_mask_it_is_torch(dtype, optimizer, options):
    params = tensors(dtype, 0)
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    ours, expected = optimizer(params, [EMPTY] * 3, 0.1, **options), optimizer.torch(theirs, 0.1, **options)
    rounding = 32 * torch.finfo(dtype).eps
    for step in range(1, 6):
        grads = tensors(dtype, step)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        expected.step()
        ours.step(grads)
        for p, q in zip(params, theirs, strict=True):
            assert torch.allclose(p, q, rtol=rounding, atol=rounding)
        for name, states in zip(optimizer.state, ours.states, strict=True):
            for state, p in zip(states, theirs, strict=bool(states)):
                assert torch.allclose(state, expected.state[p][name], rtol=rounding, atol=rounding)


@optimizers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_weights_are_rounded_once_a_step(dtype, optimizer, options):
    # torch in float32 on the same weights, rounded after each step; the state stays float32.
    params = tensors(dtype, 0)
    theirs = [torch.nn.Parameter(p.float()) for p in params]
    ours, expected = optimizer(params, [EMPTY] * 3, 0.1, **options), optimizer.torch(theirs, 0.1, **options)
    for step in range(1, 6):
        grads = tensors(dtype, step)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.float()
        expected.step()
        ours.step(grads)
        for p, q in zip(params, theirs, strict=True):
            # At most one unit in the last place where float32 rounding meets a tie; then go on from the same weights.
            assert torch.allclose(p.float(), q.detach(), rtol=torch.finfo(dtype).eps, atol=0)
            q.data.copy_(p)
        for name, states in zip(optimizer.state, ours.states, strict=True):
            for state, p in zip(states, theirs, strict=bool(states)):
                assert state.dtype == torch.float32
                assert torch.allclose(state, expected.state[p][name], rtol=1e-6, atol=1e-7)


@optimizers
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_frozen_weights_and_their_state_keep_their_bits(dtype, optimizer, options):
    frozen = random_masks()
    params, free = tensors(dtype, 0), tensors(dtype, 0)
    # The second tensor has no mask: all of it moves.
    frozen[1][:] = False
    masks = [pack_bits(frozen[0]), EMPTY, pack_bits(frozen[2])]
    ours, unmasked = optimizer(params, masks, 0.1, **options), optimizer(free, [EMPTY] * 3, 0.1, **options)
    for step in range(1, 4):
        # Before the step: −0, as a frozen weight and as its state.
        for group in (params, *ours.states):
            for tensor, mask in zip(group, frozen, strict=bool(group)):
                tensor.view(-1)[mask.view(-1).nonzero()[:1]] = -0.0
        before = [[t.clone() for t in group] for group in (params, *ours.states)]
        grads = tensors(dtype, step)
        unmasked.step(grads)
        # A frozen weight's gradient does not matter, not even NaN.
        ours.step([torch.where(mask, float("nan"), g) for g, mask in zip(grads, frozen, strict=True)])
        for old, new, moved in zip(before, (params, *ours.states), (free, *unmasked.states), strict=True):
            for a, b, c, mask in zip(old, new, moved, frozen, strict=bool(old)):
                assert same_bits(b[mask], a[mask])
                assert same_bits(b[~mask], c[~mask])
                assert not bool((b[~mask] == a[~mask]).all())


@optimizers
def test_everything_frozen(optimizer, options):
    params = tensors(torch.float32, 0)
    before = [p.clone() for p in params]
    ours = optimizer(params, [pack_bits(torch.ones(p.shape, dtype=torch.bool)) for p in params], 0.1, **options)
    for step in range(1, 3):
        ours.step(tensors(torch.float32, step))
    assert all(same_bits(p, b) for p, b in zip(params, before, strict=True))
    assert all(not bool(state.any()) for states in ours.states for state in states)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_opcheck(dtype):
    params, grads = tensors(dtype, 0), tensors(dtype, 1)
    for masks in ([EMPTY] * 3, [pack_bits(m) for m in random_masks()]):
        buffers, second = [like_state(p) for p in params], [like_state(p) for p in params]
        sgd = (masks, 0.1, 0.9, 0.1, 0.01, False, False)
        torch.library.opcheck(ops.masked_sgd_.default, (params, grads, buffers, *sgd, True))
        torch.library.opcheck(ops.masked_sgd_.default, (params, grads, buffers, *sgd, False))
        torch.library.opcheck(
            ops.masked_sgd_.default, (params, grads, [], masks, 0.1, 0.0, 0.0, 0.0, False, True, True)
        )
        adamw = (masks, 0.1, 0.9, 0.999, 0.01, 1e-8, 1, False)
        torch.library.opcheck(ops.masked_adamw_.default, (params, grads, buffers, second, *adamw))
