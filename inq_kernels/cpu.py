"""The compiled CPU library: loading it, its leaf operators ``torch.ops.inq_cpu.*``, and ``torch.ops.inq``'s on them.

Each function here has the name and the arguments of an operator in ``library.SCHEMAS`` and runs on contiguous float32
or bfloat16 tensors on the CPU. Sources: csrc/.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from . import layouts, reference
from .format import Format
from .layouts import CPU16, STORAGE
from .library import FAKES

DTYPES = (torch.float32, torch.bfloat16)
ISA_ENVIRONMENT = "INQ_CPU_ISA"
_FOLDER = Path(__file__).resolve().parent
_leaf = torch.ops.inq_cpu


@functools.cache
def unavailable() -> str | None:
    """None if the library is loaded (now, or before), else why it cannot be.

    Raises:
        RuntimeError, ValueError: ``INQ_CPU_ISA`` names no instruction set, or one that this machine has not.
    """
    path = _FOLDER / "_cpu.so"
    if not path.exists():
        reason = _FOLDER / "_cpu_build.txt"
        text = reason.read_text() if reason.exists() else ""
        return f"there is no compiled library: {text or 'this folder was not installed (pip install -e .)'}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        # torch says which file; the loader's own words are in the cause.
        return f"the compiled library does not load: {error.__cause__ or error}"
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"inq_cpu::{name}", fake)
    _leaf.isa()  # reads INQ_CPU_ISA: better now than in the middle of a model
    return None


def summary() -> str:
    """One line for people: which instruction set is used, and why no better one."""
    isa, detected, missing = _leaf.isa(), _leaf.detected_isa(), _leaf.why_not_better()
    if isa != detected:
        return f"{isa}, by {ISA_ENVIRONMENT}={os.environ.get(ISA_ENVIRONMENT, '')} (the machine has {detected})"
    return f"{isa} ({missing})" if missing else isa


def plan(op: str, m: int, n: int, k: int, dtype: str, isa: str | None = None) -> str:
    """Which kernel would run a product of that size with that instruction set (None: the one in use), in words."""
    return _leaf.plan(op, m, n, k, dtype, isa or _leaf.isa(), torch.get_num_threads())


def _ready(weight: Tensor, k: int, bits: int, dense: bool, layout: str) -> Tensor:
    """``weight`` in the layout that the kernels read. A module has done this once; here it is for this call alone."""
    if layout == CPU16:
        return weight
    if layout != STORAGE:
        # A module that a GPU's process saved as it was; ``inq.prepack`` lays it out once and for all.
        weight = layouts.unprepack(weight, weight.shape[0], k, _format(bits, dense), layout)
    return _leaf.prepack(weight.contiguous(), k, bits, dense)


# --- products ---------------------------------------------------------------------------------------------------------


def linear(x, weight, weight_exp, weight_scale, bias, bits, levels, layout, backend):
    dense = levels == "dense"
    if layout != CPU16:
        weight = _ready(weight, x.shape[-1], bits, dense, layout)
    return _leaf.linear(x, weight, weight_exp, weight_scale, bias, bits, dense)


def linear_dx(grad, weight, weight_exp, weight_scale, k, bits, levels, layout, backend):
    dense = levels == "dense"
    weight = _ready(weight, k, bits, dense, layout)
    return _leaf.linear_dx(grad, weight, weight_exp, weight_scale, k, bits, dense)


def linear_fp8(x, weight, weight_exp, weight_scale, bias, bits, levels, layout, backend):
    """As the reference's, with the product of the e4m3 values by the CPU kernel."""

    def product(x8: Tensor) -> Tensor:
        return linear(x8, weight, torch.zeros_like(weight_exp), None, None, bits, levels, layout, backend)

    return reference.fp8_product(x, weight_exp, weight_scale, bias, product)


def conv2d(
    x, weight, weight_exp, weight_scale, bias, kernel_size, stride, padding, dilation, groups, bits, levels, layout,
    backend,
):  # fmt: skip
    dense = levels == "dense"
    k = x.shape[1] // groups * kernel_size[0] * kernel_size[1]
    weight = _ready(weight, k, bits, dense, layout)
    conv = (kernel_size, stride, padding, dilation, groups)
    return _leaf.conv2d(x, weight, weight_exp, weight_scale, bias, *conv, bits, dense)


def conv2d_dx(
    grad, weight, weight_exp, weight_scale, input_size, kernel_size, stride, padding, dilation, groups, bits, levels,
    layout, backend,
):  # fmt: skip
    """Decoded by the library, multiplied by torch: a kernel of ours would not be faster."""
    fmt = Format(bits, levels)
    n, k = weight_exp.shape[0], input_size[1] // groups * kernel_size[0] * kernel_size[1]
    if layout != STORAGE:
        weight = unprepack(weight, n, k, bits, levels, layout)
    # Values relative to 2^n1, as the reference's.
    w = _leaf.unpack(weight, torch.zeros_like(weight_exp), None, k, fmt.bits, levels == "dense", torch.float32)
    conv = (kernel_size, stride, padding, dilation, groups)
    return reference.conv2d_dx_of(grad, w, weight_exp, weight_scale, input_size, *conv)


# --- storage ----------------------------------------------------------------------------------------------------------


def pack(w, n1, bits, levels):
    return _leaf.pack(w.contiguous(), n1.contiguous(), bits, levels == "dense")


def unpack(weight, weight_exp, weight_scale, k, bits, levels, dtype):
    return _leaf.unpack(weight.contiguous(), weight_exp, weight_scale, k, bits, levels == "dense", dtype)


def unpack_(out, weight, weight_exp, weight_scale, k, bits, levels):
    flat = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    _leaf.unpack_(flat, weight.contiguous(), weight_exp, weight_scale, k, bits, levels == "dense")
    if flat is not out:
        out.copy_(flat)


def prepack(weight, k, bits, levels, layout):
    if layout == CPU16:
        return _leaf.prepack(weight.contiguous(), k, bits, levels == "dense")
    return layouts.prepack(weight, k, Format(bits, levels), layout)


def unprepack(weight, n, k, bits, levels, layout):
    if layout == CPU16:
        return _leaf.unprepack(weight.contiguous(), n, k, bits, levels == "dense")
    return layouts.unprepack(weight, n, k, Format(bits, levels), layout)


# --- training ---------------------------------------------------------------------------------------------------------


def exponents(w, bits, levels, granularity, exponent):
    return _leaf.exponents(w.contiguous(), bits, levels == "dense", granularity == "channel", exponent == "mse")


def partition_threshold(w, mask, keep, count, random, seed):
    return _leaf.partition_threshold(w.contiguous(), mask, keep, count, random, seed)


def quantize_with_mask_(w, mask, n1, threshold, keep, bits, levels, random, seed):
    # Flat indices are those of the shape, whatever the strides.
    flat = w.contiguous()
    _leaf.quantize_with_mask_(flat, mask, n1, threshold, keep, bits, levels == "dense", random, seed)
    if flat is not w:
        w.copy_(flat)


def exponents_and_threshold(w, mask, keep, count, random, seed, bits, levels, granularity, exponent):
    rule = (levels == "dense", granularity == "channel", exponent == "mse")
    return _leaf.exponents_and_threshold(w.contiguous(), mask, keep, count, random, seed, bits, *rule)


def freeze_portion_(ws, masks, n1s, keeps, counts, derive, bits, levels, granularity, exponent, random, seeds):
    """One weight after the other: each call takes all threads, and there is nothing to wait for in between."""
    for w, mask, n1, keep, count, seed in zip(ws, masks, n1s, keeps, counts, seeds, strict=True):
        ranks = (w, mask, keep, count, random, seed)
        if derive:
            derived, threshold = exponents_and_threshold(*ranks, bits, levels, granularity, exponent)
            n1.copy_(derived)
        else:
            threshold = partition_threshold(*ranks)
        quantize_with_mask_(w, mask, n1, threshold, keep, bits, levels, random, seed)


def masked_sgd_(params, grads, momentum_buffers, masks, *numbers):
    _step(_leaf.masked_sgd_, (params, grads, momentum_buffers), masks, numbers)


def masked_adamw_(params, grads, exp_avgs, exp_avg_sqs, masks, *numbers):
    _step(_leaf.masked_adamw_, (params, grads, exp_avgs, exp_avg_sqs), masks, numbers)


def _step(leaf, lists, masks, numbers) -> None:
    """One call for all parameters. Bits of a mask count in the order of the shape: others' strides cost a copy."""
    # A model has hundreds of tensors, at every step: what is right is asked as little as possible.
    if all(t.is_contiguous() for tensors in lists for t in tensors):
        leaf(*lists, masks, *numbers)
        return
    flat = [[t.contiguous() for t in tensors] for tensors in lists]
    leaf(*flat, masks, *numbers)
    for given, used in zip(lists, flat, strict=True):
        for t, contiguous in zip(given, used, strict=True):
            # Gradients are only read.
            if contiguous is not t and given is not lists[1]:
                t.copy_(contiguous)


# --- shapes for tracing -----------------------------------------------------------------------------------------------


def _fake_prepack(weight, k, bits, dense):
    return weight.new_empty(layouts.shape(CPU16, weight.shape[0], k, _format(bits, dense)))


def _fake_unprepack(weight, n, k, bits, dense):
    return weight.new_empty((n, _format(bits, dense).row_bytes(k)))


def _format(bits: int, dense: bool) -> Format:
    return Format(bits, "dense" if dense else "paper")


_FAKES = {
    **{
        name: FAKES[name]
        for name in (
            *("linear", "linear_dx", "conv2d", "pack", "unpack", "unpack_", "exponents", "partition_threshold"),
            *("exponents_and_threshold", "quantize_with_mask_", "masked_sgd_", "masked_adamw_"),
        )
    },
    "prepack": _fake_prepack,
    "unprepack": _fake_unprepack,
}
