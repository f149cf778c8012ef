"""Training behind a projection: the model computes with f(W) while the optimizer steps W.

Between steps the model's weights are f(W), and W lies in the run; a step works on W with the gradients that were taken
at f(W). That is the straight-through estimator, and with f(W) = W ⊙ T the update of dynamic network surgery. Two hooks
on the optimizer do it, so that the modules, their parameters and their names stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import hooks
from .nn import as_patterns

STATE_VERSION = 1


class ProjectedRun:
    """What ``inq.DNS`` and ``baselines.StraightThrough`` share: everything but the projection, ``_project``.

    It works beside any torch optimizer, with LBFGS too: its closures see f(W). Under DistributedDataParallel every rank
    makes the run with the same arguments and does the same. W costs a copy of the weights. Between steps W is what
    counts: what somebody else writes into the weights is gone at the next step. If a step raises, the model has W until
    ``close`` or the next step, which begins where that one did (or where its closure was called last, as LBFGS does
    several times). A subclass calls ``_attach`` when it is ready.
    """

    # How errors name the run.
    _who = ""
    # What a subclass' ``state_dict`` has besides.
    _keys: tuple[str, ...] = ()

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, skip: str | Iterable[str] = ()):
        self.model = hooks.checked_model(self._who, model, optimizer)
        self.optimizer = optimizer
        self._weights = hooks.choose_plain_weights(self._who, self.model, as_patterns(skip))
        # W. The parameters themselves hold f(W), but for the time of a step.
        self._dense = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._handles: list[Any] = []
        # Whether the parameters hold W: in a step, and after one that raised.
        self._stepping = False

    def _project(self, name: str, dense: Tensor) -> Tensor:
        """f(W) of one layer, a new tensor like ``dense``."""
        raise NotImplementedError

    def _stepped(self) -> None:
        """After each step, when W is new."""

    def _attach(self) -> None:
        hooks.warn_of_strangers(self._who, self.optimizer, self._weights, "projected", stacklevel=4)
        # Before any hook: a projection that fails leaves nothing behind.
        try:
            self._put_projected()
        except BaseException:
            self._put_dense()
            raise
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            hooks.first_after_step(self.optimizer, self._after_step),
        ]
        hooks.hold(self._who, self._weights)

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the modules whose weights it works on."""
        return tuple(self._weights)

    def dense(self, name: str) -> Tensor:
        """W, which the optimizer steps, of the module ``name``; a copy. KeyError if it is not one of ``layers``."""
        if name not in self._weights:
            raise KeyError(f"{self._who}: expected one of the modules {list(self._weights)}, got {name!r}")
        self._check_open()
        self._follow()
        return self._dense[name].clone()

    def _follow(self) -> None:
        """``model.to(device)`` and ``model.to(dtype)`` change parameters in place, under us."""
        for name, weight in self._weights.items():
            self._dense[name] = self._dense[name].to(weight)

    @torch.no_grad()
    def _put_dense(self) -> None:
        self._follow()
        self._stepping = True
        for name, weight in self._weights.items():
            weight.copy_(self._dense[name])

    @torch.no_grad()
    def _take_dense(self) -> None:
        for name, weight in self._weights.items():
            self._dense[name].copy_(weight)

    @torch.no_grad()
    def _put_projected(self) -> None:
        self._follow()
        for name, weight in self._weights.items():
            weight.copy_(self._project(name, self._dense[name]))
        self._stepping = False

    def _before_step(self, _: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self._put_dense()
        # args[0] is the optimizer.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            return None
        if len(args) > 1:
            return (args[0], self._at_projected(closure), *args[2:]), kwargs
        return args, {**kwargs, "closure": self._at_projected(closure)}

    def _at_projected(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """``closure`` at f(W), amid a step, which works on W."""

        def wrapped() -> Any:
            self._take_dense()
            self._put_projected()
            try:
                return closure()
            finally:
                self._put_dense()

        return wrapped

    def _after_step(self, *_: Any) -> None:
        self._take_dense()
        self._stepped()
        self._put_projected()

    def close(self) -> None:
        """Take the hooks off the optimizer: the weights stay f(W) and are trained as any others. W is dropped. A second
        time it does nothing: another run may hold the weights by then."""
        if not self._handles:
            return
        if self._stepping:
            self._put_projected()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        hooks.release(self._weights)
        self._dense.clear()

    def _check_open(self) -> None:
        if not self._handles:
            raise RuntimeError(f"{self._who}: expected a run in use, got one that was closed")

    def _check_usable(self) -> None:
        self._check_open()
        hooks.check_attached(self._who, self.model, self._weights)

    def state_dict(self) -> dict:
        """All it takes to go on bit for bit; model and optimizer have their own. ``inq.save_training`` writes it."""
        self._check_usable()
        self._follow()
        return {
            "version": STATE_VERSION,
            "kind": self._who,
            "dense": {name: dense.clone() for name, dense in self._dense.items()},
        }

    def check_state(self, state: Mapping) -> None:
        """Raise ValueError unless ``state`` (of ``state_dict``) is of a run with these arguments on such a model."""
        self._check_usable()
        where = f"{self._who}.load_state_dict"
        hooks.check_keys(where, state, ("version", "kind", "dense", *self._keys))
        for key, value in (("version", STATE_VERSION), ("kind", self._who)):
            if state[key] != value:
                raise ValueError(f"{where}: {key}: expected {value!r}, got {state[key]!r}")
        if list(state["dense"]) != list(self._weights):
            raise ValueError(f"{where}: layers: expected {list(self._weights)}, got {list(state['dense'])}")
        for name, weight in self._weights.items():
            self._check_tensor(f"{where}: layer {name!r}: dense", state["dense"][name], weight)

    def _check_tensor(self, where: str, got: object, like: Tensor) -> None:
        if not isinstance(got, Tensor):
            raise ValueError(f"{where}: expected a tensor, got {got!r}")
        if got.dtype != like.dtype or got.shape != like.shape:
            raise ValueError(f"{where}: expected {like.dtype} {list(like.shape)}, got {got.dtype} {list(got.shape)}")

    def load_state_dict(self, state: Mapping) -> None:
        """Take over a ``state_dict`` and write f(W) into the model. Load the model and the optimizer too.

        Raises:
            ValueError: it belongs to another run; nothing is changed.
        """
        self.check_state(state)
        self._follow()
        for name, dense in self._dense.items():
            # Into the same memory: its strides decide the order of sums over it.
            dense.copy_(state["dense"][name])
        self._load(state)
        self._put_projected()

    def _load(self, state: Mapping) -> None:
        """What a subclass has besides, after ``check_state``."""
