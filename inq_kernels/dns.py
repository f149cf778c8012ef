"""Dynamic network surgery: pruning with splicing, for ``inq.INQ`` on the weights that survive.

Guo, Yao, Chen, *Dynamic Network Surgery for Efficient DNNs*, NIPS 2016 (arXiv 1608.04493), and the authors' Caffe code
(yiwenguo/Dynamic-Network-Surgery), which fixes what the paper leaves open: how thresholds and probabilities are set.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import hooks
from .nn import check_patterns, first_match
from .projection import ProjectedRun
from .table import render

# The portions of INQ after surgery: finer, since few weights are left to make up for those that are frozen.
DNS_PORTIONS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Surgery:
    """One layer: ``kept`` of ``numel`` weights, its thresholds ``a`` and ``b``, how often its mask was updated, and how
    many weights that pruned and spliced back in all."""

    name: str
    shape: tuple[int, ...]
    kept: int
    numel: int
    a: float
    b: float
    updates: int
    pruned: int
    spliced: int


class SurgeryReport(list[Surgery]):
    """``Surgery`` for each layer; ``print`` it for a table."""

    def __str__(self) -> str:
        headers = ("layer", "shape", "kept", "of", "%", "a", "b", "updates", "pruned", "spliced")
        rows = [
            (
                *(r.name, "×".join(map(str, r.shape)), r.kept, r.numel, f"{100 * r.kept / r.numel:.1f}"),
                *(f"{r.a:.3g}", f"{r.b:.3g}", r.updates, r.pruned, r.spliced),
            )
            for r in self
        ]
        return render(headers, rows)


class _Layer:
    def __init__(self, weight: Tensor, c_rate: float, seed: int):
        self.a, self.b = thresholds(weight, c_rate)
        self.c_rate, self.seed = c_rate, seed
        self.mask = torch.ones_like(weight, dtype=torch.bool)
        self.updates = self.pruned = self.spliced = 0

    def update(self, dense: Tensor) -> None:
        """T: 0 under a, 1 from b on, as it was between them. And as it was for NaN, which must be seen, not pruned."""
        size, mask = dense.detach().abs(), self.mask.to(dense.device)
        new = (size >= self.b) | (mask & ~(size < self.a))
        self.pruned += int((mask & ~new).sum())
        self.spliced += int((new & ~mask).sum())
        self.updates += 1
        self.mask = new

    def draw(self, iteration: int) -> float:
        """In [0, 1), by the iteration: nothing to save, and the same on all ranks."""
        digest = hashlib.sha256(f"{self.seed}:{iteration}".encode()).digest()
        return (int.from_bytes(digest[:8], "little") >> 11) / 2.0**53

    def state_dict(self) -> dict:
        numbers = {"a": self.a, "b": self.b, "updates": self.updates, "pruned": self.pruned, "spliced": self.spliced}
        return {"mask": self.mask.clone(), **numbers}


def thresholds(weight: Tensor, c_rate: float) -> tuple[float, float]:
    """a and b: 0.9 and 1.1 × max(μ + c_rate·σ, 0), μ and σ of |w| over the weights that are not 0."""
    size = weight.detach().abs().double()
    size = size[size != 0]
    if not size.numel():
        return 0.0, 0.0
    middle = max(float(size.mean()) + c_rate * float(size.std(correction=0)), 0.0)
    return 0.9 * middle, 1.1 * middle


class DNS(ProjectedRun):
    """Prune the weights of ``model`` while ``optimizer`` trains them; what was pruned by mistake comes back.

    The model computes with W ⊙ T. Pruned weights receive gradients as the others do, and are spliced back once they
    have grown: T = 0 where |W| < a, 1 where |W| ≥ b, and as it was between. a and b are 0.9 and 1.1 ×
    max(μ + c_rate·σ, 0), with mean and standard deviation of |w| over a layer's nonzero weights, set once, now. T is
    updated now, and after step i of the optimizer with probability (1 + gamma·i)^−power, each layer for itself, until
    step ``iter_stop``; from then on it stays, and further training fits the weights that are left. ``finish()`` ends
    it; then INQ on the rest::

        run = inq.DNS(model, optimizer, c_rate=1.0, iter_stop=10_000)
        train(model, optimizer)
        masks = run.finish()
        run = inq.INQ(model, optimizer, fmt, inq.DNS_PORTIONS, prune_masks=masks)

    Beside any torch optimizer, on one process or in DistributedDataParallel. Biases are not pruned (the authors' code
    prunes them, which INQ would not use). Weight decay works on W, pruned weights included.

    Args:
        model: its Conv1d, Conv2d, Conv3d and Linear weights are pruned; shared weights once, under their first name.
        optimizer: any torch.optim.Optimizer, which may train other parameters as well.
        c_rate: how far above the mean weight the thresholds lie, in standard deviations; below 0: beneath it. The
            authors' example, the largest layer of LeNet-5, has 4.
        iter_stop: the number of the step after which T stays.
        overrides: c_rate by name pattern of modules (fnmatch); the first that matches wins.
        gamma, power: how the probability falls. The defaults are the authors'.
        skip: name patterns of modules to leave alone.
        seed: for the updates' lottery.

    Raises:
        TypeError, ValueError: an argument is not as above, no layer is left, a pattern matches nothing, a weight has
            NaN or Inf or is sharded (FSDP2), or a c_rate prunes all of a layer. Nothing is changed then.
    """

    _who = "inq.DNS"
    _keys = ("iteration", "iter_stop", "gamma", "power", "seed", "layers")

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        c_rate: float,
        *,
        iter_stop: int,
        overrides: Mapping[str, float] | None = None,
        gamma: float = 1e-4,
        power: float = 1.0,
        skip: str | Iterable[str] = (),
        seed: int = 0,
    ):
        overrides = {} if overrides is None else overrides
        if not isinstance(overrides, Mapping):
            raise TypeError(f"inq.DNS: overrides: expected a mapping from names, got {type(overrides).__name__}")
        rates = {"c_rate": c_rate, **{f"overrides[{pattern!r}]": rate for pattern, rate in overrides.items()}}
        for what, value in {**rates, "gamma": gamma, "power": power}.items():
            least = 0.0 if what in ("gamma", "power") else -math.inf
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"inq.DNS: {what}: expected a number, got {value!r}")
            if not (math.isfinite(value) and value >= least):
                raise ValueError(f"inq.DNS: {what}: expected a finite number{' ≥ 0' * (least == 0)}, got {value}")
        for what, value in (("iter_stop", iter_stop), ("seed", seed)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"inq.DNS: {what}: expected an int, got {value!r}")
        if iter_stop < 1:
            raise ValueError(f"inq.DNS: iter_stop: expected at least 1, got {iter_stop}")
        super().__init__(model, optimizer, skip)
        check_patterns("inq.DNS: overrides", overrides, hooks.quantizable(self.model))
        self.iter_stop, self.gamma, self.power = iter_stop, float(gamma), float(power)
        self.seed, self.iteration = seed, 0
        self._layers: dict[str, _Layer] = {}
        for name, dense in self._dense.items():
            pattern = first_match(overrides, name)
            rate = float(c_rate if pattern is None else overrides[pattern])
            layer = self._layers[name] = _Layer(dense, rate, hooks.layer_seed(seed, name))
            # The probability at iteration 0 is 1.
            layer.update(dense)
            if not layer.mask.any():
                raise ValueError(
                    f"inq.DNS: weight of layer {name!r}: expected some weight of at least {layer.b:.3g}, got none: "
                    f"c_rate {rate:g} prunes all {dense.numel()}"
                )
        self._attach()

    def probability(self, iteration: int) -> float:
        """That a layer's mask is updated after step ``iteration``: (1 + gamma·i)^−power, 0 from ``iter_stop`` on."""
        return (1 + self.gamma * iteration) ** -self.power if iteration < self.iter_stop else 0.0

    def _stepped(self) -> None:
        self.iteration += 1
        probability = self.probability(self.iteration)
        for name, layer in self._layers.items():
            if layer.draw(self.iteration) < probability:
                layer.update(self._dense[name])

    def _project(self, name: str, dense: Tensor) -> Tensor:
        # Not a product: −w·0 is −0, which is no code.
        return torch.where(self._layers[name].mask.to(dense.device), dense, 0.0)

    def masks(self) -> dict[str, Tensor]:
        """T of each layer as it is now, a bool tensor of the weight's shape, True = kept."""
        return {name: layer.mask.to(self._weights[name].device, copy=True) for name, layer in self._layers.items()}

    def finish(self) -> dict[str, Tensor]:
        """End the surgery: what is pruned now is 0 in the model, and nothing holds it there any more.

        Returns:
            The masks, as ``inq.INQ`` takes them (``prune_masks=``), which holds pruned weights at 0 from its first
            portion on.

        Raises:
            ValueError: a layer has no weight left; the run goes on then.
        """
        self._check_usable()
        masks = self.masks()
        if empty := [name for name, mask in masks.items() if not mask.any()]:
            raise ValueError(f"inq.DNS: weight of layer {empty[0]!r}: expected some weights to be kept, got none")
        self.close()
        return masks

    def report(self) -> SurgeryReport:
        """What is kept, a ``Surgery`` for each layer."""
        return SurgeryReport(
            Surgery(
                *(name, tuple(layer.mask.shape), int(layer.mask.sum()), layer.mask.numel()),
                *(layer.a, layer.b, layer.updates, layer.pruned, layer.spliced),
            )
            for name, layer in self._layers.items()
        )

    def state_dict(self) -> dict:
        """All it takes to go on bit for bit; model and optimizer have their own. ``inq.save_training`` writes it."""
        return {
            **super().state_dict(),
            "iteration": self.iteration,
            "iter_stop": self.iter_stop,
            "gamma": self.gamma,
            "power": self.power,
            "seed": self.seed,
            "layers": {name: layer.state_dict() for name, layer in self._layers.items()},
        }

    def check_state(self, state: Mapping) -> None:
        """Raise ValueError unless ``state`` (of ``state_dict``) is of a run with these arguments on such a model."""
        super().check_state(state)
        where = "inq.DNS.load_state_dict"
        for key in ("iter_stop", "gamma", "power", "seed"):
            if state[key] != getattr(self, key):
                raise ValueError(f"{where}: {key}: expected {getattr(self, key)!r}, got {state[key]!r}")
        if type(state["iteration"]) is not int or state["iteration"] < 0:
            raise ValueError(f"{where}: iteration: expected an int ≥ 0, got {state['iteration']!r}")
        if list(state["layers"]) != list(self._layers):
            raise ValueError(f"{where}: layers: expected {list(self._layers)}, got {list(state['layers'])}")
        for name, layer in self._layers.items():
            values = state["layers"][name]
            hooks.check_keys(f"{where}: layer {name!r}", values, tuple(layer.state_dict()))
            self._check_tensor(f"{where}: layer {name!r}: mask", values["mask"], layer.mask)
            for key in ("a", "b"):
                if not isinstance(values[key], float):
                    raise ValueError(f"{where}: layer {name!r}: {key}: expected a float, got {values[key]!r}")
            for key in ("updates", "pruned", "spliced"):
                if type(values[key]) is not int:
                    raise ValueError(f"{where}: layer {name!r}: {key}: expected an int, got {values[key]!r}")

    def _load(self, state: Mapping) -> None:
        self.iteration = state["iteration"]
        for name, layer in self._layers.items():
            values = state["layers"][name]
            layer.mask = values["mask"].to(self._weights[name].device, copy=True)
            # a and b are of the weights that the first process began with.
            layer.a, layer.b = values["a"], values["b"]
            layer.updates, layer.pruned, layer.spliced = (values[key] for key in ("updates", "pruned", "spliced"))
