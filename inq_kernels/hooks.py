"""What every run on a model's weights shares: which weights it takes, and how it hooks onto them and their optimizer.

``inq.INQ``, ``inq.DNS`` and the baselines work beside any torch optimizer: they change weights between its steps, and
the model stays a plain one. At most one of them holds a weight at a time.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from . import distributed, ops
from .nn import PACKED_TYPES, check_patterns, first_match

QUANTIZED_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

# The weights that some run's hooks are on, and the run's kind: a second run's work would be undone by the first one.
_held: MutableMapping[Tensor, str] = WeakIdKeyDictionary()


class Run(Protocol):
    """What ``inq.save_training`` needs of a run."""

    def state_dict(self) -> dict:
        """Tensors, numbers, strings, lists and dicts."""

    def check_state(self, state: Mapping) -> None:
        """Raise ValueError unless ``load_state_dict`` will take ``state``."""

    def load_state_dict(self, state: Mapping) -> None:
        """Go on from ``state``."""


def checked_model(who: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
    """The model itself, without DistributedDataParallel around it. TypeError unless both are what they are called."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"{who}: optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model: expected a torch.nn.Module, got {type(model).__name__}")
    if not hasattr(optimizer, "_optimizer_step_post_hooks"):
        # accelerate's AcceleratedOptimizer, for one: a subclass that is no optimizer by itself.
        raise TypeError(
            f"{who}: optimizer: expected the optimizer itself, got a wrapper of it, {type(optimizer).__name__}: "
            "pass what it wraps (its .optimizer)"
        )
    model = distributed.unwrapped(model)
    distributed.reshard(model)
    return model


def quantizable(model: nn.Module) -> dict[str, nn.Module]:
    """The convolutions and Linear modules that are not packed, by name."""
    packed = tuple(PACKED_TYPES.values())
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QUANTIZED_TYPES) and not isinstance(module, packed)
    }


def choose_weights(who: str, model: nn.Module, skip: Sequence[str]) -> dict[str, nn.Parameter]:
    """The weights of ``quantizable`` modules, shared ones once, under their first name.

    Raises:
        ValueError: a pattern matches nothing, no weight is left, or one cannot be worked on; the message names it.
    """
    modules = quantizable(model)
    check_patterns(f"{who}: skip", skip, modules)
    weights: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, module in modules.items():
        if first_match(skip, name):
            continue
        where = f"{who}: weight of layer {name!r}"
        weight = module._parameters.get("weight")
        if weight is None:
            raise ValueError(
                f"{where}: expected a parameter, got a value computed from others (pruning or a parametrization): "
                "remove that first, or skip the layer"
            )
        if isinstance(weight, UninitializedParameter):
            raise ValueError(f"{where}: expected an initialised weight: run one batch through the lazy module first")
        if weight.dtype not in ops.FLOATS or weight.device.type == "meta" or weight.numel() == 0:
            raise ValueError(
                f"{where}: expected a non-empty float weight on a real device, "
                f"got {weight.dtype} {list(weight.shape)} on {weight.device}"
            )
        if any(size > 1 and step == 0 for size, step in zip(weight.shape, weight.stride(), strict=True)):
            raise ValueError(f"{where}: expected a weight with memory of its own for each value, got an expanded one")
        if id(weight) in seen:
            continue
        if weight in _held:
            raise ValueError(
                f"{where}: expected a weight of no other run, got one of another {_held[weight]}: close() it first"
            )
        seen.add(id(weight))
        weights[name] = weight
    if not weights:
        raise ValueError(f"{who}: model: expected at least one Conv1d, Conv2d, Conv3d or Linear to quantize, got none")
    return weights


def choose_plain_weights(who: str, model: nn.Module, skip: Sequence[str]) -> dict[str, nn.Parameter]:
    """``choose_weights`` for what works on whole weights: ValueError also for DTensors, NaN and Inf."""
    weights = choose_weights(who, model, skip)
    for name, weight in weights.items():
        where = f"{who}: weight of layer {name!r}"
        if distributed.is_sharded(weight):
            raise ValueError(
                f"{where}: expected a plain tensor, got a DTensor: DistributedDataParallel works, FSDP2 does not"
            )
        ops.check_weight(where, weight)
    return weights


def check_attached(who: str, model: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
    """Raise unless the weights are still the model's: somebody may have put others in their place."""
    distributed.reshard(model)
    for name, weight in weights.items():
        module = model
        for part in name.split(".") if name else ():
            module = getattr(module, part, None)
        if getattr(module, "weight", None) is not weight:
            raise ValueError(
                f"{who}: weight of layer {name!r}: expected the Parameter of when the run was made, got another "
                f"(load_state_dict(assign=True), a new module, inq.convert?): make a new {who}"
            )


def warn_of_strangers(
    who: str,
    optimizer: torch.optim.Optimizer,
    weights: Mapping[str, nn.Parameter],
    what: str = "quantized",
    stacklevel: int = 3,
) -> None:
    """Weights that ``optimizer`` does not step are most likely a mistake; ``what`` becomes of them all the same."""
    ours = {id(p) for group in optimizer.param_groups for p in group["params"]}
    strangers = [name for name, weight in weights.items() if weight.requires_grad and id(weight) not in ours]
    if strangers:
        warnings.warn(
            f"{who}: optimizer: the weights of {strangers} are not among its parameters: they will be {what} "
            "but not retrained, and another optimizer could move them",
            stacklevel=stacklevel,
        )


def first_after_step(optimizer: torch.optim.Optimizer, hook: Callable[..., Any]) -> RemovableHandle:
    """Call ``hook(optimizer, args, kwargs)`` after every step, before the user's own hooks: an average of the weights,
    say, must not see what the step made of them before the run put it right."""
    handle = optimizer.register_step_post_hook(hook)
    optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)
    return handle


def hold(who: str, weights: Mapping[str, nn.Parameter]) -> None:
    """From now on ``choose_weights`` refuses these."""
    _held.update((weight, who) for weight in weights.values())


def release(weights: Mapping[str, nn.Parameter]) -> None:
    """Another run may take these weights."""
    for weight in weights.values():
        _held.pop(weight, None)


def layer_seed(seed: int, name: str) -> int:
    """63 bits. By name, so that skipping another layer changes nothing for this one."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


def check_keys(where: str, state: Mapping, keys: Sequence[str]) -> None:
    """ValueError unless ``state`` has all of ``keys``."""
    missing = [key for key in keys if key not in state]
    if missing:
        raise ValueError(f"{where}: expected a state with the keys {list(keys)}, got one without {missing}")
