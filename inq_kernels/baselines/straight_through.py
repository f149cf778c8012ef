"""What TWN, BWN and uniform integers share: a ``Method`` and training by the straight-through estimator.

Float weights are kept; forward and backward passes use their projection f(W), and its gradient ∂L/∂f(W) updates W as if
it were W's own: BinaryConnect (Courbariaux, Bengio, David, NIPS 2015, algorithm 1), by which TWN (Li, Liu, arXiv
1605.04711) and BWN (Rastegari et al., *XNOR-Net*, ECCV 2016, algorithm 1) train too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from .. import hooks
from ..format import Format
from ..nn import as_patterns
from ..ops import PackedWeight, pack
from ..projection import ProjectedRun
from .meter import LayerSize


class Method(Protocol):
    """A quantizer of weights: a projection, f(f(W)) = f(W), and what f(W) costs."""

    def __call__(self, weight: Tensor) -> Tensor:
        """f(W), a new tensor like ``weight`` [N, …]."""

    def size(self, name: str, weight: Tensor) -> LayerSize:
        """The size of f(``weight``) as the weight of module ``name``."""


def _check_method(who: str, method: object) -> None:
    # A class is callable too: TWN(W) would be a TWN whose factor is W.
    if isinstance(method, type) or not callable(method) or not hasattr(method, "size"):
        got = f"the class {method.__name__} itself" if isinstance(method, type) else repr(method)
        raise TypeError(f"{who}: method: expected a quantizer of weights, TWN() for one, got {got}")


class StraightThrough(ProjectedRun):
    """Train ``model`` with the weights f(W): between steps they are in the model, and W is in the run.

    Args:
        model: its Conv1d, Conv2d, Conv3d and Linear weights are projected.
        optimizer: any torch.optim.Optimizer. It steps W, so momenta and weight decay are W's.
        method: the projection: ``TWN()``, ``BWN()``, ``Uniform(bits)``.
        skip: name patterns of modules to leave float; ``first_and_last(model)`` as TWN and BWN are published.

    Raises:
        TypeError, ValueError: as ``inq.DNS``.
    """

    _who = "baselines.StraightThrough"
    _keys = ("method",)

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, method: Method, skip: str | Iterable[str] = ()
    ):
        _check_method(self._who, method)
        super().__init__(model, optimizer, skip)
        self.method = method
        self._attach()

    def _project(self, name: str, dense: Tensor) -> Tensor:
        return self.method(dense)

    def sizes(self) -> list[LayerSize]:
        """The size of each projected weight, for ``meter.measure``. RuntimeError once the run is closed."""
        self._check_usable()
        self._follow()
        return [self.method.size(name, self.method(dense)) for name, dense in self._dense.items()]

    def state_dict(self) -> dict:
        """All it takes to go on bit for bit; model and optimizer have their own. ``inq.save_training`` writes it."""
        return {**super().state_dict(), "method": repr(self.method)}

    def check_state(self, state: Mapping) -> None:
        """Raise ValueError unless ``state`` (of ``state_dict``) is of a run with these arguments on such a model."""
        super().check_state(state)
        if state["method"] != repr(self.method):
            raise ValueError(f"{self._who}.load_state_dict: method: expected {self.method!r}, got {state['method']!r}")


@torch.no_grad()
def project_(model: nn.Module, method: Method, skip: str | Iterable[str] = ()) -> list[LayerSize]:
    """f(W) into ``model``, without any training: what rounding alone does. The sizes, for ``meter.measure``."""
    _check_method("baselines.project_", method)
    sizes = []
    for name, weight in hooks.choose_plain_weights("baselines.project_", model, as_patterns(skip)).items():
        weight.copy_(method(weight.detach()))
        sizes.append(method.size(name, weight.detach()))
    return sizes


def first_and_last(model: nn.Module) -> tuple[str, ...]:
    """The names of the first and the last convolution or Linear module, in the order in which they are registered."""
    names = list(hooks.quantizable(model))
    return tuple(dict.fromkeys([*names[:1], *names[-1:]]))


def per_row(values: Tensor, weight: Tensor) -> Tensor:
    """``values`` [N] in a shape that multiplies the rows of ``weight`` [N, …]."""
    return values.view(-1, *[1] * (weight.dim() - 1))


def pack_scaled(signs: Tensor, scale: Tensor) -> PackedWeight:
    """Weights ``signs``·``scale``, −1, 0 and 1 times one factor a row, for ``inq.linear`` and the packed modules: 2-bit
    codes with the factor as row scale."""
    packed = pack(signs, Format(2), torch.zeros(signs.shape[0], 1, dtype=torch.int8, device=signs.device))
    row_scale = scale.float().expand(signs.shape[0]).reshape(-1, 1).contiguous()
    return PackedWeight(packed.weight, packed.weight_exp, row_scale, packed.format, packed.shape)
