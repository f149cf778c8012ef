"""Uniform symmetric integers: Krishnamoorthi, *Quantizing deep convolutional networks for efficient inference*, 2018
(arXiv 1806.08342), section 2.2, with the range that it restricts weights to.

w ≈ s·q, s = max|w| / (2^(b−1) − 1), q = round(w/s), ties to even, so |q| ≤ 2^(b−1) − 1 and 0 is exact. One s a tensor
or one a row. Rounding alone is ``straight_through.project_``, training is by the straight-through estimator.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..format import GRANULARITIES
from .meter import LayerSize, entropy_bits, fill
from .straight_through import per_row


@dataclass(frozen=True)
class Uniform:
    """The projection of a weight onto s·{−(2^(b−1) − 1), …, 2^(b−1) − 1}.

    Args:
        bits: b, 2 to 8.
        granularity: ``"tensor"``, one s for all rows, or ``"channel"``, one a row (dimension 0).

    Raises:
        ValueError: another value.
    """

    bits: int
    granularity: str = "tensor"

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or self.bits not in range(2, 9):
            raise ValueError(f"Uniform: bits: expected 2 to 8, got {self.bits!r}")
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"Uniform: granularity: expected one of {GRANULARITIES}, got {self.granularity!r}")

    @property
    def largest(self) -> int:
        """The largest q."""
        return (1 << (self.bits - 1)) - 1

    def __call__(self, weight: Tensor) -> Tensor:
        """s·q, a new tensor like ``weight``."""
        q, scale = self.split(weight)
        return (q * per_row(scale, weight)).to(weight.dtype)

    def split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """q and s, float64, q like ``weight`` and s [N] or [1]."""
        rows = weight.double().reshape(weight.shape[0] if self.granularity == "channel" else 1, -1)
        scale = rows.abs().amax(dim=1) / self.largest
        # Zeros divide by anything.
        q = (weight.double() / per_row(scale.where(scale > 0, 1.0), weight)).round()
        return q.clamp(-self.largest, self.largest), scale

    def size(self, name: str, weight: Tensor) -> LayerSize:
        """b bits a weight, and float32 scales."""
        q, scale = self.split(weight)
        bits = self.bits * weight.numel()
        return LayerSize(
            *(name, tuple(weight.shape), int((q != 0).sum()), entropy_bits(q)),
            codes=bits,
            padding=fill(bits),
            scales=32 * scale.numel(),
        )
