"""The public functions on tensors: validation with errors that name the tensor, and autograd, over ``torch.ops.inq``.

Shapes: N output rows (dimension 0 of a weight), K = the product of its other dimensions. Dtypes: weights and
activations are float64, float32, bfloat16 or float16.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from . import backends as _backends  # loading it is what implements the operators
from . import reference
from .format import Format, frozen_count
from .layouts import CPU16, STORAGE
from .layouts import shape as layout_shape

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PARTITIONS = ("magnitude", "random")

_op = torch.ops.inq
_cpu_op = torch.ops.inq_cpu
_in_transform = torch._C._functorch.is_functorch_wrapped_tensor


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """Quantized weights as codes: value = ±2^(exponent of the code, relative to n1) · 2^weight_exp · weight_scale.

    Attributes:
        weight: uint8 [N, ceil(K/8)·bits], one little-endian bit stream a row, for ``layout`` "storage"; for others see
            layouts.py.
        weight_exp: int8 [N, 1], n1 of each row.
        weight_scale: float32 [N, 1] or None.
        format: how codes are read.
        shape: the logical shape of the weight, dimension 0 = N.
        layout: "storage", or the backend's layout that ``torch.ops.inq.prepack`` made.

    Raises:
        TypeError, ValueError: dtypes or shapes that do not belong together.
    """

    weight: Tensor
    weight_exp: Tensor
    weight_scale: Tensor | None
    format: Format
    shape: tuple[int, ...]
    layout: str = STORAGE

    def __post_init__(self) -> None:
        check_format("PackedWeight: format", self.format)
        if not self.shape:
            raise ValueError("PackedWeight: shape: expected rank ≥ 1, got ()")
        n, k = self.shape[0], self.k
        _expect("weight", self.weight, torch.uint8, layout_shape(self.layout, n, k, self.format))
        _expect("weight_exp", self.weight_exp, torch.int8, (n, 1))
        if self.weight_scale is not None:
            _expect("weight_scale", self.weight_scale, torch.float32, (n, 1))
        # A part on the meta device would make an operator return memory that nobody wrote.
        device = self.weight.device
        for name in ("weight_exp", "weight_scale"):
            part = getattr(self, name)
            if part is not None and part.device != device:
                raise ValueError(f"{name}: expected device {device} of the weight, got {part.device}")

    @property
    def k(self) -> int:
        """K, the number of weights a row."""
        return math.prod(self.shape[1:])


def _expect(name: str, t: Tensor, dtype: torch.dtype, shape: tuple[int, ...] | None) -> None:
    if t.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {t.dtype}")
    if shape is not None and tuple(t.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(t.shape)}")


def check_format(name: str, fmt: Format) -> None:
    """A clear error unless ``fmt`` is a Format."""
    if not isinstance(fmt, Format):
        raise TypeError(f"{name}: expected an inq.Format, got {fmt!r}")


def _check_packed(name: str, packed: PackedWeight) -> None:
    if not isinstance(packed, PackedWeight):
        raise TypeError(f"{name}: expected an inq.PackedWeight, got {type(packed).__name__}")


def check_weight(name: str, w: Tensor) -> None:
    """A clear error unless ``w`` can be quantized: float, rank ≥ 1, not empty, on a real device, all values finite."""
    check_kind(name, w)
    bad = w.numel() - int(torch.isfinite(w.detach()).sum())
    if bad:
        raise not_finite(name, int(torch.isnan(w.detach()).sum()), bad, w.numel())


def check_kind(name: str, w: Tensor) -> None:
    """``check_weight`` but for the values: the device is asked nothing."""
    if not isinstance(w, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(w).__name__}")
    if w.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a weight of dtype float64, float32, bfloat16 or float16, got {w.dtype}")
    if w.dim() == 0 or w.numel() == 0:
        raise ValueError(f"{name}: expected rank ≥ 1 and at least one element, got shape {list(w.shape)}")
    if w.device.type == "meta":
        raise ValueError(f"{name}: expected a weight with values, got one on the meta device")


def not_finite(name: str, nan: int, bad: int, numel: int) -> ValueError:
    """The error for a weight with so many NaN among ``bad`` values that are not finite."""
    return ValueError(f"{name}: expected finite values, got {nan} NaN and {bad - nan} Inf of {numel}")


def check_n1(name: str, n1: Tensor, w: Tensor) -> None:
    """A clear error unless ``n1`` is int8 [N, 1] on the weight's device, within ``w``'s dtype's exponents."""
    if not isinstance(n1, Tensor):
        raise TypeError(f"{name}: expected an int8 tensor, got {type(n1).__name__}")
    _expect(name, n1, torch.int8, (w.shape[0], 1))
    if n1.device != w.device:
        raise ValueError(f"{name}: expected device {w.device} of the weight, got {n1.device}")
    lo, hi = reference.exponent_limits(w.dtype)
    if int(n1.min()) < lo or int(n1.max()) > hi:
        raise ValueError(
            f"{name}: expected exponents in [{lo}, {hi}] for {w.dtype}, got [{int(n1.min())}, {int(n1.max())}]"
        )


def _check_mask(name: str, mask: Tensor, w: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.shape != w.shape or mask.device != w.device:
        raise ValueError(
            f"{name}: expected shape {list(w.shape)} on {w.device}, got {list(mask.shape)} on {mask.device}"
        )


def exponents(w: Tensor, fmt: Format) -> Tensor:
    """n1, the largest power of two of each row (equation 2 of the paper, or the least squared error: ``fmt.exponent``).

    Args:
        w: float weight of any rank ≥ 1, finite.
        fmt: the format; ``granularity`` "tensor" makes all rows equal. A row of zeros gets 0.

    Returns:
        int8 [N, 1], within [−126, 127] ([−24, 15] for float16).

    Raises:
        TypeError, ValueError: ``w`` is not such a weight (NaN and Inf are counted).
    """
    check_weight("inq.exponents: w", w)
    check_format("inq.exponents: fmt", fmt)
    return _op.exponents(w.detach(), fmt.bits, fmt.levels, fmt.granularity, fmt.exponent)


def quantize(w: Tensor, fmt: Format, n1: Tensor | None = None) -> Tensor:
    """Fake quantization by equation (4) of the paper: every value becomes 0 or ±2^k, n2 ≤ k ≤ n1; ties go up.

    |w| ≥ 1.5·2^n1 saturates to ±2^n1, and what is under 2^(n2−1) becomes 0.

    Args:
        w: float64, float32, bfloat16 or float16 weight [N, …] of any rank ≥ 1, finite.
        fmt: the format.
        n1: int8 [N, 1], the largest exponent of each row; None derives it by ``fmt.exponent``.

    Returns:
        A new tensor like ``w`` (shape, dtype, device), without gradient.

    Raises:
        TypeError, ValueError: ``w`` or ``n1`` is not as in ``exponents``.
    """
    check_weight("inq.quantize: w", w)
    check_format("inq.quantize: fmt", fmt)
    if n1 is None:
        n1 = exponents(w, fmt)
    check_n1("inq.quantize: n1", n1, w)
    return reference.quantize(w.detach(), n1, fmt)


def quantize_with_mask(
    w: Tensor,
    frozen: Tensor | None,
    portion: float,
    fmt: Format,
    *,
    n1: Tensor | None = None,
    partition: str = "magnitude",
    prune_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of INQ on one weight: freeze until ``portion`` of it is frozen, and quantize what was frozen just now.

    Equations (4) and (5) of the paper. Exactly ``floor(portion·numel + 0.5)`` weights are frozen afterwards; ties go to
    the lower flat index.

    Args:
        w: float weight, any rank ≥ 1, finite.
        frozen: bool mask like ``w`` of what is frozen already (None: nothing). It is never re-quantized or re-opened.
        portion: accumulated fraction σ in [0, 1].
        fmt: the format.
        n1: int8 [N, 1]; None derives it from all of ``w``. Pass the first portion's on later calls.
        partition: ``"magnitude"``, largest |w| first, or ``"random"``.
        prune_mask: bool mask like ``w``, True = kept (as in torch.nn.utils.prune). Pruned weights become 0, are
            never frozen and do not count towards the portion.
        generator: where ``"random"`` draws its seed from; None is torch's default generator.

    Returns:
        ``(w_hat, frozen, n1)``: new tensors; unfrozen weights keep their values.

    Raises:
        TypeError, ValueError: arguments that are not as above, or more is frozen already than ``portion`` asks for.
    """
    check_weight("inq.quantize_with_mask: w", w)
    check_format("inq.quantize_with_mask: fmt", fmt)
    if partition not in PARTITIONS:
        raise ValueError(f"inq.quantize_with_mask: partition: expected one of {PARTITIONS}, got {partition!r}")
    check_portion("inq.quantize_with_mask: portion", portion)
    if frozen is None:
        frozen = torch.zeros_like(w, dtype=torch.bool)
    _check_mask("inq.quantize_with_mask: frozen", frozen, w)
    w_hat = w.detach().clone()
    keep = None
    if prune_mask is not None:
        _check_mask("inq.quantize_with_mask: prune_mask", prune_mask, w)
        if bool((frozen & ~prune_mask).any()):
            raise ValueError("inq.quantize_with_mask: frozen: expected no pruned weight among the frozen ones")
        keep = reference.pack_bits(prune_mask)
        w_hat.masked_fill_(~prune_mask, 0.0)
    if n1 is not None:
        check_n1("inq.quantize_with_mask: n1", n1, w)
    total = w.numel() if prune_mask is None else int(prune_mask.sum())
    count, held = frozen_count(portion, total), int(frozen.sum())
    if count < held:
        raise ValueError(f"inq.quantize_with_mask: portion: {portion} means {count} weights, {held} are frozen already")
    random = partition == "random"
    seed = 0
    if random:
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(1 << 62, (), generator=generator, device=device))
    mask = reference.pack_bits(frozen)
    derive = n1 is None
    n1 = w.new_empty((w.shape[0], 1), dtype=torch.int8) if derive else n1.clone()
    rule = (fmt.bits, fmt.levels, fmt.granularity, fmt.exponent)
    _op.freeze_portion_([w_hat], [mask], [n1], [keep], [count - held], derive, *rule, random, [seed])
    return w_hat, reference.unpack_bits(mask, w.shape), n1


def check_portion(name: str, portion: float) -> None:
    """A clear error unless ``portion`` is a number in [0, 1]."""
    if isinstance(portion, bool) or not isinstance(portion, (int, float)):
        raise TypeError(f"{name}: expected a number in [0, 1], got {portion!r}")
    if not 0 <= portion <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {portion!r}")


def pack(w_hat: Tensor, fmt: Format, n1: Tensor | None = None) -> PackedWeight:
    """Quantized weights, the set P of equation (1), as codes. Lossless, or an error: values are never rounded here.

    Args:
        w_hat: float weight [N, …] whose values are 0 or ±2^k, n2 ≤ k ≤ n1 of their row, as ``quantize`` returns them.
        fmt: the format.
        n1: int8 [N, 1]; None derives it from the largest value.

    Returns:
        ``PackedWeight`` with ``weight`` uint8 [N, ceil(K/8)·bits] and ``weight_exp`` int8 [N, 1], K = numel/N.

    Raises:
        ValueError: some value is not representable (they are counted). TypeError, ValueError: as in ``exponents``.
    """
    check_weight("inq.pack: w_hat", w_hat)
    check_format("inq.pack: fmt", fmt)
    if n1 is None:
        # If any n1 represents the values, that of the largest does.
        n1 = exponents(w_hat, dataclasses.replace(fmt, exponent="max"))
    check_n1("inq.pack: n1", n1, w_hat)
    w_hat = w_hat.detach()
    bad = reference.not_representable(w_hat, n1, fmt)
    if bad:
        raise ValueError(
            f"inq.pack: w_hat: expected 0 or ±2^k with n2 ≤ k ≤ n1 ({fmt}); "
            f"{bad} of {w_hat.numel()} values are something else: quantize first"
        )
    codes = _op.pack(w_hat, n1, fmt.bits, fmt.levels)
    return PackedWeight(codes, n1.clone(), None, fmt, tuple(w_hat.shape))


def prepack(packed: PackedWeight, layout: str | None = None) -> PackedWeight:
    """The same weight in another layout.

    Args:
        packed: in any layout.
        layout: "storage", "cpu16", "slices_fp16", "slices_bf16", "slices_e4m3", "fragments_fp16", "fragments_bf16",
            "fragments_e4m3" (see layouts.py, slices.py and fragments.py), or None for what products on the weight's
            device with float32 activations are fastest from.

    Returns:
        ``packed`` itself if it is in that layout, else one with a new ``weight``; exponents and scale are shared.

    Raises:
        ValueError: there is no such layout, or it does not hold this format.
    """
    _check_packed("inq_kernels.ops.prepack: packed", packed)
    if layout is None:
        layout = _backends.preferred_layout(packed.weight.device.type, torch.float32, packed.format)
    if layout == packed.layout:
        return packed
    tail = (packed.k, packed.format.bits, packed.format.levels)
    weight = packed.weight
    if packed.layout != STORAGE:
        weight = _op.unprepack(weight, packed.shape[0], *tail, packed.layout)
    if layout != STORAGE:
        weight = _op.prepack(weight, *tail, layout)
    return dataclasses.replace(packed, weight=weight, layout=layout)


def unpack(packed: PackedWeight, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
    """The weights again: ±2^k of each code, times the row scale where there is one.

    Args:
        packed: what ``pack`` returned.
        dtype: of the result: float64, float32, bfloat16 or float16. None: that of ``out``, or float32.
        out: of ``packed.shape``, on the same device, written and returned instead of a new tensor. New memory costs
            more time than decoding into it.

    Returns:
        A tensor of ``packed.shape`` and ``dtype``; zeros are +0.

    Raises:
        TypeError: ``dtype`` is not one of the four float dtypes, or not that of ``out``. ValueError: it is float16 and
            too narrow, or ``out`` has another shape or device, or shares memory with itself or with ``packed``. Then
            nothing is written.
    """
    _check_packed("inq.unpack: packed", packed)
    if out is not None:
        _check_out(packed, dtype, out)
    dtype = dtype or (torch.float32 if out is None else out.dtype)
    if dtype not in FLOATS:
        raise TypeError(f"inq.unpack: dtype: expected float64, float32, bfloat16 or float16, got {dtype}")
    fmt, k = packed.format, packed.k
    weight = prepack(packed, STORAGE).weight
    if out is not None and dtype != torch.float16:
        _op.unpack_(out, weight, packed.weight_exp, packed.weight_scale, k, fmt.bits, fmt.levels)
        return out
    flat = _op.unpack(weight, packed.weight_exp, packed.weight_scale, k, fmt.bits, fmt.levels, dtype)
    # float16 alone is too narrow for some levels; a row scale rounds in any dtype, but must not overflow.
    if dtype == torch.float16:
        wide = _op.unpack(weight, packed.weight_exp, packed.weight_scale, k, fmt.bits, fmt.levels, torch.float32)
        lost = flat.isinf() if packed.weight_scale is not None else flat.float() != wide
        if bad := int(lost.sum()):
            raise ValueError(
                f"inq.unpack: dtype: expected a dtype that holds all values, got {dtype}, "
                f"which cannot hold {bad} of {flat.numel()} (exponents {int(packed.weight_exp.min())} to "
                f"{int(packed.weight_exp.max())})"
            )
    return flat.reshape(packed.shape) if out is None else out.copy_(flat.reshape(packed.shape))


def _check_out(packed: PackedWeight, dtype: torch.dtype | None, out: Tensor) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"inq.unpack: out: expected a torch.Tensor, got {type(out).__name__}")
    if dtype is not None and dtype != out.dtype:
        raise TypeError(f"inq.unpack: out: expected dtype {dtype}, got {out.dtype}")
    if tuple(out.shape) != tuple(packed.shape):
        raise ValueError(f"inq.unpack: out: expected shape {list(packed.shape)}, got {list(out.shape)}")
    if out.device != packed.weight.device:
        raise ValueError(f"inq.unpack: out: expected device {packed.weight.device}, got {out.device}")
    if _backends.overlaps_itself(out):
        raise ValueError("inq.unpack: out: expected memory of its own for every element, got overlapping ones")
    for name in ("weight", "weight_exp", "weight_scale"):
        part = getattr(packed, name)
        if part is not None and part.untyped_storage().data_ptr() == out.untyped_storage().data_ptr() and out.numel():
            raise ValueError(f"inq.unpack: out: expected memory apart from the packed weight's, got that of {name}")
    if torch.is_grad_enabled() and out.requires_grad:
        raise ValueError("inq.unpack: out: expected a tensor that needs no gradient, or torch.no_grad()")


# --- products ---------------------------------------------------------------------------------------------------------
#
# An autograd.Function is applied only where a gradient is needed: it costs several µs a call, the operator alone does
# not. Each backward is linear in the gradient, so it is a Function of its own and double backward works.


def _run(op: str, *args):
    """``torch.ops.inq.<op>``, whose last argument is the backend. The CPU kernels are operators themselves: outside of
    tracing the detour through the dispatcher and back into Python would be 4 µs for nothing."""
    if args[-1] == "cpu" and not torch.compiler.is_compiling():
        return getattr(_backends.cpu, op)(*args)
    return getattr(_op, op)(*args)


def _chosen(op: str, x: Tensor, backend: str | None) -> str:
    """The CPU's kernels where they were chosen, which is not asked again for the gradients; else what was asked for, as
    others need not have all operators. While tracing, the graph leaves it to the machine that runs it."""
    backend = backend or ""
    if torch.compiler.is_compiling():
        return backend
    return "cpu" if _backends.choose(op, x, x.dtype, backend) == "cpu" else backend


def _apply(function: type[Function], *args):
    """``function.apply``, past the part of it that only torch.func's transforms and dead wrappers of theirs need, which
    are refused: that part walks all arguments in Python, 3 µs a call."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(Function, function).apply(*args)


class _Linear(Function):
    @staticmethod
    def forward(ctx, x, bias, weight, weight_exp, weight_scale, tail):
        ctx.packed, ctx.tail, ctx.k = (weight, weight_exp, weight_scale), tail, x.size(-1)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _run("linear", x, weight, weight_exp, weight_scale, bias, *tail)

    @staticmethod
    def backward(ctx, grad):
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _LinearDx.apply(grad, ctx.k, *ctx.packed, ctx.tail)
        if ctx.needs_input_grad[1]:
            dbias = _sum_to_bias(grad, [*range(grad.dim() - 1)], ctx.bias_dtype)
        return dx, dbias, None, None, None, None


class _LinearDx(Function):
    @staticmethod
    def forward(ctx, grad, k, weight, weight_exp, weight_scale, tail):
        ctx.packed, ctx.tail = (weight, weight_exp, weight_scale), tail
        return _run("linear_dx", grad, weight, weight_exp, weight_scale, k, *tail)

    @staticmethod
    def backward(ctx, v):
        return _Linear.apply(v, None, *ctx.packed, ctx.tail), None, None, None, None, None


class _Conv2d(Function):
    @staticmethod
    def forward(ctx, x, bias, weight, weight_exp, weight_scale, conv, tail):
        ctx.packed, ctx.conv, ctx.tail, ctx.size = (weight, weight_exp, weight_scale), conv, tail, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _run("conv2d", x, weight, weight_exp, weight_scale, bias, *conv, *tail)

    @staticmethod
    def backward(ctx, grad):
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _Conv2dDx.apply(grad, ctx.size, *ctx.packed, ctx.conv, ctx.tail)
        if ctx.needs_input_grad[1]:
            dbias = _sum_to_bias(grad, [0, 2, 3], ctx.bias_dtype)
        return dx, dbias, None, None, None, None, None


class _Conv2dDx(Function):
    @staticmethod
    def forward(ctx, grad, size, weight, weight_exp, weight_scale, conv, tail):
        ctx.packed, ctx.conv, ctx.tail = (weight, weight_exp, weight_scale), conv, tail
        return _run("conv2d_dx", grad, weight, weight_exp, weight_scale, size, *conv, *tail)

    @staticmethod
    def backward(ctx, v):
        return _Conv2d.apply(v, None, *ctx.packed, ctx.conv, ctx.tail), None, None, None, None, None, None


def _sum_to_bias(grad: Tensor, dims: list[int], dtype: torch.dtype) -> Tensor:
    if not dims:
        return grad.to(dtype)
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return grad.sum(dims, dtype=wide).to(dtype)


def _check_product(op: str, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    """Validate, and return x in its autocast dtype where autocast is on. At each call: what is right is asked as little
    as possible."""
    if not (isinstance(packed, PackedWeight) and isinstance(x, Tensor) and (bias is None or isinstance(bias, Tensor))):
        _check_packed(f"inq.{op}: packed", packed)
        name, value = ("bias", bias) if isinstance(x, Tensor) else ("x", x)
        raise TypeError(f"inq.{op}: {name}: expected a torch.Tensor, got {type(value).__name__}")
    compiling = torch.compiler.is_compiling()
    if not compiling and (_in_transform(x) or (bias is not None and _in_transform(bias))):
        # The operators are opaque to torch.func: jvp, for one, would see a constant and answer with zeros.
        raise RuntimeError(
            f"inq.{op}: {'x' if _in_transform(x) else 'bias'}: expected a plain tensor, got one inside a torch.func "
            "transform (grad, jvp, vmap, …), which packed products do not support: use torch.autograd"
        )
    if x.dtype not in FLOATS:
        raise TypeError(
            f"inq.{op}: x: expected activations of dtype float64, float32, bfloat16 or float16, got {x.dtype}. "
            "(Packed weights are uint8: a model that casts its input to `layer.weight.dtype` must not.)"
        )
    if x.device != packed.weight.device:
        raise ValueError(f"inq.{op}: x: expected device {packed.weight.device} of the weight, got {x.device}")
    if bias is not None:
        n = packed.shape[0]
        if bias.dtype not in FLOATS:
            raise TypeError(f"inq.{op}: bias: expected a float dtype, got {bias.dtype}")
        if tuple(bias.shape) != (n,) or bias.device != x.device:
            raise ValueError(
                f"inq.{op}: bias: expected shape [{n}] on {x.device}, got {list(bias.shape)} on {bias.device}"
            )
    if packed.weight_scale is not None and packed.weight_scale.requires_grad:
        raise ValueError(f"inq.{op}: weight_scale: expected requires_grad=False: packed weights take no gradient")
    if compiling or torch._C._is_any_autocast_enabled():
        device = x.device.type
        if x.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
    return x


def _fits_as_it_is(x: Tensor, packed: PackedWeight, bias: Tensor | None, backend: str | None) -> bool:
    """Whether ``linear`` is a call of the CPU kernel and nothing else: nothing to refuse, to convert or to lay out.

    Between two products of a model the caches hold nothing of this: each thing asked costs a µs or more, and all that
    ``_check_product`` asks as much as 5 % of a product of one row.
    """
    if not (isinstance(x, Tensor) and isinstance(packed, PackedWeight) and packed.layout == CPU16):
        return False
    weight, scale, shape = packed.weight, packed.weight_scale, packed.shape
    if bias is not None and not (
        isinstance(bias, Tensor) and bias.shape == shape[:1] and bias.is_cpu and bias.dtype in FLOATS
        and not _in_transform(bias)
    ):  # fmt: skip
        return False
    return (
        len(shape) == 2 and x.shape[-1:] == shape[1:] and x.is_cpu and weight.is_cpu
        and x.dtype in _backends.cpu.DTYPES
        and (scale is None or not scale.requires_grad)
        and not (_in_transform(x) or torch._C._is_any_autocast_enabled())
        and _backends.choose("linear", x, x.dtype, backend or "") == "cpu"
    )  # fmt: skip


def _needs_grad(x: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """y = (x · Wᵀ) · row scale + bias, W of equation (4); accumulated in float32 (float64 for float64), rounded once to
    x's dtype. Products are of x and W / 2^n1; the sum is multiplied by 2^n1 and then by the row scale, in float32, so a
    sum or a product past 2^128 overflows even where a later factor would bring it back. For bfloat16 x the processor's
    own bfloat16 products (AVX-512 BF16, AMX) take subnormal x as 0, as they do in torch's dense product. Tensor cores
    multiply bfloat16 x by paper levels as decoded, 2^4 times as large (5 bits: 2^8): there sums of x · W / 2^n1 past
    2^124 (2^120) overflow, which float32 and float16 x do not meet. The CUDA library's dense levels in bfloat16 are 2^6
    (5 bits: 2^14) times as large.

    The same call gives the same bits. A row's bits do not depend on the other rows on a CPU; with the CUDA library not
    among calls of at most 64 rows, nor, but on Hopper, among calls of 65 to 2047. There, and from 2048 rows on, how the
    sum over K is cut follows from the number of rows too, since a fixed cut would cost more than 5 % of the time.

    Args:
        x: float [..., K], any strides, batch 0 included; under autocast its autocast dtype is used.
        packed: a weight of logical shape [N, K].
        bias: float [N] or None.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"`` to force one; None picks (or ``INQ_BACKEND``).

    Returns:
        [..., N] in x's (autocast) dtype. Gradients flow to ``x`` and ``bias``; the packed weight takes none.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit. BackendError: a forced backend cannot run.
    """
    if not torch.compiler.is_compiling() and _fits_as_it_is(x, packed, bias, backend):
        fmt = packed.format
        weights = (packed.weight, packed.weight_exp, packed.weight_scale)
        if _needs_grad(x, bias):
            return _apply(_Linear, x, bias, *weights, (fmt.bits, fmt.levels, CPU16, "cpu"))
        return _cpu_op.linear(x, *weights, bias, fmt.bits, fmt.levels == "dense")
    x = _check_product("linear", x, packed, bias)
    if x.dim() == 0 or len(packed.shape) != 2 or x.size(-1) != packed.shape[1]:
        raise ValueError(
            f"inq.linear: x: expected [..., K] for a weight of shape {list(packed.shape)}, got {list(x.shape)}"
        )
    fmt = packed.format
    tail = (fmt.bits, fmt.levels, packed.layout, _chosen("linear", x, backend))
    weights = (packed.weight, packed.weight_exp, packed.weight_scale)
    if _needs_grad(x, bias):
        return _apply(_Linear, x, bias, *weights, tail)
    return _run("linear", x, *weights, bias, *tail)


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """As torch takes it: one integer (numpy's too), or a sequence of one or two."""
    values = value if isinstance(value, Sequence) else (value,)
    try:
        # True is an index to Python, and a mistake here.
        pair = tuple(-1 if isinstance(v, bool) else operator.index(v) for v in values)
    except TypeError:
        pair = ()
    pair = pair * 2 if len(pair) == 1 else pair
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(f"inq.conv2d: {name}: expected one int ≥ {least} or two, got {value!r}")
    if max(pair) >= 1 << 31:
        raise ValueError(f"inq.conv2d: {name}: expected ints under 2^31, got {value!r}")
    return pair


def conv2d(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """Two-dimensional convolution with packed weights; arguments as in torch.nn.functional.conv2d.

    Args:
        x: float [B, C, H, W] or [C, H, W].
        packed: a weight of logical shape [O, C/groups, kh, kw].
        bias: float [O] or None.
        stride, padding, dilation: an int or a pair; padding also ``"valid"`` or ``"same"``.
        groups: as in torch; C for a depthwise convolution.
        backend: as in ``linear``.

    Returns:
        [B, O, H', W'] in x's (autocast) dtype; rounding and gradients as in ``linear``.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit. BackendError: a forced backend cannot run.
    """
    x = _check_product("conv2d", x, packed, bias)
    if x.dim() == 3:
        return conv2d(x[None], packed, bias, stride, padding, dilation, groups, backend=backend)[0]
    shape = packed.shape
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ValueError(f"inq.conv2d: groups: expected an int ≥ 1, got {groups!r}")
    if len(shape) != 4 or x.dim() != 4 or x.shape[1] != shape[1] * groups or shape[0] % groups:
        raise ValueError(
            f"inq.conv2d: x: expected [B, C, H, W] with C = {groups} groups × {shape[1] if len(shape) == 4 else '?'} "
            f"for a weight of shape {list(shape)}, got {list(x.shape)}"
        )
    stride, dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f"inq.conv2d: padding: 'same' needs stride 1, got {stride}")
        total = [dilation[i] * (shape[2 + i] - 1) for i in range(2)]
        # As torch does: an odd total puts the extra row and column at the end.
        x = F.pad(x, (0, total[1] % 2, 0, total[0] % 2)) if total[0] % 2 or total[1] % 2 else x
        padding = (total[0] // 2, total[1] // 2)
    elif padding == "valid":
        padding = (0, 0)
    elif isinstance(padding, str):
        raise ValueError(f"inq.conv2d: padding: expected 'same', 'valid' or ints, got {padding!r}")
    padding = _pair("padding", padding, 0)
    for i, name in ((0, "H"), (1, "W")):
        span = dilation[i] * (shape[2 + i] - 1) + 1
        if x.shape[2 + i] + 2 * padding[i] < span:
            raise ValueError(
                f"inq.conv2d: x: expected padded {name} of at least {span}, got {x.shape[2 + i] + 2 * padding[i]}"
            )
    conv = (shape[2:], stride, padding, dilation, groups)
    tail = (packed.format.bits, packed.format.levels, packed.layout, _chosen("conv2d", x, backend))
    weights = (packed.weight, packed.weight_exp, packed.weight_scale)
    if _needs_grad(x, bias):
        return _apply(_Conv2d, x, bias, *weights, conv, tail)
    return _run("conv2d", x, *weights, bias, *conv, *tail)
