"""The number formats: which values a weight may take and which bits name them. Standard library only.

A format has ``bits`` b and ``magnitudes`` m: a row of weights with exponent n1 may hold 0 and ±2^k for
n2 ≤ k ≤ n1, n2 = n1 + 1 − m (INQ paper, equations 1 to 3). A *code* is one weight's b bits, ``sign << (b−1) | field``.
Everything that encodes or decodes reads its table from here, so a new kind of levels is one entry in ``_FIELDS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

BITS = (2, 3, 4, 5)
GRANULARITIES = ("tensor", "channel")
EXPONENT_RULES = ("max", "mse")

# n1 is stored in int8 and every level must be a normal float32 (and bfloat16) number.
N1_MIN, N1_MAX = -126, 127
# fp16 weights: 2^-24 is the smallest subnormal, 2^15 the largest power of two.
N1_MIN_FLOAT16, N1_MAX_FLOAT16 = -24, 15
# n1 of a row without a nonzero weight: 2^0, the neutral factor of the epilogue.
N1_ZERO_ROW = 0
# The "mse" rule looks this many octaves below the "max" rule.
MSE_OCTAVES = 8

# levels -> (bits -> the field of each magnitude, smallest first). Field 0 is the value 0 in every kind of levels.
_FIELDS: dict[str, Callable[[int], range]] = {
    # Top bit of the field says "nonzero", the others are the exponent index e: value ±2^(n2+e).
    "paper": lambda bits: range(1 << (bits - 2), 1 << (bits - 1)),
    # Every nonzero field is a magnitude: value ±2^(n2+field−1).
    "dense": lambda bits: range(1, 1 << (bits - 1)),
}
LEVELS = tuple(_FIELDS)


@dataclass(frozen=True)
class Format:
    """How a weight tensor is quantized and stored: P = {±2^n1, …, ±2^n2, 0} of equation (1) for each row.

    Args:
        bits: storage bits a weight: 2, 3, 4 or 5.
        levels: ``"paper"``, 2^(bits−2) magnitudes as in the INQ paper (8, 4, 2, 1 at 5, 4, 3, 2 bits), or ``"dense"``,
            2^(bits−1) − 1 magnitudes (15, 7, 3, 1).
        granularity: ``"tensor"``, one exponent n1 for all rows (the paper), or ``"channel"``, one a row (dimension 0).
        exponent: the rule that picks n1: ``"max"``, from max|W| (the paper, equation 2), or ``"mse"``, the n1 with
            the least squared error, larger weights saturating.

    Raises:
        ValueError: a value outside these lists. TypeError: ``bits`` is not an int.
    """

    bits: int
    levels: str = "paper"
    granularity: str = "tensor"
    exponent: str = "mse"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int):
            raise TypeError(f"Format: bits: expected an int, got {self.bits!r}")
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"Format: {name}: expected one of {allowed}, got {value!r}")

    @classmethod
    def paper(cls, bits: int) -> Format:
        """The strict paper: its levels, one n1 a layer, n1 from max|W|."""
        return cls(bits, levels="paper", granularity="tensor", exponent="max")

    @cached_property
    def fields(self) -> tuple[int, ...]:
        """The field of each magnitude, smallest first: magnitude i is 2^(n2 + i)."""
        return tuple(_FIELDS[self.levels](self.bits))

    @property
    def magnitudes(self) -> int:
        """How many powers of two a weight may take: 8/4/2/1 (paper) or 15/7/3/1 (dense) at 5/4/3/2 bits."""
        return len(self.fields)

    def n2(self, n1: int) -> int:
        """The smallest power of a row whose largest is ``n1`` (equation 3 of the paper)."""
        return n1 + 1 - self.magnitudes

    @cached_property
    def code_levels(self) -> tuple[int | None, ...]:
        """For each of the 2^bits codes: k − n1 of its magnitude 2^k (≤ 0), 1 for zero, None if it is not canonical.

        Zero is all bits 0; a negative zero or a field that names no magnitude is not canonical.
        """
        levels: list[int | None] = [None] * (1 << self.bits)
        levels[0] = 1
        for index, field in enumerate(self.fields):
            for sign in (0, 1):
                levels[sign << (self.bits - 1) | field] = index + 1 - self.magnitudes
        return tuple(levels)

    def row_bytes(self, k: int) -> int:
        """Bytes of one row of ``k`` codes in the storage layout: codes padded with zero to a multiple of 8."""
        return (k + 7) // 8 * self.bits

    def __str__(self) -> str:
        return f"{self.bits}-bit {self.levels}, n1 by {self.exponent} a {self.granularity}"


_CHOICES = {"bits": BITS, "levels": LEVELS, "granularity": GRANULARITIES, "exponent": EXPONENT_RULES}


def frozen_count(portion: float, numel: int) -> int:
    """How many of ``numel`` weights are frozen once the accumulated portion is ``portion``: exact, cumulative."""
    return math.floor(portion * numel + 0.5)
