"""SGD and AdamW with the mask of frozen weights inside one fused step: ``inq.optim.SGD`` and ``inq.optim.AdamW``.

``inq.INQ`` works beside any torch optimizer by writing frozen weights back after each step. These need no writing
back: a weight whose bit is set in its parameter's mask keeps its bits, and so does its momentum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from . import ops
from .distributed import is_sharded, local_part

_op = torch.ops.inq


class MaskedOptimizer(torch.optim.Optimizer):
    """What SGD and AdamW share: masks by parameter, and one call of the fused step for all parameters alike.

    Parameters are float64, float32, bfloat16 or float16; state is float32, or float64 for float64 parameters. LR
    schedulers, GradScaler and hooks work as with any torch.optim.Optimizer. Masks are not part of ``state_dict``:
    who set them sets them again, as ``inq.INQ`` does. Parameters that are DTensors (FSDP2) have DTensors as state; the
    step and the masks are of each rank's own part.
    """

    # The tensors of a parameter's state that have its shape, by their names in torch.optim.
    _state_names: tuple[str, ...] = ()

    def __init__(self, params: Iterable, defaults: dict[str, Any]):
        self._masks: dict[Tensor, Tensor] = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """torch.optim.Optimizer's; a copy or an unpickled optimizer starts without masks."""
        super().__setstate__(state)
        self.__dict__.setdefault("_masks", {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch.optim.Optimizer's. TypeError for parameters that are not of the four float dtypes."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.dtype not in ops.FLOATS:
                self.param_groups.pop()
                raise TypeError(
                    f"{self._name()}: params: expected parameters of float64, float32, bfloat16 or float16, "
                    f"got {p.dtype} {list(p.shape)}"
                )

    def set_mask(self, param: Tensor, mask: Tensor | None) -> None:
        """Hold the weights of ``param`` whose bit is set, from now on.

        Args:
            param: one of the optimizer's parameters.
            mask: uint8 [ceil(numel/8)], bit i%8 of byte i//8 for flat index i (bits after the last weight do not
                matter); it is not copied if it is contiguous. None: all weights move. For a DTensor, of its local part.

        Raises:
            ValueError: ``param`` is not one of them, or the mask's size is another. TypeError: its dtype is.
        """
        if not any(p is param for p in self._params()):
            raise ValueError(f"{self._name()}.set_mask: param: expected one of the optimizer's, got another tensor")
        if mask is None:
            self._masks.pop(param, None)
            return
        if not isinstance(mask, Tensor) or mask.dtype != torch.uint8:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"{self._name()}.set_mask: mask: expected a uint8 tensor, got {got}")
        size = [(local_part(param).numel() + 7) // 8]
        if list(mask.shape) != size:
            raise ValueError(f"{self._name()}.set_mask: mask: expected shape {size}, got {list(mask.shape)}")
        if mask.device.type == "meta":
            raise ValueError(f"{self._name()}.set_mask: mask: expected one with values, got one on the meta device")
        self._masks[param] = mask.contiguous()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on all parameters that have a gradient; ``closure`` as in torch.optim. Returns the closure's value.

        Raises:
            RuntimeError: a gradient is sparse or of another dtype than its parameter, or the state is another
                optimizer's.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[tuple, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.layout != torch.strided:
                    raise RuntimeError(
                        f"{self._name()}: gradient of a parameter of shape {list(p.shape)}: expected a dense one, "
                        f"got {p.grad.layout}"
                    )
                if p.grad.dtype != p.dtype:
                    raise RuntimeError(
                        f"{self._name()}: gradient of a parameter of shape {list(p.shape)}: expected {p.dtype}, "
                        f"got {p.grad.dtype}"
                    )
                alike.setdefault((p.device, p.dtype, self._progress(p, group)), []).append(p)
            for (device, _, progress), params in alike.items():
                none = torch.empty(0, dtype=torch.uint8, device=device)
                masks = [self._mask(p, none) for p in params]
                self._step(group, progress, params, [p.grad for p in params], masks)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch.optim.Optimizer's, but state stays float32: torch would round that of 16-bit parameters to 16 bits.

        Raises:
            ValueError: the groups lack one of this optimizer's hyperparameters, or have others: another's state.
        """
        for group in state_dict["param_groups"]:
            if lacking := sorted(self.defaults.keys() - group.keys()):
                raise ValueError(f"{self._name()}.load_state_dict: expected a hyperparameter {lacking[0]!r}, got none")
            if group.get("amsgrad") or group.get("decoupled_weight_decay") is False:
                raise ValueError(
                    f"{self._name()}.load_state_dict: expected decoupled weight decay without amsgrad, got another"
                )
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for number, p in zip(numbers, self._params(), strict=True):
            for name in self._state_names:
                value = saved.get(number, {}).get(name)
                if value is not None and p.dtype != _state_dtype(p):
                    self.state[p][name] = value.to(p.device, _state_dtype(p), copy=True)

    def _progress(self, p: Tensor, group: dict[str, Any]) -> Any:
        """Makes the state of a new parameter; what of its state decides the step's numbers."""
        raise NotImplementedError

    def _step(
        self, group: dict[str, Any], progress: Any, params: list[Tensor], grads: list[Tensor], masks: list[Tensor]
    ) -> None:
        """The fused step on parameters of one device, dtype and ``_progress``."""
        raise NotImplementedError

    def _new_state(self, p: Tensor) -> Tensor:
        # Zeros: a frozen weight's state keeps what it is made with.
        return torch.zeros_like(p, dtype=_state_dtype(p), memory_format=torch.preserve_format)

    def _mask(self, p: Tensor, none: Tensor) -> Tensor:
        mask = self._masks.get(p)
        if mask is None:
            return none
        if mask.device != p.device:
            # model.to(device) moves parameters in place, under us.
            mask = self._masks[p] = mask.to(p.device)
        return mask

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _name(self) -> str:
        return f"inq.optim.{type(self).__name__}"


class SGD(MaskedOptimizer):
    """torch.optim.SGD's step, fused, with frozen weights held (see ``MaskedOptimizer``); the same names in its state.

    Args:
        params: parameters or parameter groups, as for any torch optimizer.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.

    Raises:
        ValueError: a number is out of its range, or ``nesterov`` is given without momentum or with dampening.
    """

    _state_names = ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable,
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ):
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            _check_at_least_zero(f"inq.optim.SGD: {name}", value)
        if nesterov and not (momentum > 0 and dampening == 0):
            raise ValueError(
                "inq.optim.SGD: nesterov: expected a momentum above 0 and dampening 0 with it, "
                f"got momentum {momentum} and dampening {dampening}"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _progress(self, p: Tensor, group: dict[str, Any]) -> bool:
        """Whether this is the first step with a momentum."""
        return bool(group["momentum"]) and self.state[p].get("momentum_buffer") is None

    def _step(self, group, progress, params, grads, masks):
        buffers = []
        if group["momentum"]:
            buffers = [self._new_state(p) if progress else self.state[p]["momentum_buffer"] for p in params]
        numbers = (float(group[name]) for name in ("lr", "momentum", "dampening", "weight_decay"))
        lists = _local_lists(params, grads, buffers, masks)
        _op.masked_sgd_(*lists, *numbers, group["nesterov"], group["maximize"], progress)
        if progress:  # only now: a step that failed has not been the first
            for p, buffer in zip(params, buffers, strict=True):
                self.state[p]["momentum_buffer"] = buffer


class AdamW(MaskedOptimizer):
    """torch.optim.AdamW's step, fused, with frozen weights held (see ``MaskedOptimizer``); the same names in its state.

    Args:
        params: parameters or parameter groups, as for any torch optimizer.
        lr, betas, eps, weight_decay, maximize: as in torch.optim.AdamW.

    Raises:
        ValueError: a number is out of its range.
    """

    _state_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
    ):
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            _check_at_least_zero(f"inq.optim.AdamW: {name}", value)
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"inq.optim.AdamW: betas: expected two numbers in [0, 1), got {betas}")
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    def _progress(self, p: Tensor, group: dict[str, Any]) -> int:
        """The number of this step, from 1."""
        state = self.state[p]
        missing = [name for name in ("step", *self._state_names) if name not in state]
        if missing and len(missing) <= len(self._state_names):
            raise RuntimeError(
                f"{self._name()}: state of a parameter of shape {list(p.shape)}: expected step, exp_avg "
                f"and exp_avg_sq, got no {missing[0]}: the state of another optimizer?"
            )
        if missing:
            # A tensor on the CPU, as torch.optim has it.
            state["step"] = torch.zeros(())
            for name in self._state_names:
                state[name] = self._new_state(p)
        return int(state["step"]) + 1

    def _step(self, group, progress, params, grads, masks):
        first, second = ([self.state[p][name] for p in params] for name in self._state_names)
        beta1, beta2 = group["betas"]
        numbers = (float(x) for x in (group["lr"], beta1, beta2, group["weight_decay"], group["eps"]))
        lists = _local_lists(params, grads, first, second, masks)
        _op.masked_adamw_(*lists, *numbers, progress, group["maximize"])
        torch._foreach_add_([self.state[p]["step"] for p in params], 1)


def _local_lists(params: list[Tensor], *others: list[Tensor]) -> list[list[Tensor]]:
    """Of DTensors what this process holds; without the parameters of which that is nothing. An empty list stays so."""
    if not any(map(is_sharded, params)):
        return [params, *others]
    some = [i for i, p in enumerate(params) if not is_sharded(p) or local_part(p).numel()]
    return [[local_part(each[i]) for i in some] if each else each for each in (params, *others)]


def _state_dtype(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _check_at_least_zero(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number ≥ 0, got {value}")
