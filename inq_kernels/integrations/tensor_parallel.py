"""Tensor parallelism of transformers ≥ 5.21, which cuts parameters into DTensors by a plan of layer styles.

Packed weights are cut like float ones: by rows, with their exponents, or, where the style is "rowwise", by columns.
Eight weights of a row are ``bits`` bytes, so columns are cut at multiples of eight. Row exponents belong to whole rows
then: the plan gets entries for them alone, of a style that cuts nothing.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from ..layouts import STORAGE
from ..nn import Linear
from ..ops import prepack

_ROW_PARTS = ("weight_exp", "weight_scale")
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


def world_size(model) -> int:
    """Over how many processes ``model`` is split by tensor parallelism."""
    settings = getattr(model.config, "distributed_config", None)
    return int(getattr(settings, "tp_size", None) or 1)


def keep_row_parts_whole(model, plan: dict[str, str]) -> None:
    """Extend ``plan``: exponents and scales of a layer that is cut by columns are every process's."""
    there = {_NUMBER.sub(".*", name) for name, _ in model.named_parameters()}
    names = [f"{name}.{part}" for name, style in plan.items() if _rowwise(style) for part in _ROW_PARTS]
    plan.update(dict.fromkeys((name for name in names if name in there), "replicate"))


def _rowwise(style: str) -> bool:
    return "rowwise" in style and not style.startswith("embedding")


def check_width(where: str, name: str, model, shape: tuple[int, ...], world: int) -> None:
    """A ValueError if the columns of a weight of ``shape`` cannot be cut for ``world`` processes."""
    if world == 1:
        return
    style = (model.tp_plan or {}).get(_NUMBER.sub(".*", name), "")
    if _rowwise(style) and shape[1] % (8 * world):
        raise ValueError(
            f"{where}: expected input features that are a multiple of {8 * world} for {world} processes, got {shape[1]}"
        )


class ShardedLinear(Linear):
    """``inq.Linear`` of which each process has a part: laid out for its kernels, and a DTensor again in ``state_dict``.

    Between construction and ``localize`` its parameters are what transformers makes of them.
    """

    _placed: dict[str, tuple] | None = None

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The logical shape of the weight over all processes."""
        return self.out_features, self.in_features

    def localize(self) -> None:
        """Keep this process's part of weight, exponents and scales, and remember of what it is a part."""
        from torch.distributed.tensor import DTensor

        parts = {name: getattr(self, name) for name in ("weight", *_ROW_PARTS)}
        placed = {}
        for name, tensor in parts.items():
            if isinstance(tensor, DTensor):
                placed[name] = (tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride())
                parts[name] = tensor.to_local()
        rows, columns = parts["weight"].shape[0], self.shape[1]
        if "weight" in placed and parts["weight"].shape[1] != placed["weight"][2][1]:
            columns = parts["weight"].shape[1] // self.format.bits * 8
        # Features are those of the whole layer: transformers gathers and splits activations by them.
        self.shape = (rows, columns)
        self._set_codes(*(None if t is None else t.detach() for t in parts.values()))
        self._placed = placed

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self._placed:
            return
        from torch.distributed.tensor import DTensor

        for name, (mesh, placements, shape, stride) in self._placed.items():
            local = prepack(self.packed, STORAGE).weight if name == "weight" else getattr(self, name)
            with torch.no_grad():
                whole = DTensor.from_local(
                    local.detach(), mesh, placements, run_check=False, shape=shape, stride=stride
                )
            destination[prefix + name] = nn.Parameter(whole, requires_grad=False) if keep_vars else whole

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        if self._placed:
            errors.append(f"{prefix}weight: expected from_pretrained for a module that is split over processes")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """As ``Linear.to_float``. Raises RuntimeError for a module that is split over processes."""
        if self._placed:
            raise RuntimeError("inq: to_float: expected a whole module, got a part of one that is split over processes")
        return super().to_float(dtype)
