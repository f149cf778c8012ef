"""transformers ≥ 5.0: ``InqConfig``, the quantizer behind it, and ``save_pretrained``.

Importing this module registers the method "inq" with transformers, so that ``from_pretrained`` loads what
``inq quantize`` and ``save_pretrained`` wrote, and packs float models as they are read if it is given an ``InqConfig``.

What is checked when a packed model is loaded: the structure of the files (headers, names, dtypes, shapes: all of
``files.read_header``), that every packed module finds its tensors and the other way round, then every code, exponent
and row scale. Not the checksums, since transformers reads the tensors itself: ``inq verify DIR`` does that.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import ops
from ..file_format import check_packed, check_suffix, config
from ..format import Format
from ..nn import (
    Conv2d,
    Converted,
    ConvertReport,
    Linear,
    _conv_arguments,
    _own_bytes,
    _PackedModule,
    _why_not,
    fit,
    sqnr_db,
)
from . import tensor_parallel
from .model_names import Names
from .packed_files import PackedFiles
from .saving import save_pretrained
from .settings import Patterns, Settings

__all__ = ["InqConfig", "InqHfQuantizer", "save_pretrained"]

_CHUNK = 1 << 22
# A Linear of its own for each expert of a mixture, in the files.
_EXPERT = re.compile(r"\.experts\.\d+\.")


def _format(where: str, fmt: Format | int) -> Format:
    fmt = Format(fmt) if isinstance(fmt, int) and not isinstance(fmt, bool) else fmt
    ops.check_format(where, fmt)
    return fmt


@register_quantization_config("inq")
class InqConfig(QuantizationConfigMixin):
    """How ``from_pretrained(..., quantization_config=InqConfig(...))`` packs a float model: INQ at 100 %, in one shot.

    Weights on the grid of their format (as after INQ) are packed exactly, others are rounded by equation (4). Packed
    are Linear and Conv2d modules; ``model.hf_quantizer.report`` says what stayed float, and why.

    Args:
        fmt: the format of all packed weights, or its bits.
        skip: names or patterns (fnmatch) of modules that stay float. None: what transformers keeps float by default,
            the output layer and what its model class asks for. ``()`` packs all that can be. Tied weights stay float.
        overrides: name or pattern → another format (or its bits) for these modules.

    Raises:
        TypeError, ValueError: arguments that are not as above; at loading a pattern that matches no module.
    """

    def __init__(
        self,
        fmt: Format | int = 5,
        skip: str | Iterable[str] | None = None,
        overrides: Mapping[str, Format | int] | None = None,
    ) -> None:
        self.quant_method = "inq"
        self.default_skip = skip is None
        ignore = (skip,) if isinstance(skip, str) else tuple(skip or ())
        formats = {name: _format(f"InqConfig: overrides: {name!r}", f) for name, f in (overrides or {}).items()}
        self.settings = Settings(_format("InqConfig: fmt", fmt), formats, ignore)

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        """From the JSON of ``quantization_config``. Raises CheckpointError if it is not as ``inq quantize`` writes it,
        or of a newer format version."""
        new = cls.__new__(cls)
        new.quant_method, new.default_skip = "inq", False
        new.settings = Settings.read("quantization_config", dict(config_dict))
        return (new, kwargs) if return_unused_kwargs else new

    def to_dict(self) -> dict:
        """The JSON again; after loading with names of modules in the place of patterns."""
        return self.settings.to_json()

    def resolve(self, formats: Mapping[str, Format], ignore: Iterable[str]) -> None:
        """From now on name the modules: ``formats`` of the packed ones, ``ignore`` of those that stayed float."""
        self.settings, self.default_skip = Settings.read("InqConfig", config(formats, ignore)), False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InqConfig) and self.to_dict() == other.to_dict()

    __hash__ = None

    def __repr__(self) -> str:
        return f"InqConfig({self.settings})"

    def to_diff_dict(self) -> dict:
        """As ``to_dict``: nothing of it goes without saying."""
        return self.to_dict()


class _Pack(ConversionOps):
    """Packs a weight that has just been read, and puts the packed module in the place of the float one."""

    def __init__(self, quantizer: InqHfQuantizer) -> None:
        self._quantizer = quantizer

    @torch.no_grad()
    def convert(self, input_dict, full_layer_name=None, model=None, **kwargs):
        value = next(iter(input_dict.values()))
        w = value[0] if isinstance(value, list) else value
        return self._quantizer._pack(model, full_layer_name, w)

    @property
    def reverse_op(self):
        raise NotImplementedError("inq: packed weights are written as they are; model.dequantize() makes them float")


@register_quantizer("inq")
class InqHfQuantizer(HfQuantizer):
    """What ``from_pretrained`` calls; ``report`` says, after packing a float model, what became of each module."""

    requires_calibration = False
    report: ConvertReport | None = None

    def __init__(self, quantization_config, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self._formats: dict[str, Format] = {}
        self._sqnr: dict[str, float] = {}
        self._reasons: dict[str, str] = {}

    # --- what transformers asks ---

    def validate_environment(self, *args, device_map=None, **kwargs):
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        if "disk" in map(str, devices):
            raise ValueError(
                "inq: device_map: expected devices that compute, got 'disk': packed weights stay in memory"
            )

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters beside packed weights

    @property
    def is_compileable(self) -> bool:
        return True

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        module, _, attribute = param_name.rpartition(".")
        return not self.pre_quantized and attribute == "weight" and module in self._formats

    def param_element_size(self, model, param_name: str, param: Tensor | None = None) -> float:
        if self.param_needs_quantization(model, param_name):
            return self._formats[param_name.rpartition(".")[0]].bits / 8
        return (model.get_parameter_or_buffer(param_name) if param is None else param).element_size()

    def get_quantize_ops(self):
        return _Pack(self)

    def update_parallel_plan(self, model, plan: dict[str, str]) -> None:
        tensor_parallel.keep_row_parts_whole(model, plan)

    # --- before the weights are read ---

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        world = tensor_parallel.world_size(model)
        if world > 1 and not self.pre_quantized:
            raise ValueError(
                "inq: expected a packed model for tensor parallelism, got a float one to pack while it is read: "
                "write a packed one first (`inq quantize DIR OUT`, or save_pretrained in one process)"
            )
        names = Names(model)
        if self.pre_quantized:
            self._prepare_packed(model, names, checkpoint_files, world)
        else:
            for path in checkpoint_files or ():
                check_suffix(Path(path))
            self._prepare_float(model, names)

    def _candidates(self, model, names: Names):
        """(name, module, format, reason): each module with a weight of its own, and why it cannot be packed."""
        owners: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            for parameter in module.parameters(recurse=False):
                owners.setdefault(id(parameter), []).append(name)
        for name, module in model.named_modules():
            if "weight" not in module._parameters:
                continue
            reason = _why_not(model, name, module, owners)
            if reason is None and f"{name}.weight" in names.tied:
                reason = "its weight is tied to another module's"
            yield name, module, self.quantization_config.settings.format_of(*names.of(name)), reason

    def _prepare_float(self, model, names: Names) -> None:
        settings = self.quantization_config.settings
        names.check_patterns("InqConfig: skip", settings.ignore)
        names.check_patterns("InqConfig: overrides", settings.overrides)
        default = self.quantization_config.default_skip
        self.modules_to_not_convert = names.kept_float(self) if default else list(settings.ignore)
        for name, _module, fmt, reason in self._candidates(model, names):
            if reason is None and (pattern := settings.ignored(*names.of(name))) is not None:
                reason = f"skipped by {pattern!r}"
            if reason is None and default and names.is_kept_float(name, self.modules_to_not_convert):
                reason = "kept float by default (skip=() packs it)"
            if reason is None:
                self._formats[name] = fmt
            else:
                self._reasons[name] = reason
        if not self._formats:
            found = "; ".join(f"{name}: {reason}" for name, reason in list(self._reasons.items())[:4])
            raise ValueError(f"InqConfig: expected a module to pack, got none ({found})")
        for pattern in settings.overrides:
            if any(Patterns([pattern]).match(names.of(name)) for name in self._formats):
                continue
            float_ones = (f"{n}: {r}" for n, r in self._reasons.items() if Patterns([pattern]).match(names.of(n)))
            found = next(float_ones, "it has no weight")
            raise ValueError(f"InqConfig: overrides: expected a pattern of what is packed, got {pattern!r} ({found})")

    def _prepare_packed(self, model, names: Names, checkpoint_files, world: int) -> None:
        stored = PackedFiles(checkpoint_files, model.config.name_or_path)
        candidates = list(self._candidates(model, names))
        claimed = {name: stored.claim(names.of(name)) for name, *_ in candidates}
        # Before a router's weight is found to be none of a Linear: what to do is the same for both.
        if experts := [name for name in stored.packed - set(claimed.values()) if _EXPERT.search(name)]:
            raise stored.error(
                min(experts),
                f"expected float experts, which {type(model).__name__} holds in one tensor, got packed ones: quantize "
                "with --skip '*.experts.*' '*.gate'",
            )
        for name, module, fmt, reason in candidates:
            where, found = f"{type(model).__name__}: module {name!r}", claimed[name]
            if found is None:
                if fmt is not None and reason is None:
                    self._refuse_float(where, stored, names.of(name))
                continue
            if reason is not None or fmt is None:
                got = f"{type(module).__name__}: {reason}" if reason else "one that ignore names"
                raise stored.error(found, f"expected a module that can hold packed weights, got {where}, {got}")
            shape = tuple(module.weight.shape)
            scaled = stored.check(found, fmt, shape)
            tensor_parallel.check_width(where, name, model, shape, world)
            model.set_submodule(name, _empty(module, fmt, scaled, world > 1))
            self._formats[name] = fmt
        if not self._formats:
            raise stored.error(None, "expected packed weights of the model, got none of its modules'")

    @staticmethod
    def _refuse_float(where: str, stored: PackedFiles, names: Iterable[str]) -> None:
        found = stored.float_weight(names)
        if found is not None:
            raise stored.error(found, f"expected packed codes for {where}, which ignore does not name, got a float one")
        # A head that the files never had: transformers says so as well, and gives it random values.
        warnings.warn(f"inq: {where} is not in the files and stays float", stacklevel=2)

    # --- while they are read ---

    def _pack(self, model, weight_name: str, w: Tensor) -> dict[str, Tensor]:
        name = weight_name.rpartition(".")[0]
        module, fmt = model.get_submodule(name), self._formats[name]
        w_hat, n1 = fit(f"inq: tensor {weight_name!r}", w, fmt)
        packed = ops.pack(w_hat, fmt, n1)
        signal = noise = 0.0
        for a, b in zip(w.reshape(-1).split(_CHUNK), w_hat.reshape(-1).split(_CHUNK), strict=True):
            signal += float(a.double().square().sum())
            noise += float((a.double() - b.double()).square().sum())
        self._sqnr[name] = sqnr_db(signal, noise)
        model.set_submodule(name, _empty(module, fmt))
        return {weight_name: packed.weight, f"{weight_name}_exp": packed.weight_exp}

    # --- after ---

    def _process_model_after_weight_loading(self, model, **kwargs):
        if getattr(model, "_tp_size", None) and not hasattr(HfQuantizer, "update_parallel_plan"):
            raise ValueError(
                "inq: expected transformers ≥ 5.21 for tensor parallelism, which cuts packed weights right"
            )
        for name, module in model.named_modules():
            where = f"{type(model).__name__}: module {name!r}"
            if isinstance(module, _PackedModule):
                _check_loaded(where, module)
            elif (weight := module._parameters.get("weight")) is not None and weight.dtype == torch.uint8:
                raise TypeError(f"{where}: expected a float weight for a {type(module).__name__}, got packed codes")
        for module in model.modules():
            if isinstance(module, _PackedModule):
                module.prepack()
        if not self.pre_quantized:
            self._report(model)
        return model

    def _report(self, model) -> None:
        """What became of each module, and from now on names of modules in the configuration."""
        counted: set[int] = set()
        report = ConvertReport()
        for name, module in model.named_modules():
            after = _own_bytes(module, counted)
            if after == 0:
                continue
            kind, before = type(module).__name__, after
            if isinstance(module, _PackedModule):
                n, k = module.shape[0], math.prod(module.shape[1:])
                before += n * k * model.dtype.itemsize - n * module.format.row_bytes(k) - n
                row = Converted(name, kind, True, before, after, "", self._formats[name], self._sqnr[name])
            else:
                reason = "its weight is not in the files" if name in self._formats else self._reasons.get(name)
                row = Converted(name, kind, False, before, after, reason or f"no packed module for {kind}")
            report.modules.append(row)
        self.report = report
        formats = {row.name: row.format for row in report.modules if row.packed}
        if not formats:
            raise ValueError(f"{type(model).__name__}: expected a weight to pack in the files, got none")
        self.quantization_config.resolve(formats, [n for n, m in model.named_modules() if _stayed_float(m)])
        # transformers gave the model a copy of its configuration before this one named the modules.
        model.config.quantization_config = self.quantization_config
        if report.packed_fraction < 0.5:
            warnings.warn(
                f"inq: only {report.packed_fraction:.0%} of the parameter bytes were packed; "
                "print(model.hf_quantizer.report)",
                stacklevel=2,
            )

    def _dequantize(self, model, dtype: torch.dtype | None = None):
        if tensor_parallel.world_size(model) > 1:
            raise ValueError("inq: dequantize: expected a model in one process, got one that is split over several")
        dtype = dtype or model.dtype
        floats: dict[str, nn.Module] = {}
        # All of them first: the model is changed as a whole or not at all.
        for name, module in model.named_modules():
            if isinstance(module, _PackedModule):
                try:
                    floats[name] = module.to_float(dtype)
                except ValueError as error:
                    raise ValueError(f"inq: dequantize: module {name!r}: {error}") from None
        for name, module in floats.items():
            model.set_submodule(name, module)
        return model


def _stayed_float(module: nn.Module) -> bool:
    """What ``inq quantize`` names as well: matrices and kernels, not norms."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() >= 2 and not isinstance(module, _PackedModule)


def _empty(module: nn.Module, fmt: Format, scaled: bool = False, sharded: bool = False) -> nn.Module:
    """The packed module in the place of a float one, on the meta device, with its bias, hooks and mode."""
    has_bias = module.bias is not None
    if isinstance(module, nn.Linear):
        kind = tensor_parallel.ShardedLinear if sharded else Linear
        new = kind(module.in_features, module.out_features, has_bias, "meta", fmt=fmt)
    else:
        new = Conv2d(*_conv_arguments(module), has_bias, module.padding_mode, "meta", fmt=fmt)
    if scaled:
        scale = torch.empty(new.shape[0], 1, dtype=torch.float32, device="meta")
        new.weight_scale = nn.Parameter(scale, requires_grad=False)
    new.bias = module.bias
    new._inherit(module)
    # Kernels take local tensors: transformers hands these modules the shard, not a DTensor.
    new._hf_quantized_needs_local_tp = True
    return new


def _check_loaded(where: str, module: nn.Module) -> None:
    """Codes, exponents and scales, which came from a file that nobody vouches for."""
    for part in ("weight", "weight_exp", "weight_scale"):
        tensor = getattr(module, part)
        if tensor is not None and tensor.device.type == "meta":
            raise ValueError(f"{where}: expected {part} in the files, got none")
        if tensor is not None and tensor.requires_grad:
            tensor.requires_grad_(False)  # transformers makes floating parameters trainable
    if isinstance(module, tensor_parallel.ShardedLinear):
        module.localize()
    check_packed(Path(where), "weight", module.packed)
