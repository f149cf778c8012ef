"""``conv2d`` and its gradient ``conv2d_dx``: the convolutions of ResNet-50, channels-last; on a GPU beside cuDNN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import shapes
from .case import DTYPES, Case, Context, Op, Request, Work, as_good_as_dense, attempt, nbytes, normal, runner, some
from .weights import RandomWeights, bits_in_use, rotated


@dataclass(frozen=True)
class Layer:
    """A convolution: channels in and out, kernel, stride, input height = width; "same"-like padding."""

    c: int
    n: int
    kernel: int
    stride: int
    size: int

    @property
    def conv(self) -> tuple:
        """kernel_size, stride, padding, dilation, groups."""
        return [self.kernel] * 2, [self.stride] * 2, [self.kernel // 2] * 2, [1, 1], 1

    @property
    def out(self) -> int:
        """Output height = width."""
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    def __str__(self) -> str:
        return f"{self.c}x{self.n} {self.kernel}x{self.kernel}/{self.stride} @{self.size}"


def _layers(request: Request, op: str) -> Iterator[tuple[Layer, int, int, str]]:
    if request.isa != "native" or request.shapes:  # a (K, N) names no convolution
        return
    few, on_gpu = request.quick or op == "conv2d_dx", request.device == "cuda"
    layers = shapes.RESNET50_QUICK if few else shapes.RESNET50_GPU if on_gpu else shapes.RESNET50
    batches = shapes.BATCHES_GPU_DX if on_gpu and op == "conv2d_dx" else shapes.BATCHES
    for layer in layers:
        for bits in request.bits or (4,):
            for dtype in request.dtypes or ("bfloat16",):
                for batch in request.ms or (shapes.BATCHES_QUICK if request.quick else batches):
                    yield Layer(*layer), bits, dtype, batch


def _cases(op: str):
    def cases(request: Request) -> Iterator[Case]:
        for layer, bits, dtype, batch in _layers(request, op):
            k = layer.c * layer.kernel**2
            params = {"shape": str(layer), "k": k, "n": layer.n, "m": batch, "bits": bits, "dtype": dtype}

            def build(context: Context, layer=layer, bits=bits, dtype=dtype, batch=batch) -> Work:
                return (_conv2d if op == "conv2d" else _conv2d_dx)(context, layer, bits, dtype, batch)

            yield Case(op, params, build, layer)

    return cases


def _last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _dense(w: RandomWeights, layer: Layer, dtype: torch.dtype, rows: Tensor | slice = slice(None)) -> Tensor:
    return _last(w.dense(dtype, rows).view(-1, layer.c, layer.kernel, layer.kernel))


def _library(context: Context, function: Callable) -> Callable:
    """``function`` with cuDNN's choice among its algorithms made by time, which is what a user after speed asks for."""
    if context.device != "cuda":
        return function

    def call(*args: object) -> object:
        before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
        try:
            return function(*args)
        finally:
            torch.backends.cudnn.benchmark = before

    return call


def _conv2d(context: Context, layer: Layer, bits: int, dtype: str, batch: int) -> Work:
    w, packed, weights = rotated(context, layer.n, layer.c * layer.kernel**2, bits)
    x = _last(normal((batch, layer.c, layer.size, layer.size), DTYPES[dtype], device=context.device))
    y_count = batch * layer.n * layer.out**2
    tail = (*layer.conv, bits, packed.format.levels, packed.layout, context.backend)
    moved = nbytes(x, packed.weight, packed.weight_exp) + y_count * x.element_size()
    candidate = runner(torch.ops.inq.conv2d, [(x, *each, None, *tail) for each in weights], moved)
    stride_padding = (layer.stride, layer.kernel // 2)

    def check() -> str | None:
        images, channels = some(batch, 4), some(layer.n, 32)
        # On the CPU, where float32 is no TF32.
        y, few = candidate.run()[images][:, channels].cpu(), x[images].cpu()
        exact = F.conv2d(few.double(), _dense(w, layer, torch.float64, channels).cpu(), None, *stride_padding)
        dense = F.conv2d(few, _dense(w, layer, x.dtype, channels).cpu(), None, *stride_padding)
        return as_good_as_dense(y, exact, dense, torch.exp2(w.n1[channels].cpu().double()).view(1, -1, 1, 1))

    def dense(name: str):
        full = context.copies(("dense", name), lambda: _dense(w, layer, DTYPES[name]))
        mine = _last(x.to(DTYPES[name]))
        moved = nbytes(mine, full[0]) + y_count * mine.element_size()
        call = _library(context, F.conv2d)
        return runner(call, [(mine, each, None, *stride_padding) for each in full], moved)

    names, kind = (dtype, *(name for name in ("bfloat16", "float32") if name != dtype)), "dense"
    if context.device == "cuda":
        names, kind = (dtype,), "cuDNN"
    flops = 2 * y_count * w.k
    facts = {"bits_per_weight": bits_in_use(packed), "layout": packed.layout}
    return Work(candidate, {f"{kind} {n}": attempt(lambda n=n: dense(n)) for n in names}, check, flops, dtype, facts)


def _conv2d_dx(context: Context, layer: Layer, bits: int, dtype: str, batch: int) -> Work:
    w, packed, weights = rotated(context, layer.n, layer.c * layer.kernel**2, bits)
    grad = _last(normal((batch, layer.n, layer.out, layer.out), DTYPES[dtype], device=context.device))
    size = [batch, layer.c, layer.size, layer.size]
    tail = (size, *layer.conv, bits, packed.format.levels, packed.layout, context.backend)
    x_count = batch * layer.c * layer.size**2
    moved = nbytes(grad, packed.weight, packed.weight_exp) + x_count * grad.element_size()
    candidate = runner(torch.ops.inq.conv2d_dx, [(grad, *each, *tail) for each in weights], moved)
    kernel, stride, padding, dilation, groups = layer.conv

    def gradient(g: Tensor, full: Tensor) -> Tensor:
        x = g.new_empty(1).expand(g.shape[0], *size[1:])  # its values are not read, its strides are none
        rest = (None, stride, padding, dilation, False, [0, 0], groups, [True, False, False])
        return torch.ops.aten.convolution_backward(g, x, full, *rest)[0]

    def check() -> str | None:
        images = some(batch, 4)
        few, types = grad[images].cpu(), (torch.float64, grad.dtype)
        exact, dense = (gradient(few.to(d), _dense(w, layer, d).cpu()) for d in types)
        return as_good_as_dense(candidate.run()[images].cpu(), exact, dense)

    def dense():
        full = context.copies(("dense", dtype), lambda: _dense(w, layer, DTYPES[dtype]))
        moved = nbytes(grad, full[0]) + x_count * grad.element_size()
        return runner(_library(context, gradient), [(grad, each) for each in full], moved)

    flops = 2 * grad.numel() * w.k
    kind = "cuDNN" if context.device == "cuda" else "dense"
    return Work(candidate, {f"{kind} {dtype}": attempt(dense)}, check, flops, dtype)


CONV2D = Op("conv2d", ("conv2d",), _cases("conv2d"))
CONV2D_DX = Op("conv2d_dx", ("conv2d_dx",), _cases("conv2d_dx"))
