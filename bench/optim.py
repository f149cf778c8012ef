"""``masked_adamw_`` and ``masked_sgd_``: a step on ResNet-50's weights, half of them frozen, beside torch's without.

Two rows each: the operator beside torch's fused operator, and the step of ``inq_kernels.optim`` beside that of
``torch.optim``, with the Python around both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from math import prod

import torch
from torch import Tensor

from .. import optim, reference
from . import shapes
from .case import Case, Context, Op, Request, Work, attempt, nbytes
from .timing import Runner

_ADAMW = {"lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 0.01, "eps": 1e-8}
_SGD = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 5e-4}
# The bar is 1.05 times torch's step: some 20 pairs, as other cases have, leave the ratio uncertain by as much.
_LONGER = 8.0
_TORCH = {"masked_adamw": (torch.optim.AdamW, _ADAMW, 7), "masked_sgd": (torch.optim.SGD, _SGD, 5)}


class State:
    """Parameters with gradients, one-bit masks, and the buffers of a step."""

    def __init__(self, layers: tuple[tuple[int, int], ...], buffers: int, seed: int = 0, device: str = "cpu"):
        how = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
        self.params = [torch.randn(shape, **how).mul_(0.05) for shape in layers]
        self.grads = [torch.randn(shape, **how).mul_(0.01) for shape in layers]
        self.buffers = [[torch.zeros(shape, device=device) for shape in layers] for _ in range(buffers)]
        half = [torch.rand(shape, **how) < 0.5 for shape in layers]
        self.masks = [reference.pack_bits(each) for each in half]


def _step(op: str, state: State, function: Callable, is_first: bool = True) -> Callable[[], None]:
    """``function`` with the arguments of ``torch.ops.inq.masked_*_`` on this state."""
    lists = (state.params, state.grads, *state.buffers, state.masks)
    if op == "masked_adamw":
        (beta1, beta2), c = _ADAMW["betas"], _ADAMW
        return lambda: function(*lists, c["lr"], beta1, beta2, c["weight_decay"], c["eps"], 1, False)
    c = _SGD
    return lambda: function(*lists, c["lr"], c["momentum"], 0.0, c["weight_decay"], False, False, is_first)


def _torch_step(op: str, state: State) -> Callable[[], None]:
    """torch's fused operator on this state, without a mask."""
    c = _SGD if op == "masked_sgd" else _ADAMW
    common = {"lr": c["lr"], "weight_decay": c["weight_decay"], "maximize": False}
    if op == "masked_sgd":
        common |= {"momentum": c["momentum"], "dampening": 0.0, "nesterov": False, "is_first_step": False}
        return lambda: torch._fused_sgd_(state.params, state.grads, state.buffers[0], **common)
    beta1, beta2 = c["betas"]
    steps = [torch.ones(()) for _ in state.params]
    common |= {"beta1": beta1, "beta2": beta2, "eps": c["eps"], "amsgrad": False}
    return lambda: torch._fused_adamw_(state.params, state.grads, *state.buffers, [], steps, **common)


def _optimizer_step(op: str, state: State, make: Callable) -> Callable[[], object]:
    """The ``step`` of the optimizer that ``make`` returns for this state's parameters."""
    params = [torch.nn.Parameter(p) for p in state.params]
    for p, grad in zip(params, state.grads, strict=True):
        p.grad = grad
    return make(params, **_TORCH[op][1]).step


def _candidate(op: str, state: State) -> Callable[[], object]:
    """What users call: the step of ``inq_kernels.optim``."""
    cls = optim.AdamW if op == "masked_adamw" else optim.SGD

    def make(params: list[Tensor], **options):
        optimizer = cls(params, **options)
        for p, mask in zip(params, state.masks, strict=True):
            optimizer.set_mask(p, mask)
        return optimizer

    return _optimizer_step(op, state, make)


def _cases(op: str):
    def cases(request: Request) -> Iterator[Case]:
        if request.isa != "native":
            return
        named = {f"{k}x{n}": ((n, k),) for k, n in request.shapes or ((2048, 2048),)}
        for name, layers in (
            named if request.quick or request.shapes else {"ResNet-50": shapes.RESNET50_WEIGHTS}
        ).items():
            for call in ("operator", "optimizer"):
                params = {"shape": name, "weights": sum(map(prod, layers)), "dtype": "float32", "call": call}
                yield Case(op, params, lambda context, layers=layers, call=call: _masked(context, op, layers, call))

    return cases


def _masked(context: Context, op: str, layers: tuple[tuple[int, int], ...], call: str) -> Work:
    torch_class, options, accesses = _TORCH[op]
    buffers = accesses // 2 - 1
    first = State(layers, buffers, device=context.device)
    numel = sum(p.numel() for p in first.params)
    moved = numel * 4 * accesses + nbytes(*first.masks)
    count = context.rotation(4 * numel * (2 + buffers))
    states = [first, *(copy.deepcopy(first) for _ in range(count - 1))]
    operator = getattr(torch.ops.inq, f"{op}_")
    as_operator = call == "operator"
    made = [_step(op, s, operator, is_first=False) if as_operator else _candidate(op, s) for s in states]

    def check() -> str | None:
        mine, theirs = copy.deepcopy(first), copy.deepcopy(first)
        (_step(op, mine, operator) if as_operator else _candidate(op, mine))()
        _step(op, theirs, getattr(reference, f"{op}_"))()
        for i, (a, b, before, mask) in enumerate(
            zip(mine.params, theirs.params, first.params, first.masks, strict=True)
        ):
            held = reference.unpack_bits(mask, a.shape)
            if not torch.equal(a[held], before[held]):
                return f"tensor {i}: {int((a != before)[held].sum())} frozen weights moved"
            error = (a - b).abs() - 2e-5 * (b - before).abs() - 2 * torch.finfo(a.dtype).eps * b.abs()
            if not bool((error <= 0).all()):
                return f"tensor {i}: the step differs from the definition's by up to {float(error.max())} more"
        return None

    def baseline(make: Callable[[State], Callable[[], object]]) -> Runner:
        return Runner([make(copy.deepcopy(state)) for state in states], moved)

    def torch_step(**how):
        # A graph can hold AdamW's step only if the number of steps is on the device.
        how |= {"capturable": True} if context.device == "cuda" and op == "masked_adamw" else {}
        return attempt(lambda: baseline(lambda s: _optimizer_step(op, s, lambda p, **o: torch_class(p, **o, **how))))

    if as_operator:
        # On the candidate's own memory: where pages happen to lie makes equal steps differ by 10 %.
        # Half a rotation on: not the copy that the candidate has just used.
        half = len(states) // 2
        fused = attempt(lambda: Runner([_torch_step(op, s) for s in states[half:] + states[:half]], moved))
        return Work(Runner(made, moved), {"torch fused, no mask": fused}, check, facts={"frozen": 0.5}, longer=_LONGER)
    baselines = {
        "torch fused, no mask": torch_step(fused=True),
        "torch foreach, no mask": torch_step(foreach=True),
        "plain torch": attempt(lambda: baseline(lambda s: _step(op, s, getattr(reference, f"{op}_")))),
    }
    return Work(Runner(made, moved), baselines, check, facts={"frozen": 0.5})


OPS = tuple(Op(op, (f"{op}_",), _cases(op)) for op in _TORCH)
