"""Other ways to multiply by a weight [N, K], each on rotated copies of its own: torch dense, int4 and dynamic int8."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import DTYPES, Context, attempt, nbytes, runner
from .timing import Runner
from .weights import RandomWeights

INT4_GROUP = 128
# Above these they cost more than they tell: int4 is slower than dense from M = 64 on, int8 and a dense product in
# another dtype than x's compete with few.
MAX_M = {"int4": 64, "int8": 256, "float32": 256, "bfloat16": 256}


def linear_baselines(context: Context, w: RandomWeights, m: int, dtype: str, x: Tensor) -> dict[str, Runner | str]:
    """Baselines for y = x · Wᵀ: dense in x's dtype first."""
    others = [name for name in ("bfloat16", "float32") if name != dtype]
    found = {f"dense {name}": _dense(context, w, x, name, m, limited=name != dtype) for name in (dtype, *others)}
    found["int4 g128"] = _limited("int4", m, lambda: _int4(context, w, x))
    found["dynamic int8"] = _limited("int8", m, lambda: _int8(context, w, x))
    return found


def _limited(name: str, m: int, build: Callable[[], Runner]) -> Runner | str:
    if m > MAX_M.get(name, m):
        return f"not timed above M = {MAX_M[name]}"
    return attempt(build)


def _dense(context: Context, w: RandomWeights, x: Tensor, name: str, m: int, limited: bool) -> Runner | str:
    def build() -> Runner:
        weights = context.copies(("dense", name), lambda: w.dense(DTYPES[name]))
        y_bytes = m * w.n * weights[0].element_size()
        mine = x.to(DTYPES[name])
        return runner(F.linear, [(mine, each) for each in weights], nbytes(mine, weights[0]) + y_bytes)

    return _limited(name if limited else "", m, build)


def _int4(context: Context, w: RandomWeights, x: Tensor) -> Runner:
    """torch's weight-only int4, bfloat16 activations, a scale and a zero point each group of 128 weights."""

    def pack() -> Tensor:
        q = torch.randint(0, 16, (w.n, w.k), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)

    weights = context.copies("int4", pack)
    scales = context.get("int4 scales", lambda: torch.rand(w.k // INT4_GROUP, w.n, 2).bfloat16())
    mine = x.bfloat16()
    arguments = [(mine, each, INT4_GROUP, scales) for each in weights]
    moved = nbytes(mine, weights[0], scales) + 2 * mine.shape[0] * w.n
    return runner(torch.ops.aten._weight_int4pack_mm_for_cpu, arguments, moved)


def _int8(context: Context, w: RandomWeights, x: Tensor) -> Runner:
    """torch's dynamic int8: float32 activations quantized on the fly."""

    def pack() -> list:
        dense = w.dense(torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, and still what there is
            q = torch.quantize_per_tensor(dense, float(dense.abs().max()) / 127, 0, torch.qint8)
            return [torch.ops.quantized.linear_prepack(q, None) for _ in range(context.rotation(w.n * w.k))]

    weights = context.get("int8", pack)
    mine = x.float()
    moved = nbytes(mine) + w.n * w.k + 4 * mine.shape[0] * w.n
    return runner(torch.ops.quantized.linear_dynamic, [(mine, each, True) for each in weights], moved)
