"""What a call of ``inq_kernels.linear`` costs beyond the compiled operator, by a product too small to matter.

The compiled operator's time is not that of its kernel alone: torch's dispatch of it (about 3 µs) is part of it, and so
is not counted as overhead.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import ops
from ..format import Format
from .case import DTYPES, Case, Context, Op, Request, Work, attempt, nbytes, normal, runner
from .timing import Runner
from .weights import RandomWeights, prepacked

COMPILED = "compiled operator"
_K, _N = 64, 64


def _cases(request: Request) -> Iterator[Case]:
    if request.isa != "native" or request.shapes:
        return
    for dtype in request.dtypes or ("bfloat16",):
        for grad in (False, True):
            params = {"shape": f"{_K}x{_N}", "k": _K, "n": _N, "m": 1, "bits": 4, "dtype": dtype, "grad": grad}
            yield Case("overhead", params, lambda context, dtype=dtype, grad=grad: _overhead(context, dtype, grad))


def _overhead(context: Context, dtype: str, grad: bool) -> Work:
    packed = prepacked(RandomWeights(_N, _K, Format(4)).packed(), context.backend)
    x = normal((1, _K), DTYPES[dtype])
    wanted = x.clone().requires_grad_(grad)
    moved = nbytes(x, packed.weight, packed.weight_exp) + _N * x.element_size()
    fields = (packed.weight, packed.weight_exp, None, None, 4, packed.format.levels, packed.layout, context.backend)

    candidate = Runner([lambda: ops.linear(wanted, packed, backend=context.backend)], moved)

    def check() -> str | None:
        y = candidate.run()
        if grad != (y.grad_fn is not None):
            return f"expected a gradient: {grad}, got grad_fn {y.grad_fn}"
        return None if torch.equal(y, torch.ops.inq.linear(x, *fields)) else "other values than the operator's"

    baselines = {
        COMPILED: attempt(lambda: _leaf(context.backend, x, packed, moved)),
        "operator": runner(torch.ops.inq.linear, [(x, *fields)], moved),
    }
    return Work(candidate, baselines, check)


def _leaf(backend: str, x: Tensor, packed: ops.PackedWeight, moved: int) -> Runner:
    """``torch.ops.inq_<backend>.linear``, where there is one: its own dispatch included, without choosing a backend.

    Arguments are found by name, since every backend has leaves of its own.
    """
    leaf = getattr(torch.ops, f"inq_{backend}").linear.default
    known = {
        "x": x, "weight": packed.weight, "weight_exp": packed.weight_exp, "weight_scale": None, "bias": None,
        "bits": packed.format.bits, "levels": packed.format.levels, "layout": packed.layout,
        "dense": packed.format.levels == "dense", "n": packed.shape[0], "k": packed.k,
    }  # fmt: skip
    names = [argument.name for argument in leaf._schema.arguments]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{leaf}: arguments that the benchmark does not know: {', '.join(unknown)}")
    return runner(leaf, [tuple(known[name] for name in names)], moved)


OVERHEAD = Op("overhead", (), _cases)
