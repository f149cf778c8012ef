"""vLLM's side of packed weights: which layer is packed, its parameters, its product. ``vllm.register`` imports this."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.parameter import ChannelQuantScaleParameter, PackedvLLMParameter

from .. import backends, ops
from ..file_format import CONFIG_FILE, check_packed, model_files
from ..files import CheckpointError
from ..format import Format
from ..layouts import STORAGE, layout_of
from ..ops import PackedWeight
from .packed_files import PackedFiles
from .settings import Settings

# Under all exponents.
_NO_EXPONENT = -128
# Mixtures of experts, under the names that their layer has had.
_EXPERTS = ("FusedMoE", "RoutedExperts")


@register_quantization_config("inq")
class InqConfig(QuantizationConfig):
    """``quantization_config`` of a packed model."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings

    def __repr__(self) -> str:
        return f"InqConfig({self.settings.default})"

    @classmethod
    def get_name(cls) -> str:
        return "inq"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return [CONFIG_FILE]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> InqConfig:
        return cls(Settings.read("quantization_config", config))

    def maybe_update_config(self, model_name: str, hf_config: object = None, revision: str | None = None) -> None:
        """vLLM calls this before it opens a model's files. In a directory they are checked first, all that needs no
        tensor: without a .safetensors vLLM would open a .bin, which is a pickle. A name on a hub is not here yet.

        Raises:
            CheckpointError: a file is not as it should be, or there is no .safetensors.
        """
        if (directory := Path(model_name)).is_dir():
            PackedFiles([str(file) for file in model_files(directory)])

    def apply_vllm_mapper(self, hf_to_vllm_mapper) -> None:
        old = self.settings
        overrides = hf_to_vllm_mapper.apply_dict(dict(old.overrides))
        self.settings = Settings(old.default, overrides, tuple(hf_to_vllm_mapper.apply_list(list(old.ignore))))

    def get_quant_method(self, layer: nn.Module, prefix: str):
        if any(kind.__name__ in _EXPERTS for kind in type(layer).__mro__):
            return self._experts(prefix)
        if not isinstance(layer, (LinearBase, ParallelLMHead)):
            return None
        fmt = self._format(prefix)
        if fmt is not None:
            return InqLinearMethod(fmt, prefix)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def _parts(self, prefix: str) -> list[str]:
        """The modules of the files that a layer of vLLM is made of."""
        parent, _, name = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(name, [name])
        return [f"{parent}.{part}" if parent else part for part in parts]

    def _format(self, prefix: str) -> Format | None:
        parts = self._parts(prefix)
        formats = {part: self.settings.format_of(part) for part in parts}
        if len({None if f is None else (f.bits, f.levels) for f in formats.values()}) > 1:
            listed = ", ".join(f"{part}: {fmt or 'float'}" for part, fmt in formats.items())
            raise ValueError(f"inq: layer {prefix!r}: expected one format for all parts of a fused layer, got {listed}")
        return formats[parts[0]]

    def _experts(self, prefix: str) -> None:
        """None if they are float: vLLM runs them then."""
        names = self.settings.ignore
        if not (self.settings.ignored(prefix) or any(name.startswith(f"{prefix}.") for name in names)):
            raise ValueError(
                f"inq: layer {prefix!r}: expected float experts, got packed ones, which the vLLM plugin cannot run "
                "yet: quantize with --skip '*.experts.*' '*.gate'"
            )


@register_weight_loader_v2_supported_method
class InqLinearMethod(LinearMethodBase):
    """A linear layer's packed weight: storage layout while it is read, its device's afterwards."""

    def __init__(self, fmt: Format, prefix: str) -> None:
        self.format, self.prefix = fmt, prefix

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        """Parameters ``weight`` uint8 [N, ceil(K/8)·bits], ``weight_exp`` int8 [N, 1] and ``weight_scale`` float32
        [N, 1], of this process's part.

        Raises:
            ValueError: the columns cannot be cut at a multiple of eight.
        """
        if input_size_per_partition != input_size and input_size_per_partition % 8:
            raise ValueError(
                f"inq: layer {self.prefix!r}: expected input features a process that are a multiple of 8, "
                f"got {input_size_per_partition} of {input_size}: use fewer processes"
            )
        n, loader = sum(output_partition_sizes), extra_weight_attrs["weight_loader"]
        layer.inq_shape, layer.inq_dtype = (n, input_size_per_partition), params_dtype

        def checked(name: str, dtype: torch.dtype) -> Callable:
            return _checked(f"inq: layer {self.prefix!r}: {name}", dtype, loader)

        # vLLM does not notice what is missing in the files of a quantized model: what they do not overwrite stays
        # something that they cannot hold.
        weight = PackedvLLMParameter(
            data=self._no_codes.repeat(n, self.format.row_bytes(input_size_per_partition) // self.format.bits),
            input_dim=1,
            output_dim=0,
            packed_dim=1,
            packed_factor=Fraction(8, self.format.bits),
            weight_loader=checked("weight", torch.uint8),
        )
        exponents = ChannelQuantScaleParameter(
            data=torch.full((n, 1), _NO_EXPONENT, dtype=torch.int8),
            output_dim=0,
            weight_loader=checked("weight_exp", torch.int8),
        )
        # Few models have row scales, and only the files know: ones that are not overwritten are dropped after loading.
        scale = ChannelQuantScaleParameter(
            data=torch.ones(n, 1, dtype=torch.float32),
            output_dim=0,
            weight_loader=checked("weight_scale", torch.float32),
        )
        layer.register_parameter("weight", weight)
        layer.register_parameter("weight_exp", exponents)
        layer.register_parameter("weight_scale", scale)

    @property
    def _no_codes(self) -> Tensor:
        """uint8 [bits]: eight negative zeros, which no file holds."""
        bits = self.format.bits
        stream = sum(1 << (bits * code + bits - 1) for code in range(8))
        return torch.tensor(list(stream.to_bytes(bits, "little")), dtype=torch.uint8)

    def _check_loaded(self, weight: Tensor, exponents: Tensor) -> None:
        """A CheckpointError if rows were in no file."""
        codes = self._no_codes.to(weight.device).repeat(weight.shape[1] // self.format.bits)
        missing = {"weight": (weight == codes).all(dim=1), "weight_exp": exponents.view(-1) == _NO_EXPONENT}
        for name, rows in missing.items():
            if bad := int(rows.sum()):
                raise CheckpointError(
                    f"vLLM layer {self.prefix!r}: {name}: expected all of its {len(rows)} rows in the files, "
                    f"got none of {bad}"
                )

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """An output layer that is tied to the embedding is float, as that is: it is no layer of this method."""
        for name in ("weight", "weight_exp", "weight_scale"):
            delattr(layer, name)
        layer.quant_method = embed_tokens.quant_method
        return layer.quant_method.tie_weights(layer, embed_tokens)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check the codes, and lay them out for the device's kernels. Raises CheckpointError."""
        if layout_of(layer.weight) != STORAGE:
            return
        weight, exponents, scale = (layer.weight.data, layer.weight_exp.data, layer.weight_scale.data)
        self._check_loaded(weight, exponents)
        scale = None if bool((scale == 1).all()) else scale
        packed = PackedWeight(weight, exponents, scale, self.format, layer.inq_shape)
        check_packed(Path(f"vLLM layer {self.prefix!r}"), "weight", packed)
        layout = backends.preferred_layout(weight.device.type, layer.inq_dtype, self.format)
        laid_out = ops.prepack(packed, layout)
        for name in ("weight", "weight_exp", "weight_scale"):
            part = getattr(laid_out, name)
            layer.register_parameter(name, None if part is None else nn.Parameter(part, requires_grad=False))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] of this process → [..., N], by ``inq.linear``."""
        weight = layer.weight
        packed = PackedWeight(
            weight, layer.weight_exp, layer.weight_scale, self.format, layer.inq_shape, layout_of(weight)
        )
        return ops.linear(x, packed, bias)


def _checked(where: str, dtype: torch.dtype, loader: Callable) -> Callable:
    """``loader``, which would copy values of any dtype into the parameter, for values of ``dtype`` alone."""

    def load(param: nn.Parameter, loaded_weight: Tensor, *args, **kwargs) -> None:
        if loaded_weight.dtype != dtype:
            raise TypeError(
                f"{where}: expected {dtype}, got {loaded_weight.dtype}: the files hold another weight than "
                "quantization_config says"
            )
        loader(param, loaded_weight, *args, **kwargs)

    return load
