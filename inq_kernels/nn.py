"""Drop-in modules over packed weights, and the conversion of a model to them."""

from __future__ import annotations

import copy
import dataclasses
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter

from . import backends, ops, reference
from .format import Format
from .layouts import STORAGE, layout_of
from .ops import PackedWeight
from .table import bytes_text, render

_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)


# Two threads may call a module for the first time at once.
_LAYING_OUT = threading.RLock()


class _PackedModule:
    """What ``Linear`` and ``Conv2d`` share: ``weight`` uint8, ``weight_exp`` int8, optional ``weight_scale`` float32.

    The packed tensors are Parameters without gradient, so that a ``state_dict`` holds them in the storage layout under
    the names of the file format, and tools that walk parameters see them.
    """

    format: Format
    shape: tuple[int, ...]  # logical shape of the weight
    backend: str | None  # forces a backend; None picks
    _known: PackedWeight | None = None  # what ``packed`` returned last
    _product: str  # the operator that multiplies by the weight

    def _init_packed(self, shape: tuple[int, ...], fmt: Format, device, dtype) -> None:
        """Replace the float weight and bias, which were made on the meta device, by zero codes and a zero bias."""
        ops.check_format(f"inq.{type(self).__name__}: fmt", fmt)
        self.format, self.shape, self.backend = fmt, tuple(map(int, shape)), None
        n, k = shape[0], math.prod(shape[1:])
        self._set_codes(
            torch.zeros(n, fmt.row_bytes(k), dtype=torch.uint8, device=device),
            torch.zeros(n, 1, dtype=torch.int8, device=device),
            None,
        )
        if self.bias is not None:
            self.bias = nn.Parameter(torch.zeros(n, dtype=dtype, device=device))

    def _set_codes(self, weight: Tensor, weight_exp: Tensor, weight_scale: Tensor | None) -> None:
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_exp = nn.Parameter(weight_exp, requires_grad=False)
        scale = None if weight_scale is None else nn.Parameter(weight_scale, requires_grad=False)
        self.register_parameter("weight_scale", scale)

    @property
    def packed(self) -> PackedWeight:
        """The module's weight, sharing its memory, in the layout that it is in."""
        known, own = self._known, self._parameters  # attributes of a module take five times as long to find
        if (
            known is not None
            and (own.get("weight") is known.weight and own.get("weight_exp") is known.weight_exp)
            and own.get("weight_scale", self) is known.weight_scale
            and (known.format is self.format and known.shape is self.shape)
            and known.layout == layout_of(known.weight)
        ):
            return known
        weight, weight_exp, weight_scale = self.weight, self.weight_exp, self.weight_scale
        packed = PackedWeight(weight, weight_exp, weight_scale, self.format, self.shape, layout_of(weight))
        if not torch.compiler.is_compiling():
            self._known = packed
        return packed

    def _lay_out(self, layout: str) -> None:
        """Hold the weight in ``layout``, as a new Parameter: nothing that reads the old one sees half a change."""
        with _LAYING_OUT, torch.inference_mode(False), torch.no_grad():
            if layout_of(self.weight) == layout:
                return
            before = self.packed
            new = ops.prepack(dataclasses.replace(before, weight=before.weight.data), layout).weight
            # Under a fake tensor mode the module must not be left with a weight that has no values.
            if type(new) is Tensor:
                self.weight = nn.Parameter(new, requires_grad=False)

    def prepack(self, dtype: torch.dtype | None = None) -> None:
        """Hold the weight in the layout that products on its device are fastest from; the first call does it, too.

        ``state_dict`` and files have the storage layout all the same.

        Args:
            dtype: of the activations; None: of the bias, or float32 without one.
        """
        dtype = self._float_dtype(dtype)
        device = self.weight.device.type
        layout = backends.preferred_layout(device, dtype, self.format, self.backend or "", self._product)
        if layout != STORAGE:
            self._lay_out(layout)

    def _ready(self, x: Tensor) -> PackedWeight:
        """The weight for a product with ``x``, laid out at the first."""
        packed = self.packed
        if packed.layout == STORAGE and not torch.compiler.is_compiling():
            self.prepack(x.dtype)
            return self.packed
        return packed

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if layout_of(self.weight) != STORAGE:
            stored = ops.prepack(self.packed, STORAGE).weight
            destination[prefix + "weight"] = nn.Parameter(stored, requires_grad=False) if keep_vars else stored

    def _fill(self, source: nn.Module, fmt: Format, n1: Tensor | None) -> None:
        """Take over weights, bias, hooks and mode of a float module."""
        name = f"inq.{type(self).__name__}.from_float: weight"
        w = source.weight.detach()
        w_hat, n1 = fit(name, w, fmt, n1)
        packed = ops.pack(w_hat, fmt, n1)
        self._set_codes(packed.weight, packed.weight_exp, None)
        if source.bias is not None:
            self.bias = nn.Parameter(source.bias.detach().clone(), requires_grad=source.bias.requires_grad)
        self._inherit(source)

    def _inherit(self, source: nn.Module) -> None:
        """Take over hooks and mode of the module that this one replaces."""
        # The dicts themselves, not copies: the handles that register_… returned remove hooks from these.
        for hooks in _HOOKS:
            setattr(self, hooks, getattr(source, hooks))
        self.train(source.training)

    def _float_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        return dtype or (torch.float32 if self.bias is None else self.bias.dtype)

    def _return_float(self, module: nn.Module) -> nn.Module:
        """Fill a float module, made on the meta device, with this module's values."""
        dtype = module.weight.dtype
        module.weight = nn.Parameter(ops.unpack(self.packed, dtype))
        if self.bias is not None:
            module.bias = nn.Parameter(self.bias.detach().to(dtype).clone())
        return module.train(self.training)

    def reset_parameters(self) -> None:
        # torch's constructor calls this while the weight is still a float on the meta device.
        if self.weight.dtype == torch.uint8:
            raise RuntimeError(
                f"inq.{type(self).__name__}.reset_parameters: packed weights have no random initialisation: "
                "use from_float or load_state_dict"
            )

    def requires_grad_(self, requires_grad: bool = True):
        if requires_grad:
            raise ValueError(
                f"inq.{type(self).__name__}.requires_grad_: packed weights take no gradient; "
                "for the bias call .bias.requires_grad_()"
            )
        return super().requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        # .half() and .to(dtype) are for activations and bias: the row scale stays float32 and keeps its bits.
        scale = self.weight_scale
        if scale is None:
            super()._apply(fn, recurse)
        else:
            self.register_parameter("weight_scale", None)
            try:
                super()._apply(fn, recurse)
                moved = fn(scale.detach())
                if moved.dtype != torch.float32:
                    moved = scale.detach().to(moved.device)
                scale = nn.Parameter(moved, requires_grad=False)
            finally:
                # Also when there is no such device, or no memory on it: without it the outputs would be others.
                self.register_parameter("weight_scale", scale)
        # The layout of one device's kernels is nothing to another's.
        if layout_of(self.weight) not in backends.layouts_on(self.weight.device.type):
            self._lay_out(STORAGE)
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        laid_out = layout_of(self.weight) != STORAGE
        self._lay_out(STORAGE)
        self._load_stored(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        if laid_out:
            self.prepack()

    def _load_stored(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        # torch would copy a float weight into uint8, value by value, wherever the shapes happen to agree.
        expected = {"weight": torch.uint8, "weight_exp": torch.int8, "weight_scale": torch.float32}
        found = {name: state_dict[prefix + name] for name in expected if prefix + name in state_dict}
        for name, tensor in found.items():
            if tensor.dtype != expected[name]:
                errors.append(f"{prefix}{name}: expected {expected[name]} (packed), got {tensor.dtype}")
                return
            shape = tuple(self.weight.shape) if name == "weight" else (self.shape[0], 1)
            if tuple(tensor.shape) != shape:
                errors.append(f"{prefix}{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
                return
        if "weight" in found and "weight_exp" in found and found["weight"].device.type != "meta":
            bad = reference.invalid_codes(found["weight"], found["weight_exp"], math.prod(self.shape[1:]), self.format)
            if bad:
                errors.append(f"{prefix}weight: expected codes of {self.format}, got {bad} that are not canonical")
                return
        if "weight_scale" in found and self.weight_scale is None:
            empty = torch.empty(self.shape[0], 1, dtype=torch.float32, device=self.weight.device)
            self.register_parameter("weight_scale", nn.Parameter(empty, requires_grad=False))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.format}"


class Linear(_PackedModule, nn.Linear):
    """torch.nn.Linear with packed weights: y = (x · decode(W)ᵀ) · 2^n1 · scale + bias (see ``inq.linear``).

    Made with zero codes; fill it with ``from_float``, ``load_state_dict`` or ``inq.load``. x is float64, float32,
    bfloat16 or float16 [..., in_features]; y has x's dtype, [..., out_features]. Parameters: ``weight`` uint8
    [out_features, ceil(in_features/8)·bits], ``weight_exp`` int8 [out_features, 1], ``weight_scale`` float32
    [out_features, 1] or None, ``bias`` float [out_features] or None. Only the bias takes a gradient: to unfreeze a
    whole model, pass over parameters that are not ``is_floating_point()``.

    Args:
        in_features, out_features, bias, device, dtype: as in torch.nn.Linear; ``dtype`` is the bias's.
        fmt: the format of the weight.

    Raises:
        TypeError: ``fmt`` is no Format; at a call x is no float tensor. ValueError: at a call x does not fit.
    """

    _product = "linear"

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None, *, fmt: Format):
        super().__init__(in_features, out_features, bias, "meta", dtype)
        self._init_packed((out_features, in_features), fmt, device, dtype)

    @classmethod
    def from_float(cls, m: nn.Linear, fmt: Format, n1: Tensor | None = None) -> Linear:
        """The packed form of ``m``. Weights that lie on the grid of ``fmt`` already (after INQ) are kept exactly;
        others are rounded by equation (4), with ``n1`` int8 [N, 1] or the format's rule.

        Raises:
            TypeError: ``m`` is no torch.nn.Linear with a float weight. ValueError: NaN or Inf in its weight.
        """
        if not isinstance(m, nn.Linear):
            raise TypeError(f"inq.Linear.from_float: m: expected a torch.nn.Linear, got {type(m).__name__}")
        new = cls(m.in_features, m.out_features, m.bias is not None, "meta", fmt=fmt)
        new._fill(m, fmt, n1)
        return new

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A torch.nn.Linear with the decoded weights in ``dtype`` (None: the bias's, or float32).

        Raises:
            TypeError: ``dtype`` is none of the four float dtypes. ValueError: it is float16 and too narrow.
        """
        dtype = self._float_dtype(dtype)
        return self._return_float(nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta", dtype))

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self._ready(x), self.bias, backend=self.backend)


class Conv2d(_PackedModule, nn.Conv2d):
    """torch.nn.Conv2d with packed weights (see ``inq.conv2d``); every padding mode, groups and dilation.

    x is float64, float32, bfloat16 or float16 [B, in_channels, H, W]; y has x's dtype, [B, out_channels, H', W'].
    Parameters as in ``inq.Linear``, with K = in_channels/groups · kh · kw in the place of in_features.

    Args:
        fmt: the format of the weight. The others are torch.nn.Conv2d's; ``dtype`` is the bias's.

    Raises:
        TypeError: ``fmt`` is no Format; at a call x is no float tensor. ValueError: at a call x does not fit.
    """

    _product = "conv2d"

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True,
        padding_mode="zeros", device=None, dtype=None, *, fmt: Format,
    ):  # fmt: skip
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, "meta", dtype
        )
        self._init_packed(tuple(self.weight.shape), fmt, device, dtype)

    @classmethod
    def from_float(cls, m: nn.Conv2d, fmt: Format, n1: Tensor | None = None) -> Conv2d:
        """The packed form of ``m``; as ``Linear.from_float``.

        Raises:
            TypeError: ``m`` is no torch.nn.Conv2d with a float weight. ValueError: NaN or Inf in its weight.
        """
        if not isinstance(m, nn.Conv2d):
            raise TypeError(f"inq.Conv2d.from_float: m: expected a torch.nn.Conv2d, got {type(m).__name__}")
        new = cls(*_conv_arguments(m), m.bias is not None, m.padding_mode, "meta", fmt=fmt)
        new._fill(m, fmt, n1)
        return new

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Conv2d:
        """A torch.nn.Conv2d with the decoded weights in ``dtype`` (None: the bias's, or float32).

        Raises:
            TypeError, ValueError: as in ``Linear.to_float``.
        """
        dtype = self._float_dtype(dtype)
        return self._return_float(
            nn.Conv2d(*_conv_arguments(self), self.bias is not None, self.padding_mode, "meta", dtype)
        )

    def forward(self, x: Tensor) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return ops.conv2d(
            x, self._ready(x), self.bias, self.stride, padding, self.dilation, self.groups, backend=self.backend
        )


def _conv_arguments(m: nn.Conv2d) -> tuple:
    return (m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, m.dilation, m.groups)


def replacement(module: nn.Module, packed: PackedWeight) -> Linear | Conv2d:
    """The packed module in the place of a float one, with its bias (the same Parameter), hooks and mode."""
    has_bias = module.bias is not None
    if isinstance(module, nn.Linear):
        new = Linear(module.in_features, module.out_features, has_bias, "meta", fmt=packed.format)
    else:
        new = Conv2d(*_conv_arguments(module), has_bias, module.padding_mode, "meta", fmt=packed.format)
    new._set_codes(packed.weight, packed.weight_exp, packed.weight_scale)
    new.bias = module.bias
    new._inherit(module)
    return new


def prepack(model: nn.Module) -> nn.Module:
    """Lay out the weights of all packed modules in ``model`` for the kernels of their device, in place.

    ``convert`` and ``load`` have done it, and a module does it at its first call; do it before ``torch.compile``, which
    cannot, or where the first call shall be as fast as the others. A laid out module has a new ``weight`` Parameter:
    packed modules that shared one have one each then. ``state_dict`` and files have the storage layout all the same.

    Args:
        model: any module; what is not packed is left alone.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"inq.prepack: model: expected a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, _PackedModule):
            module.prepack()
    return model


PACKED_TYPES: dict[type[nn.Module], type[Linear] | type[Conv2d]] = {nn.Linear: Linear, nn.Conv2d: Conv2d}


def fit(name: str, w: Tensor, fmt: Format, n1: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``(w_hat, n1)``: ``w`` quantized; ``w`` itself where it lies on the grid of ``fmt`` already, as after INQ, since
    both exponent rules find an n1 without error then. ``name`` is for the errors of ``ops.check_weight``."""
    ops.check_weight(name, w)
    if n1 is None:
        n1 = ops.exponents(w, fmt)
    return ops.quantize(w, fmt, n1), n1


def sqnr_db(signal: float, noise: float) -> float:
    """Signal to quantization noise in dB, 10·log10(Σw² / Σ(w − ŵ)²); infinite without noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def fold_batchnorm(module: Linear | Conv2d, bn: _BatchNorm) -> Linear | Conv2d:
    """A copy of ``module`` that also does the work of the batch norm ``bn`` after it, in evaluation mode.

    With g = γ/√(var + ε): the row scale becomes scale·g, the bias (bias − mean)·g + β. Codes and exponents stay
    powers of two, as they are. Replace ``bn`` by torch.nn.Identity afterwards.

    Args:
        module: a packed module of N output rows or channels.
        bn: torch.nn.BatchNorm1d, 2d or 3d of N features, affine or not; its statistics [N] are taken as they are now.

    Returns:
        A new module of the same codes, with ``weight_scale`` float32 [N, 1] and a bias [N] of the old bias's dtype, or
        of the running mean's.

    Raises:
        TypeError: ``module`` is not packed, or ``bn`` is no batch norm. ValueError: their channel counts differ, or
            ``bn`` has no running statistics, or NaN, Inf or var + ε ≤ 0 among them.
    """
    if not isinstance(module, (Linear, Conv2d)):
        raise TypeError(f"inq.fold_batchnorm: module: expected inq.Linear or inq.Conv2d, got {type(module).__name__}")
    if not isinstance(bn, _BatchNorm):
        raise TypeError(f"inq.fold_batchnorm: bn: expected a torch.nn.BatchNorm, got {type(bn).__name__}")
    n = module.shape[0]
    if bn.num_features != n:
        raise ValueError(f"inq.fold_batchnorm: bn: expected {n} features, got {bn.num_features}")
    if bn.running_mean is None:
        raise ValueError("inq.fold_batchnorm: bn: expected running statistics, got track_running_stats=False")
    for name, tensor in bn.state_dict().items():
        if bad := tensor.numel() - int(torch.isfinite(tensor).sum()):
            raise ValueError(f"inq.fold_batchnorm: bn: {name}: expected finite values, got {bad} that are not")
    if bool((bn.running_var + bn.eps <= 0).any()):
        raise ValueError("inq.fold_batchnorm: bn: running_var: expected var + eps above 0")
    with torch.no_grad():
        g = (bn.running_var.double() + bn.eps).rsqrt()
        if bn.weight is not None:
            g = g * bn.weight.double()
        bias = -bn.running_mean.double() if module.bias is None else module.bias.double() - bn.running_mean.double()
        bias = bias * g
        if bn.bias is not None:
            bias = bias + bn.bias.double()
        scale = g if module.weight_scale is None else g * module.weight_scale.double().view(-1)
    dtype = bn.running_mean.dtype if module.bias is None else module.bias.dtype
    folded = copy.deepcopy(module)
    folded._set_codes(folded.weight.detach(), folded.weight_exp.detach(), scale.float().view(n, 1))
    folded.bias = nn.Parameter(bias.to(dtype))
    return folded


# --- conversion of a model --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Converted:
    """One module with parameters: ``packed``, or float for ``reason``. Bytes are of all its own parameters, as they are
    in files; in use 2 and 3 bits take the room of 4, and rows and columns are padded to a tile (layouts.py)."""

    name: str
    kind: str
    packed: bool
    bytes_before: int
    bytes_after: int
    reason: str = ""
    format: Format | None = None
    sqnr_db: float = math.inf


@dataclass(frozen=True)
class ConvertReport:
    """What ``convert`` did: one ``Converted`` a module with parameters; ``print`` it for a table."""

    modules: list[Converted] = field(default_factory=list)

    @property
    def bytes_before(self) -> int:
        """Bytes of all parameters before, shared ones once."""
        return sum(m.bytes_before for m in self.modules)

    @property
    def bytes_after(self) -> int:
        """Bytes of all parameters now."""
        return sum(m.bytes_after for m in self.modules)

    @property
    def packed_fraction(self) -> float:
        """The fraction of the float bytes that belonged to modules which are packed now."""
        return sum(m.bytes_before for m in self.modules if m.packed) / max(self.bytes_before, 1)

    def __str__(self) -> str:
        rows = [
            (m.name, m.kind, bytes_text(m.bytes_before), bytes_text(m.bytes_after), _outcome(m)) for m in self.modules
        ]
        total = ("total", "", bytes_text(self.bytes_before), bytes_text(self.bytes_after), "")
        return render(("module", "type", "before", "after", "result"), [*rows, total])


def _outcome(m: Converted) -> str:
    if not m.packed:
        return f"float: {m.reason}"
    return f"{m.format}, " + ("exact" if m.sqnr_db == math.inf else f"rounded, SQNR {m.sqnr_db:.1f} dB")


def as_patterns(patterns: str | Iterable[str]) -> tuple[str, ...]:
    """One pattern or several, as a tuple."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def first_match(patterns: Iterable[str], name: str) -> str | None:
    """``name`` itself if it is among ``patterns``, else the first (fnmatch: ``*``, ``?``, ``[…]``, case-sensitive) that
    it matches."""
    patterns = list(patterns)
    return name if name in patterns else next((p for p in patterns if fnmatchcase(name, p)), None)


def check_patterns(where: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """A pattern that matches nothing is a typing mistake, and an error."""
    names = list(names)
    for pattern in patterns:
        if pattern not in names and not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"{where}: expected a pattern that matches a module, got {pattern!r}; there are {names}")


# Parents whose fast paths read their children's ``weight`` without calling them.
_READ_WEIGHT_DIRECTLY = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def _why_not(model: nn.Module, name: str, module: nn.Module, owners: Mapping[int, list[str]]) -> str | None:
    """Why ``module`` cannot be packed, or None if it can."""
    if isinstance(module, _PackedModule):
        return "is packed already"
    base = next((b for b in PACKED_TYPES if isinstance(module, b)), None)
    if base is None:
        return f"no packed module for {type(module).__name__}"
    parts = name.split(".")
    for depth in range(len(parts)):
        parent = model.get_submodule(".".join(parts[:depth]))
        if isinstance(parent, _READ_WEIGHT_DIRECTLY):
            return f"{type(parent).__name__} reads its weight directly"
    if "weight" not in module._parameters:
        return "its weight is computed from other parameters (pruning or a parametrization: remove it first)"
    if type(module) not in PACKED_TYPES:
        return f"is a subclass of {base.__name__}, whose forward may differ"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    carried = [*module._modules, *module._buffers, *(module._parameters.keys() - {"weight", "bias"})]
    if carried or "bias" not in module._parameters:
        return f"it carries more than weight and bias: {', '.join(carried) or 'a computed bias'}"
    shared = [owner for owner in owners[id(module.weight)] if owner != name]
    if any(model.get_submodule(owner) is not module for owner in shared):
        return f"its weight is shared with {shared[0]!r}"
    return None


def _own_bytes(module: nn.Module, counted: set[int]) -> int:
    """Bytes in files of the module's own parameters without those in ``counted``, to which they are added."""
    own = {n: p for n, p in module.named_parameters(recurse=False) if id(p) not in counted}
    counted.update(map(id, own.values()))
    if isinstance(module, _PackedModule) and own.pop("weight", None) is not None:
        return module.shape[0] * module.format.row_bytes(math.prod(module.shape[1:])) + sum(
            p.nbytes for p in own.values()
        )
    return sum(p.nbytes for p in own.values())


@dataclass(frozen=True)
class Planned:
    """One module with parameters before a conversion: its bytes in files, and its format or why it stays float."""

    name: str
    module: nn.Module
    bytes_before: int
    format: Format | None
    reason: str = ""

    def left_float(self) -> Converted:
        """Its row of a report, if it stays float."""
        kind = type(self.module).__name__
        return Converted(self.name, kind, False, self.bytes_before, self.bytes_before, self.reason)

    def packed_as(self, new: Linear | Conv2d) -> Converted:
        """Its row of a report, if ``new`` takes its place."""
        w, w_hat = self.module.weight.detach().double(), ops.unpack(new.packed, torch.float32).double()
        # Relative to the largest, so that no square underflows.
        peak = float(w.abs().max()) or 1.0
        sqnr = sqnr_db(float((w / peak).square().sum()), float(((w - w_hat) / peak).square().sum()))
        parts = (new.weight, new.weight_exp, new.weight_scale)
        packed_bytes = sum(part.nbytes for part in parts if part is not None)
        after = self.bytes_before - self.module.weight.nbytes + packed_bytes
        return Converted(self.name, type(self.module).__name__, True, self.bytes_before, after, "", self.format, sqnr)


def plan(
    where: str,
    model: nn.Module,
    fmt: Format | Mapping[str, Format],
    skip: str | Iterable[str],
    only: str | Iterable[str],
) -> list[Planned]:
    """What ``convert`` and ``calibrate`` (``where``, for the errors) do with each module that has parameters."""
    skip, only = as_patterns(skip), as_patterns(only)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model: expected a torch.nn.Module, got {type(model).__name__}")
    formats = dict(fmt) if isinstance(fmt, Mapping) else {"*": fmt}
    for pattern, value in formats.items():
        ops.check_format(f"{where}: fmt: {pattern!r}", value)
    if type(model) in PACKED_TYPES:
        kind = PACKED_TYPES[type(model)].__name__
        raise ValueError(
            f"{where}: model: cannot replace the model itself: use inq.{kind}.from_float, or put it into nn.Sequential"
        )
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    check_patterns(f"{where}: skip", skip, names)
    check_patterns(f"{where}: only", only, names)
    check_patterns(f"{where}: fmt", [p for p in formats if p != "*"], names)
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(f"{where}: layer {name!r}: expected initialised weights: run one batch through it")
            owners.setdefault(id(parameter), []).append(name)

    planned = []
    counted: set[int] = set()
    for name, module in model.named_modules():
        before = _own_bytes(module, counted)
        if before == 0 and not isinstance(module, tuple(PACKED_TYPES)):
            continue
        pattern = first_match(formats, name)
        reason = _why_not(model, name, module, owners)
        if reason is None and (skipped := first_match(skip, name)):
            reason = f"skipped by {skipped!r}"
        if reason is None and only and not first_match(only, name):
            reason = "not among only="
        if reason is None and pattern is None:
            reason = "no format for its name"
        layer_format = formats[pattern] if reason is None else None
        planned.append(Planned(name, module, before, layer_format, reason or ""))
    return planned


def swap(where: str, model: nn.Module, replacements: Mapping[int, nn.Module], report: ConvertReport) -> None:
    """Put ``replacements``, by the id of what they replace, into ``model``, under every name that a module has."""
    for parent in list(model.modules()):
        for child_name, child in parent._modules.items():
            if id(child) in replacements:
                parent._modules[child_name] = replacements[id(child)]
    prepack(model)
    if report.packed_fraction < 0.5:
        warnings.warn(
            f"{where}: only {report.packed_fraction:.0%} of the parameter bytes were packed; print the report",
            stacklevel=3,
        )


def convert(
    model: nn.Module,
    fmt: Format | Mapping[str, Format],
    skip: str | Iterable[str] = (),
    only: str | Iterable[str] = (),
) -> ConvertReport:
    """Replace the Linear and Conv2d modules of ``model`` in place by ``inq.Linear`` and ``inq.Conv2d``.

    Weights on the grid of their format (as after INQ) are packed exactly, others are rounded by equation (4) and the
    report gives their SQNR. All or nothing: after an error, out of memory included, the model is as it was.

    Args:
        model: any module with values (not on the meta device); modules are chosen by type. Tied weights,
            MultiheadAttention, TransformerEncoderLayer, and what carries or does more than a Linear or Conv2d (a
            subclass, a patched forward, modules inside) stay float, with the reason in the report. Biases stay the same
            Parameters.
        fmt: a format for all, or a mapping from names or name patterns (fnmatch) to formats; a name comes before a
            pattern, then the first that matches wins, and modules that none matches stay float. ``run.formats`` of an
            ``inq.INQ`` fits.
        skip: name patterns of modules that stay float.
        only: name patterns of the only modules to replace.

    Returns:
        A report of every module with parameters: what was packed, what stayed float and why, in bytes.

    Warns:
        UserWarning: under half of the parameter bytes were packed.

    Raises:
        ValueError: a pattern that matches no module, NaN or Inf in a weight, or ``model`` itself is a Linear or Conv2d.
    """
    report = ConvertReport()
    replacements: dict[int, nn.Module] = {}
    for each in plan("inq.convert", model, fmt, skip, only):
        name, module = each.name, each.module
        if each.format is None:
            report.modules.append(each.left_float())
            continue
        try:
            new = PACKED_TYPES[type(module)].from_float(module, each.format)
        except (TypeError, ValueError) as error:
            raise type(error)(f"inq.convert: layer {name!r}: {error}") from error
        # The same Parameter: an optimizer may hold it, or another module share it.
        new.bias = module.bias
        replacements[id(module)] = new
        report.modules.append(each.packed_as(new))
    # Everything that can fail has been done.
    swap("inq.convert", model, replacements, report)
    return report
