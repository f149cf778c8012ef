"""The operators ``torch.ops.inq.*``: schemas and shape functions, and nothing else. Torch only.

Implementations are attached in ``backends``; they are opaque to tracing, so that which kernel runs is decided when the
sizes are known. Weights are in a *layout* (layouts.py): ``"storage"`` (files, ``state_dict``) or a backend's
own, made by ``prepack``. A format crosses as ``bits`` and ``levels``, one bit a weight masks as uint8 [ceil(numel/8)].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import layouts
from .format import Format
from .reference import conv_memory_format

_FORMAT = "int bits, str levels"
_PACKED = "Tensor weight, Tensor weight_exp, Tensor? weight_scale"
_TAIL = f"{_FORMAT}, str layout, str backend"
_CONV = "SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"

SCHEMAS = {
    "exponents": f"(Tensor w, {_FORMAT}, str granularity, str exponent) -> Tensor",
    "partition_threshold": "(Tensor w, Tensor mask, Tensor? keep, int count, bool random, int seed) -> Tensor",
    "exponents_and_threshold": "(Tensor w, Tensor mask, Tensor? keep, int count, bool random, int seed, "
    f"{_FORMAT}, str granularity, str exponent) -> (Tensor, Tensor)",
    "quantize_with_mask_": "(Tensor(a!) w, Tensor(b!) mask, Tensor n1, Tensor threshold, Tensor? keep, "
    f"{_FORMAT}, bool random, int seed) -> ()",
    "freeze_portion_": "(Tensor(a!)[] ws, Tensor(b!)[] masks, Tensor(c!)[] n1s, Tensor?[] keeps, int[] counts, "
    f"bool derive, {_FORMAT}, str granularity, str exponent, bool random, int[] seeds) -> ()",
    "pack": f"(Tensor w, Tensor n1, {_FORMAT}) -> Tensor",
    "unpack": f"({_PACKED}, SymInt k, {_FORMAT}, ScalarType dtype) -> Tensor",
    "unpack_": f"(Tensor(a!) out, {_PACKED}, SymInt k, {_FORMAT}) -> ()",
    "prepack": f"(Tensor weight, SymInt k, {_FORMAT}, str layout) -> Tensor",
    "unprepack": f"(Tensor weight, SymInt n, SymInt k, {_FORMAT}, str layout) -> Tensor",
    "linear": f"(Tensor x, {_PACKED}, Tensor? bias, {_TAIL}) -> Tensor",
    "linear_dx": f"(Tensor grad, {_PACKED}, SymInt k, {_TAIL}) -> Tensor",
    "linear_fp8": f"(Tensor x, {_PACKED}, Tensor? bias, {_TAIL}) -> Tensor",
    "conv2d": f"(Tensor x, {_PACKED}, Tensor? bias, {_CONV}, {_TAIL}) -> Tensor",
    "conv2d_dx": f"(Tensor grad, {_PACKED}, SymInt[4] input_size, {_CONV}, {_TAIL}) -> Tensor",
    "masked_sgd_": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor[] masks, float lr, "
    "float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, bool is_first_step) -> ()",
    "masked_adamw_": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor[] masks, float lr, float beta1, float beta2, float weight_decay, float eps, int step, bool maximize) -> ()",
}


def conv_output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """[H, W] of a convolution's output."""
    return [(size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)]


def _exponents(w, *_):
    return w.new_empty((w.shape[0], 1), dtype=torch.int8)


def _threshold(w, *_):
    return w.new_empty((2,), dtype=torch.int64)


def _linear(x, weight, weight_exp, *_):
    return x.new_empty((*x.shape[:-1], weight_exp.shape[0]))


def _conv2d(x, weight, weight_exp, weight_scale, bias, kernel_size, stride, padding, dilation, *_):
    size = conv_output_size(x.shape[-2:], kernel_size, stride, padding, dilation)
    return x.new_empty((x.shape[0], weight_exp.shape[0], *size)).to(memory_format=conv_memory_format(x))


def _conv2d_dx(grad, weight, weight_exp, weight_scale, input_size, *rest):
    return grad.new_empty(input_size)


def _prepack(weight, k, bits, levels, layout):
    return weight.new_empty(layouts.shape(layout, weight.shape[0], k, Format(bits, levels)))


def _unprepack(weight, n, k, bits, levels, layout):
    fmt = Format(bits, levels)
    layouts.shape(layout, n, k, fmt)  # raises where there is no such layout
    return weight.new_empty(layouts.shape(layouts.STORAGE, n, k, fmt))


# Backends' leaf operators with the same leading arguments share them.
FAKES: dict[str, Callable] = {
    "exponents": _exponents,
    "partition_threshold": _threshold,
    "exponents_and_threshold": lambda w, *_: (_exponents(w), _threshold(w)),
    "quantize_with_mask_": lambda *_: None,
    "freeze_portion_": lambda *_: None,
    "pack": lambda w, n1, bits, levels: w.new_empty(
        (w.shape[0], (w.numel() // w.shape[0] + 7) // 8 * bits), dtype=torch.uint8
    ),
    "unpack": lambda weight, exp, scale, k, bits, levels, dtype: weight.new_empty((exp.shape[0], k), dtype=dtype),
    "unpack_": lambda *_: None,
    "prepack": _prepack,
    "unprepack": _unprepack,
    "linear": _linear,
    "linear_dx": lambda grad, weight, exp, scale, k, *_: grad.new_empty((*grad.shape[:-1], k)),
    "linear_fp8": _linear,
    "conv2d": _conv2d,
    "conv2d_dx": _conv2d_dx,
    "masked_sgd_": lambda *_: None,
    "masked_adamw_": lambda *_: None,
}


def implement(name: str, function: Callable[..., Tensor | None]) -> None:
    """Attach ``function`` as ``torch.ops.inq.<name>`` on the CPU and on CUDA."""
    for key in ("CPU", "CUDA"):
        _lib.impl(name, function, key)


_lib = torch.library.Library("inq", "DEF")
for _name, _schema in SCHEMAS.items():
    _lib.define(_name + _schema)
    torch.library.register_fake(f"inq::{_name}", FAKES[_name], lib=_lib)
