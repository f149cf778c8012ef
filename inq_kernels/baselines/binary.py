"""Binary weight networks: Rastegari, Ordonez, Redmon, Farhadi, *XNOR-Net*, ECCV 2016 (arXiv 1603.05279), section 3.1.

W ≈ α·B for each output filter, B = sign(w), α = ‖W‖₁/n over its n weights: the least squared error.
The first and the last layer stay float as published (``straight_through.first_and_last``). Training is the paper's
algorithm 1: the gradient ∂C/∂W̃ of the binary weights updates W. (Its equation for ∂C/∂W multiplies that with
1/n + α·1{|w| ≤ 1}, and the released Torch code (allenai/XNOR-Net, util.lua) with n·(1 − 1/c) times as much, c the input
channels. Algorithm 1 is what later comparisons train by, and needs no other learning rate than float weights do.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import PackedWeight
from .meter import LayerSize, entropy_bits, fill
from .straight_through import pack_scaled, per_row


@dataclass(frozen=True)
class BWN:
    """The projection of each row of a weight onto α·{−1, 1}; 0 counts as positive."""

    def __call__(self, weight: Tensor) -> Tensor:
        """α·B, a new tensor like ``weight``."""
        signs, alpha = self.split(weight)
        return (signs * per_row(alpha, weight)).to(weight.dtype)

    def split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """B, like ``weight``, and α of each row, float64 [N]."""
        alpha = weight.abs().double().flatten(1).mean(dim=1)
        return torch.where(weight < 0, -1.0, 1.0).to(weight.dtype), alpha

    def pack(self, weight: Tensor) -> PackedWeight:
        """f(``weight``) for ``inq.linear`` and the packed modules: 2-bit codes, α as the row scale."""
        return pack_scaled(*self.split(weight))

    def size(self, name: str, weight: Tensor) -> LayerSize:
        """1 bit a weight, and a float32 α for each row."""
        bits = weight.numel()
        return LayerSize(
            *(name, tuple(weight.shape), int((self(weight) != 0).sum()), entropy_bits(weight < 0)),
            codes=bits,
            padding=fill(bits),
            scales=32 * weight.shape[0],
        )
