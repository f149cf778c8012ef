"""PEFT: LoRA beside packed weights, and back into them.

``peft.get_peft_model(model, prepare(LoraConfig(target_modules="all-linear", …)))``. The adapters are PEFT's own;
what ``prepare`` adds is errors where PEFT would read the packed bytes as weights. ``merge_and_requantize`` takes the
place of ``merge_and_unload``.
"""

from __future__ import annotations

from collections.abc import Iterable

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .. import ops
from ..nn import Conv2d, Converted, ConvertReport, Linear, _PackedModule, as_patterns, fit, sqnr_db
from ..ops import PackedWeight

__all__ = ["PackedLoraLinear", "merge_and_requantize", "prepare"]

# Initialisations that do not look at the base weight.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")


class PackedLoraLinear(LoraLinear):
    """PEFT's LoRA of a Linear, beside an ``inq.Linear``."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: see the message."""
        raise NotImplementedError(
            "a LoRA cannot be merged into packed weights as it is, since the sum is no power of two: call "
            "inq_kernels.integrations.peft.merge_and_requantize(model), which rounds it, or keep the adapter"
        )

    def unmerge(self) -> None:
        """Refused: nothing is ever merged."""
        raise NotImplementedError("a LoRA beside packed weights is never merged: expected no call of unmerge")


def _refuse_convolution(target: nn.Module, adapter_name: str, **kwargs) -> nn.Module:
    raise ValueError(
        f"LoRA {adapter_name!r}: expected target_modules without packed convolutions, got {target}: PEFT makes its "
        "adapters of the same class, and packed weights are not trained"
    )


def prepare(config: peft.LoraConfig) -> peft.LoraConfig:
    """Make a LoraConfig fit for a model with packed weights, in place.

    The same for adapters from a file: ``PeftModel.from_pretrained(model, path,
    config=prepare(PeftConfig.from_pretrained(path)))``. Without it LoRA works as well, but merging fails with an error
    about sizes.

    Returns:
        ``config``.

    Raises:
        TypeError: not a LoraConfig. ValueError: DoRA, or an initialisation that reads the base weight.
    """
    if not isinstance(config, peft.LoraConfig):
        raise TypeError(f"prepare: config: expected a peft.LoraConfig, got {type(config).__name__}")
    if config.use_dora:
        raise ValueError("prepare: use_dora: expected False beside packed weights, which DoRA would have to normalize")
    if config.init_lora_weights not in _PLAIN_INITS:
        raise ValueError(
            f"prepare: init_lora_weights: expected one of {_PLAIN_INITS} beside packed weights, "
            f"got {config.init_lora_weights!r}, which computes with the base weight"
        )
    config._register_custom_module({Linear: PackedLoraLinear, Conv2d: _refuse_convolution})
    return config


@torch.no_grad()
def merge_and_requantize(model: peft.PeftModel, adapter_names: Iterable[str] | None = None):
    """Add LoRA adapters to the packed weights, round the sums to the formats that these have, and take PEFT away.

    Row scales stay as they are. Adapters beside float modules, and trained tokens, are merged by PEFT.

    Args:
        model: a PeftModel with LoRA adapters.
        adapter_names: which to merge, or the name of one; None: the active ones.

    Returns:
        ``(base, report)``: the model without PEFT's wrappers, changed in place, and a ``ConvertReport`` with the SQNR
        of the rounding for each packed module.

    Raises:
        TypeError: not a PeftModel with LoRA. ValueError: no adapter of that name, a bias in an adapter, DoRA or another
            variant whose sum is not the weight and the adapter's product, a base layer that is shared, NaN or Inf in a
            sum. Then nothing is changed.
    """
    if not isinstance(model, peft.PeftModel) or not isinstance(model.base_model, peft.LoraModel):
        raise TypeError(f"merge_and_requantize: model: expected a PeftModel with LoRA, got {type(model).__name__}")
    # Each once: a name that is given twice would be added twice.
    chosen = None if adapter_names is None else list(dict.fromkeys(as_patterns(adapter_names)))
    if unknown := set(chosen or ()) - set(model.peft_config):
        raise ValueError(
            f"merge_and_requantize: adapter_names: expected some of {list(model.peft_config)}, got {unknown}"
        )
    parents: dict[int, int] = {}
    for parent in model.modules():
        for child in parent._modules.values():
            parents[id(child)] = parents.get(id(child), 0) + 1
    codes: list[tuple[_PackedModule, PackedWeight]] = []
    floats: list[BaseTunerLayer] = []
    report = ConvertReport()
    tuners: list[str] = []
    for name, layer in model.base_model.model.named_modules():
        # A layer inside another's (in MultiheadAttention) is merged with it.
        if not isinstance(layer, BaseTunerLayer) or any(name.startswith(f"{outer}.") for outer in tuners):
            continue
        tuners.append(name)
        if not isinstance(layer, LoraLayer):
            floats.append(layer)
            continue
        base = layer.get_base_layer()
        names = [a for a in (layer.active_adapters if chosen is None else chosen) if a in layer.lora_A]
        if names and parents[id(base)] > 1:
            raise ValueError(
                f"merge_and_requantize: layer {name!r}: expected a base layer of its own, got one that the model also "
                "runs elsewhere, without this adapter: keep the adapter"
            )
        if not isinstance(base, _PackedModule):
            floats.append(layer)
        elif names:
            packed, row = _merged(name, layer, base, names)
            codes.append((base, packed))
            report.modules.append(row)
    merged: list[BaseTunerLayer] = []
    try:
        for layer in floats:
            layer.merge(safe_merge=True, adapter_names=chosen)
            merged.append(layer)
    except BaseException:
        for layer in merged:
            layer.unmerge()
        raise
    for base, packed in codes:
        base._set_codes(packed.weight, packed.weight_exp, packed.weight_scale)
        base.prepack()
    return model.unload(), report


def _merged(name: str, layer: LoraLayer, base: nn.Module, adapters: list[str]) -> tuple[PackedWeight, Converted]:
    where = f"merge_and_requantize: layer {name!r}"
    if any(layer.use_dora.get(a) for a in adapters):
        raise ValueError(f"{where}: expected LoRA, got DoRA, whose sum is normalized")
    if variants := [v for a, v in getattr(layer, "lora_variant", {}).items() if a in adapters]:
        kind = variants[0].__name__ if isinstance(variants[0], type) else type(variants[0]).__name__
        raise ValueError(f"{where}: expected plain LoRA, whose product is added to the weight, got {kind}")
    if any(getattr(layer, "lora_bias", {}).get(a) for a in adapters):
        raise ValueError(f"{where}: expected adapters without a bias, got lora_bias=True")
    before = base.packed
    if tuple(getattr(base, "whole_shape", before.shape)) != tuple(before.shape):
        raise ValueError(f"{where}: expected a whole module, got a part of one that is split over processes")
    wanted = ops.unpack(before, torch.float32)
    for adapter in adapters:
        wanted += layer.get_delta_weight(adapter).to(wanted).view_as(wanted)
    scale = before.weight_scale
    target = wanted if scale is None else wanted / scale.view(-1, *[1] * (wanted.dim() - 1))
    w_hat, n1 = fit(where, target, base.format)
    packed = ops.pack(w_hat, base.format, n1)
    packed = PackedWeight(packed.weight, packed.weight_exp, scale, base.format, before.shape)
    sqnr = _sqnr(wanted, ops.unpack(packed, torch.float32))
    size = base.shape[0] * base.format.row_bytes(before.k) + base.weight_exp.nbytes
    return packed, Converted(name, type(base).__name__, True, size, size, "", base.format, sqnr)


def _sqnr(w: Tensor, w_hat: Tensor) -> float:
    w, w_hat = w.double(), w_hat.double()
    return sqnr_db(float(w.square().sum()), float((w - w_hat).square().sum()))
