"""Ternary weight networks: Li, Liu, *Ternary Weight Networks*, 2016 (arXiv 1605.04711).

W ≈ α·t, t = sign(w) where |w| > Δ and 0 elsewhere; Δ = 0.7·E|W| approximates the threshold of least squared error, and
α = E(|w| : |w| > Δ) is exact for it. One Δ and one α a layer; the first and the last layer stay float as published
(``straight_through.first_and_last``), and training is by the straight-through estimator.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..ops import PackedWeight
from .meter import LayerSize, entropy_bits, fill
from .straight_through import pack_scaled


@dataclass(frozen=True)
class TWN:
    """The projection of a weight onto α·{−1, 0, 1}; ``delta`` is the factor of E|W|."""

    delta: float = 0.7

    def __call__(self, weight: Tensor) -> Tensor:
        """α·t, a new tensor like ``weight``."""
        signs, alpha = self.split(weight)
        return (signs * alpha).to(weight.dtype)

    def split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """t, like ``weight``, and α, a float64 scalar."""
        size = weight.abs().double()
        above = size > self.delta * size.mean()
        # A layer of zeros has nothing above.
        alpha = size.where(above, 0.0).sum() / above.sum().clamp(min=1)
        return weight.sign().where(above, 0.0), alpha

    def pack(self, weight: Tensor) -> PackedWeight:
        """f(``weight``) for ``inq.linear`` and the packed modules: 2-bit codes, α as the row scale."""
        signs, alpha = self.split(weight)
        return pack_scaled(signs, alpha)

    def size(self, name: str, weight: Tensor) -> LayerSize:
        """2 bits a weight, and one float32 α."""
        signs, bits = self.split(weight)[0], 2 * weight.numel()
        nonzero = int((signs != 0).sum())
        return LayerSize(
            name, tuple(weight.shape), nonzero, entropy_bits(signs), codes=bits, padding=fill(bits), scales=32
        )
