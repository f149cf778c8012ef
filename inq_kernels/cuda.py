"""The compiled CUDA library: loading it, its leaf operators ``torch.ops.inq_cuda.*``, and ``torch.ops.inq``'s on them.

Each function here has the name and the arguments of an operator in ``library.SCHEMAS`` and runs on CUDA tensors.
Products read the layouts of fragments.py. What the library has not (convolutions, float32 products) is Triton's.
Sources: csrc/.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import fragments, layouts
from .format import Format
from .layouts import STORAGE
from .library import FAKES

# Of products' activations; training and storage take float32 too.
PRODUCT_DTYPES = (torch.float16, torch.bfloat16)
DTYPES = (*PRODUCT_DTYPES, torch.float32)
LAYOUTS = {torch.float16: fragments.FP16, torch.bfloat16: fragments.BF16}
# From so many rows on decoding once costs little beside torch's product: 2.7 % at 8192 rows, 20 % at 1024 (KERNELS.md).
DENSE_ROWS = 2048
_FOLDER = Path(__file__).resolve().parent
_leaf = torch.ops.inq_cuda


@functools.cache
def unavailable() -> str | None:
    """None if the library is loaded (now, or before) and there is a device for it, else why not."""
    path = _FOLDER / "_cuda.so"
    if not path.exists():
        reason = _FOLDER / "_cuda_build.txt"
        text = reason.read_text() if reason.exists() else ""
        return f"there is no CUDA library: {text or 'this folder was not installed (pip install -e .)'}"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if (found := torch.cuda.get_device_capability()) < (8, 0):
        return f"it needs compute capability 8.0 or more, and the device has {found[0]}.{found[1]}"
    return load(path)


def load(path: Path) -> str | None:
    """Load the library and give its leaf operators their shape functions. None, or why it does not load."""
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the CUDA library does not load: {error.__cause__ or error}"
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"inq_cuda::{name}", fake)
    return None


def plan(
    op: str, m: int, n: int, k: int, dtype: torch.dtype, fmt: Format, capability: int, processors: int
) -> tuple[str, str]:
    """(kernel, layout) of a product on a GPU of this kind, x in one piece. The library must be loaded."""
    layout = fragments.E4M3 if op == "linear_fp8" else LAYOUTS[dtype]
    if op == "linear" and m >= DENSE_ROWS:
        return "decode, then torch's product in float32", layout
    sizes = (op, m, n, k, fmt.bits, fmt.levels == "dense", dtype == torch.float16, k % 8 == 0, capability, processors)
    return _leaf.plan(*sizes), layout


def _ready(weight: Tensor, n: int, k: int, fmt: Format, layout: str, wanted: str) -> Tensor:
    """``weight`` in the layout that the kernels read. A module has done this once; here it is for this call alone."""
    if layout == wanted:
        return weight
    tail = (fmt.bits, fmt.levels)
    if layout != STORAGE:
        weight = unprepack(weight, n, k, *tail, layout)
    return prepack(weight, k, *tail, wanted)


# --- products ---------------------------------------------------------------------------------------------------------


def _factors(weight_exp: Tensor, weight_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight_exp.contiguous(), None if weight_scale is None else weight_scale.contiguous()


def linear(x, weight, weight_exp, weight_scale, bias, bits, levels, layout, backend):
    k, n, form = x.shape[-1], weight_exp.shape[0], (bits, levels == "dense")
    weight = _ready(weight, n, k, Format(bits, levels), layout, LAYOUTS[x.dtype])
    factors = _factors(weight_exp, weight_scale)
    if math.prod(x.shape[:-1]) < DENSE_ROWS or k == 0:
        return _leaf.linear(x, weight, *factors, bias, *form)
    # Sums in float32: they are rounded once, by the epilogue.
    sums = torch.mm(x.reshape(-1, k), _leaf.decode(weight, n, k, *form, x.dtype).T, out_dtype=torch.float32)
    return _leaf.finish(sums, *factors, bias, *form, x.dtype).view(*x.shape[:-1], n)


def linear_dx(grad, weight, weight_exp, weight_scale, k, bits, levels, layout, backend):
    weight = _ready(weight, weight_exp.shape[0], k, Format(bits, levels), layout, LAYOUTS[grad.dtype])
    return _leaf.linear_dx(grad, weight, *_factors(weight_exp, weight_scale), k, bits, levels == "dense")


def linear_fp8(x, weight, weight_exp, weight_scale, bias, bits, levels, layout, backend):
    weight = _ready(weight, weight_exp.shape[0], x.shape[-1], Format(bits, levels), layout, fragments.E4M3)
    return _leaf.linear_fp8(x, weight, *_factors(weight_exp, weight_scale), bias, bits, levels == "dense")


# --- storage ----------------------------------------------------------------------------------------------------------


def pack(w, n1, bits, levels):
    return _leaf.pack(w.contiguous(), n1.contiguous(), bits, levels == "dense")


def unpack(weight, weight_exp, weight_scale, k, bits, levels, dtype):
    return _leaf.unpack(weight.contiguous(), *_factors(weight_exp, weight_scale), k, bits, levels == "dense", dtype)


def unpack_(out, weight, weight_exp, weight_scale, k, bits, levels):
    flat = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    _leaf.unpack_(flat, weight.contiguous(), *_factors(weight_exp, weight_scale), k, bits, levels == "dense")
    if flat is not out:
        out.copy_(flat)


def prepack(weight, k, bits, levels, layout):
    fmt = Format(bits, levels)
    if layout not in fragments.LAYOUTS:
        return layouts.prepack(weight, k, fmt, layout)
    table = fragments.encode_table(layout, fmt)
    return _leaf.prepack(weight.contiguous(), table, k, bits, levels == "dense", fragments.LAYOUTS.index(layout))


def unprepack(weight, n, k, bits, levels, layout):
    if layout not in fragments.LAYOUTS:
        return layouts.unprepack(weight, n, k, Format(bits, levels), layout)
    return _leaf.unprepack(weight.contiguous(), n, k, bits, levels == "dense", fragments.LAYOUTS.index(layout))


# --- training ---------------------------------------------------------------------------------------------------------


def exponents(w, bits, levels, granularity, exponent):
    return _leaf.exponents(w.contiguous(), bits, levels == "dense", granularity == "channel", exponent == "mse")


def partition_threshold(w, mask, keep, count, random, seed):
    return _leaf.partition_threshold(w.contiguous(), mask, keep, count, random, seed)


def exponents_and_threshold(w, mask, keep, count, random, seed, bits, levels, granularity, exponent):
    rule = (levels == "dense", granularity == "channel", exponent == "mse")
    return _leaf.exponents_and_threshold(w.contiguous(), mask, keep, count, random, seed, bits, *rule)


def quantize_with_mask_(w, mask, n1, threshold, keep, bits, levels, random, seed):
    # Flat indices are those of the shape, whatever the strides.
    flat = w.contiguous()
    _leaf.quantize_with_mask_(flat, mask, n1.contiguous(), threshold, keep, bits, levels == "dense", random, seed)
    if flat is not w:
        w.copy_(flat)


def freeze_portion_(ws, masks, n1s, keeps, counts, derive, bits, levels, granularity, exponent, random, seeds):
    flat = [w.contiguous() for w in ws]
    exps = [n1.contiguous() for n1 in n1s]
    none = masks[0].new_empty(0)
    rule = (bits, levels == "dense", granularity == "channel", exponent == "mse")
    keeps = [none if keep is None else keep for keep in keeps]
    _leaf.freeze_portion_(flat, masks, exps, keeps, counts, derive, *rule, random, seeds)
    for given, used in ((ws, flat), (n1s, exps)):
        for t, contiguous in zip(given, used, strict=True):
            if contiguous is not t:
                t.copy_(contiguous)


def masked_sgd_(params, grads, momentum_buffers, masks, *numbers):
    _step(_leaf.masked_sgd_, (params, grads, momentum_buffers), masks, numbers)


def masked_adamw_(params, grads, exp_avgs, exp_avg_sqs, masks, *numbers):
    _step(_leaf.masked_adamw_, (params, grads, exp_avgs, exp_avg_sqs), masks, numbers)


def _step(leaf: Callable, lists: tuple[list[Tensor], ...], masks: list[Tensor], numbers: tuple) -> None:
    """One call for all parameters of a dtype. Bits of a mask count in the order of the shape: others' strides cost a
    copy."""
    alike: dict[torch.dtype, list[int]] = {}
    for i, p in enumerate(lists[0]):
        alike.setdefault(p.dtype, []).append(i)
    for places in alike.values():
        given = [[tensors[i] for i in places] if tensors else [] for tensors in lists]
        used = [[t.contiguous() for t in tensors] for tensors in given]
        leaf(*used, [masks[i] for i in places], *numbers)
        # Gradients are only read.
        for before, after in zip((given[0], *given[2:]), (used[0], *used[2:]), strict=True):
            for t, contiguous in zip(before, after, strict=True):
                if contiguous is not t:
                    t.copy_(contiguous)


# What the library has; everything else is Triton's.
OPERATORS: dict[str, Callable] = {
    f.__name__: f
    for f in (
        *(linear, linear_dx, linear_fp8, pack, unpack, unpack_, prepack, unprepack),
        *(exponents, partition_threshold, exponents_and_threshold, quantize_with_mask_, freeze_portion_),
        *(masked_sgd_, masked_adamw_),
    )
}


# --- shapes for tracing -----------------------------------------------------------------------------------------------

_FAKES: dict[str, Callable] = {
    **{name: FAKES[name] for name in OPERATORS if name not in ("prepack", "unprepack")},
    "prepack": lambda weight, table, k, bits, dense, number: weight.new_empty(
        layouts.shape(fragments.LAYOUTS[number], weight.shape[0], k, Format(bits, "dense" if dense else "paper"))
    ),
    "unprepack": lambda weight, n, k, bits, dense, number: weight.new_empty((n, (k + 7) // 8 * bits)),
    "decode": lambda weight, n, k, bits, dense, dtype: weight.new_empty((n, k), dtype=dtype),
    "finish": lambda sums, exp, scale, bias, bits, dense, dtype: torch.empty_like(sums, dtype=dtype),
}
