"""Means over the seeds with Student's t-interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit


@dataclass(frozen=True)
class Estimate:
    """A mean of ``n`` values, and half of its 95 % interval; None for a single value."""

    mean: float
    half: float | None
    n: int

    def text(self, digits: int = 2, signed: bool = False) -> str:
        """``0.70 ± 0.12``"""
        # "+ 0.0": no −0.00.
        mean = f"{round(self.mean, digits) + 0.0:{'+' if signed else ''}.{digits}f}".replace("-", "−")
        return mean if self.half is None else f"{mean} ± {self.half:.{digits}f}"

    def sign(self) -> int:
        """−1 or 1 if the whole interval is below or above 0, else 0; 0 without an interval."""
        if self.half is None or abs(self.mean) <= self.half:
            return 0
        return 1 if self.mean > 0 else -1


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of ``values``, m ± t·s/√n: s their sample standard deviation, t Student's 97.5 % quantile for n − 1."""
    n = len(values)
    half = None
    if n > 1:
        half = float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) / math.sqrt(n)
    return Estimate(statistics.fmean(values), half, n)


def paired(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """``first`` − ``second``, seed by seed: what the seeds have in common is not in it."""
    return estimate([a - b for a, b in zip(first, second, strict=True)])
