"""Other ways to multiply by a weight [N, K] on a GPU, each on rotated copies of its own: cuBLAS, torch's fp8 and int4
products, and the packages that are installed of Humming, GemLite and bitsandbytes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops, slices
from ..ops import PackedWeight
from .case import DTYPES, Context, attempt, nbytes, runner
from .gpu import to_e4m3
from .timing import Runner
from .weights import RandomWeights

INT4_GROUP, INT4_INNER_TILES = 128, 8
# Above this many rows they cost more than they tell: kernels that decode, made for few rows.
MAX_M = {"int4": 256, "bitsandbytes": 256}


def linear_baselines(
    context: Context, w: RandomWeights, m: int, dtype: str, x: Tensor, packed: PackedWeight, op: str = "linear"
) -> dict[str, Runner | str]:
    """Baselines for y = x · Wᵀ: cuBLAS in x's dtype first. Triton's kernels are one of the CUDA library's."""
    return {
        f"cuBLAS {dtype}": attempt(lambda: _cublas(context, w, x, dtype)),
        **triton(context, packed, x, op, (None,)),
        "_scaled_mm fp8": attempt(lambda: _scaled_mm(context, w, x)),
        "_weight_int4pack_mm": _limited("int4", m, lambda: attempt(lambda: _int4(context, w, x))),
        "Humming": _peer("humming", lambda: _humming(context, w, m, dtype, x)),
        "GemLite": _peer("gemlite", lambda: _gemlite(context, w, dtype, x)),
        "bitsandbytes NF4": _limited(
            "bitsandbytes", m, lambda: _peer("bitsandbytes", lambda: _bitsandbytes(context, w, dtype, x))
        ),
    }


def _limited(name: str, m: int, build: Callable[[], Runner | str]) -> Runner | str:
    return f"not timed above M = {MAX_M[name]}" if m > MAX_M[name] else build()


def _peer(package: str, build: Callable[[], Runner]) -> Runner | str:
    """A package that need not be here. Whatever it raises is the reason why it has no time: it is not ours to mend."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    try:
        made = build()
        made.run()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return made


def _moved(x: Tensor, weight_bytes: int, n: int) -> int:
    return nbytes(x) + weight_bytes + x.shape[0] * n * x.element_size()


def _cublas(context: Context, w: RandomWeights, x: Tensor, name: str) -> Runner:
    weights = context.copies(("dense", name), lambda: w.dense(DTYPES[name]))
    return runner(F.linear, [(x, each) for each in weights], _moved(x, nbytes(weights[0]), w.n))


def triton(context: Context, packed: PackedWeight, x: Tensor, op: str, between: tuple) -> dict[str, Runner | str]:
    """Where the library's kernels are measured, Triton's beside them. ``between``: as for ``_triton``."""
    return {"Triton": attempt(lambda: _triton(context, packed, x, op, between))} if context.backend == "cuda" else {}


def _triton(context: Context, packed: PackedWeight, x: Tensor, op: str, between: tuple) -> Runner:
    """``torch.ops.inq.<op>`` by Triton's kernels, from their layout. ``between``: its arguments behind the weight's,
    the bias or K."""
    layout = slices.E4M3 if op == "linear_fp8" else slices.best(x.dtype, packed.format)
    if not slices.has(layout, packed.format):
        layout = slices.best(x.dtype, packed.format)
    made = ops.prepack(packed, layout)
    weights = context.copies(("Triton", layout, packed.format), made.weight.clone)
    tail = (
        packed.weight_exp,
        packed.weight_scale,
        *between,
        packed.format.bits,
        packed.format.levels,
        layout,
        "triton",
    )
    return runner(
        getattr(torch.ops.inq, op),
        [(x, each, *tail) for each in weights],
        _moved(x, nbytes(made.weight), sum(packed.shape) - x.shape[-1]),
    )


def _scaled_mm(context: Context, w: RandomWeights, x: Tensor) -> Runner:
    """torch's fp8 product with one scale for each operand. Rounding x is not in its time: a bound, not a peer."""
    weights = context.copies("e4m3", lambda: to_e4m3(w.dense(torch.bfloat16))[0])
    values, scale = to_e4m3(x)
    one, out = scale.new_ones(()), torch.bfloat16 if x.dtype == torch.float32 else x.dtype

    def call(weight: Tensor) -> Tensor:
        return torch._scaled_mm(values, weight.t(), scale, one, out_dtype=out)

    return runner(call, [(each,) for each in weights], nbytes(values, weights[0]) + x.shape[0] * w.n * out.itemsize)


def _int4(context: Context, w: RandomWeights, x: Tensor) -> Runner:
    """torch's weight-only int4 (tinygemm): bfloat16 x, a scale and a zero point each group of 128 weights."""

    def pack() -> Tensor:
        q = torch.randint(0, 256, (w.n, w.k // 2), dtype=torch.uint8, device=context.device)
        return torch.ops.aten._convert_weight_to_int4pack(q, INT4_INNER_TILES)

    weights = context.copies("int4", pack)
    scales = context.get("int4 scales", lambda: torch.rand(w.k // INT4_GROUP, w.n, 2, device=context.device).bfloat16())
    mine = x.bfloat16()
    arguments = [(mine, each, INT4_GROUP, scales) for each in weights]
    return runner(torch.ops.aten._weight_int4pack_mm, arguments, _moved(mine, nbytes(weights[0], scales), w.n))


def _humming(context: Context, w: RandomWeights, m: int, dtype: str, x: Tensor) -> Runner:
    """Its float4e3m0 (or float5e4m0) is the dense format: the same codes as ours, a scale for each row.

    Block shapes must be given; these follow its examples and are not tuned.
    """
    from humming import dtypes
    from humming.layer import HummingLayer

    kind = getattr(dtypes, {4: "float4e3m0", 5: "float5e4m0"}[w.fmt.bits])
    rows = min(max(16, 1 << (m - 1).bit_length()), 64)

    def layers() -> list:
        made = []
        for _ in range(context.rotation(w.n * w.k * w.fmt.bits // 8)):
            layer = HummingLayer(w.n, w.k, getattr(dtypes, dtype), kind, getattr(dtypes, dtype), getattr(dtypes, dtype))
            layer = layer.to(context.device)
            layer.load_from_unquantized_weight(w.dense(DTYPES[dtype]))
            layer.finish_load()
            made.append(layer)
        return made

    found = context.get(("humming", dtype, w.fmt.bits), layers)

    def call(layer) -> Tensor:
        return layer(inputs=x, block_shape=(rows, 256, 64), warp_shape=(rows, 64, 64))

    return runner(call, [(layer,) for layer in found], _moved(x, w.n * w.k * w.fmt.bits // 8, w.n))


def _gemlite(context: Context, w: RandomWeights, dtype: str, x: Tensor) -> Runner:
    """Integers of 4 bits with a scale and a zero point each group of 128."""
    from gemlite.core import TORCH_TO_DTYPE, GemLiteLinearTriton

    kind = TORCH_TO_DTYPE[DTYPES[dtype]]

    def layers() -> list:
        made = []
        for _ in range(context.rotation(w.n * w.k // 2)):
            layer = GemLiteLinearTriton(
                4, group_size=128, in_features=w.k, out_features=w.n, input_dtype=kind, output_dtype=kind
            )
            q = torch.randint(0, 16, (w.n, w.k), dtype=torch.uint8, device=context.device)
            scales = torch.rand(w.n * w.k // 128, 1, dtype=DTYPES[dtype], device=context.device)
            layer.pack(q, scales, torch.full_like(scales, 8), None)
            made.append(layer)
        return made

    found = context.get(("gemlite", dtype), layers)
    return runner(lambda layer: layer(x), [(layer,) for layer in found], _moved(x, w.n * w.k * 9 // 16, w.n))


def _bitsandbytes(context: Context, w: RandomWeights, dtype: str, x: Tensor) -> Runner:
    """NF4 with a scale each block of 64 weights."""
    import bitsandbytes

    first, state = context.get(
        ("bitsandbytes", dtype, "state"),
        lambda: bitsandbytes.functional.quantize_4bit(w.dense(DTYPES[dtype]), quant_type="nf4"),
    )
    weights = context.copies(("bitsandbytes", dtype), lambda: first)

    def call(weight: Tensor) -> Tensor:
        return bitsandbytes.matmul_4bit(x, weight.t(), quant_state=state)

    return runner(call, [(each,) for each in weights], _moved(x, nbytes(first, state.absmax), w.n))
