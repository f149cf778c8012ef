"""Sparse codes as pairs of a gap and a code: the relative indices of Deep Compression (Han, Mao, Dally, ICLR 2016,
section 2 and figure 2), counted as in the released AlexNet's decode.py (songhan/Deep-Compression-AlexNet).

An entry is a gap of ``bits`` bits, the number of zeros before it, and a code. Where more zeros lie between two nonzero
codes than a gap can say, filler entries with the largest gap and code 0 stand among them. Zeros at the end have none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Entries:
    """``gaps`` and ``codes`` of each entry in order, int64; an entry with code 0 is a filler."""

    gaps: Tensor
    codes: Tensor

    @property
    def fillers(self) -> Tensor:
        """Which entries are fillers, bool."""
        return self.codes == 0


def encode(codes: Tensor, bits: int) -> Entries:
    """The entries of ``codes``, integers in flat order, 0 for a weight that is zero; gaps are below 2^bits."""
    codes = codes.reshape(-1).to(torch.int64)
    places = codes.nonzero().reshape(-1)
    zeros = places.diff(prepend=places.new_tensor([-1])) - 1
    # A filler takes 2^bits places: the zeros that it skips, and one that it stands on.
    fillers = zeros >> bits
    last = (fillers + 1).cumsum(0) - 1
    gaps = torch.full((int((fillers + 1).sum()),), (1 << bits) - 1, dtype=torch.int64, device=codes.device)
    gaps[last] = zeros & (1 << bits) - 1
    values = torch.zeros_like(gaps)
    values[last] = codes[places]
    return Entries(gaps, values)


def decode(entries: Entries, numel: int) -> Tensor:
    """The inverse of ``encode``: ``numel`` codes, int64."""
    codes = torch.zeros(numel, dtype=torch.int64, device=entries.codes.device)
    codes[(entries.gaps + 1).cumsum(0) - 1] = entries.codes
    return codes
