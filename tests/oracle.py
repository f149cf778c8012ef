"""An independent oracle: INQ's definitions in exact fractions and Python integers, written from the paper.

Slow on purpose, and it shares nothing with the package: no logarithm, no frexp, no tensors. ``fmt`` may be anything
with ``bits`` and ``levels``; ``lo`` and ``hi`` are the least and the largest exponent of the weights' dtype.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from fractions import Fraction
from functools import cache
from itertools import pairwise

import torch

MAGNITUDES = {
    ("paper", 5): 8, ("paper", 4): 4, ("paper", 3): 2, ("paper", 2): 1,
    ("dense", 5): 15, ("dense", 4): 7, ("dense", 3): 3, ("dense", 2): 1,
}  # fmt: skip


def limits(dtype: torch.dtype) -> tuple[int, int]:
    """The least and the largest exponent a weight of ``dtype`` may have (DESIGN, section 1)."""
    return (-24, 15) if dtype == torch.float16 else (-126, 127)


def power(k: int) -> Fraction:
    return Fraction(2) ** k


def fractions(w: torch.Tensor) -> list[Fraction]:
    """The exact values of a tensor in flat order; every float is a fraction."""
    return [Fraction(v) for v in w.detach().double().reshape(-1).tolist()]


# --- equation (4) -----------------------------------------------------------------------------------------------------


@cache
def intervals(n1: int, magnitudes: int, lo: int) -> tuple[list[Fraction], list[Fraction]]:
    """Equation (4) as a step function of |W|: the lower ends of its intervals, ascending, and the value on each.

    For neighbours α < β in sorted P the interval (α + β)/2 <= |W| < 3β/2 gives β; below the first the value is 0.
    """
    n2 = n1 + 1 - magnitudes
    p = sorted([Fraction(0)] + [power(k) for k in range(n2, n1 + 1)])
    starts, values, end = [Fraction(0)], [Fraction(0)], None
    for alpha, beta in pairwise(p):
        assert end in (None, (alpha + beta) / 2)  # the intervals tile: each begins where the one before it ends
        starts.append((alpha + beta) / 2)
        # A level under the least exponent is written as 0 (DESIGN, section 1).
        values.append(beta if beta >= power(lo) else Fraction(0))
        end = 3 * beta / 2
    # The last interval is open: |W| >= 3/2·2^n1 saturates (DESIGN, section 2), where the literal (4) would give 0.
    return starts, values


def quantize(w: Fraction, n1: int, magnitudes: int, lo: int) -> Fraction:
    """The value that equation (4) gives a weight."""
    starts, values = intervals(n1, magnitudes, lo)
    value = values[bisect_right(starts, abs(w)) - 1]
    return -value if w < 0 else value


# --- n1 ---------------------------------------------------------------------------------------------------------------


def floor_log2(x: Fraction) -> int:
    """The largest k with 2^k <= x, by integers alone."""
    k = x.numerator.bit_length() - x.denominator.bit_length()
    return k if power(k) <= x else k - 1


def n1_max(row: list[Fraction], lo: int, hi: int) -> int:
    """Equation (2), n1 = floor(log2(4s/3)), within the limits; 0 for a row of zeros."""
    s = max(abs(w) for w in row)
    return min(max(floor_log2(4 * s / 3), lo), hi) if s else 0


def n1_mse(row: list[Fraction], magnitudes: int, lo: int, hi: int) -> int:
    """The n1 with the least exact squared error among the ``max`` rule's and the 8 below it; ties to the larger."""
    top = n1_max(row, lo, hi)

    def error(n1: int) -> Fraction:
        return sum(((w - quantize(w, n1, magnitudes, lo)) ** 2 for w in row), Fraction(0))

    candidates = range(top, max(top - 8, lo) - 1, -1)
    return min(candidates, key=error) if any(row) else 0


# --- partition --------------------------------------------------------------------------------------------------------


def frozen_after(w: list[Fraction], frozen: set[int], portion: float, kept: set[int] | None = None) -> set[int]:
    """The flat indices that are frozen once ``portion`` is: the largest |w|, ties to the lower index."""
    kept = set(range(len(w))) if kept is None else kept
    count = math.floor(portion * len(kept) + 0.5)
    order = sorted(kept - frozen, key=lambda i: (-abs(w[i]), i))
    return frozen | set(order[: count - len(frozen)])


def random_key(seed: int, index: int) -> int:
    """31 bits of splitmix64's output number ``index`` (from 0) for ``seed``: the rank in the random partition."""
    wrap = (1 << 64) - 1
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & wrap
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & wrap
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & wrap
    return (z ^ (z >> 31)) >> 33


# --- codes ------------------------------------------------------------------------------------------------------------


def code(value: Fraction, n1: int, bits: int, levels: str) -> int:
    """The code of 0 or ±2^k (DESIGN, section 1): sign << (b−1) | field."""
    if value == 0:
        return 0
    index = floor_log2(abs(value)) - (n1 + 1 - MAGNITUDES[levels, bits])
    assert abs(value) == power(index + n1 + 1 - MAGNITUDES[levels, bits])
    assert 0 <= index < MAGNITUDES[levels, bits]
    # paper: the flag "nonzero" above the index; dense: the index plus one.
    field = (1 << (bits - 2)) | index if levels == "paper" else index + 1
    return (1 << (bits - 1) | field) if value < 0 else field


def row_bytes(codes: list[int], bits: int) -> list[int]:
    """A row's codes as one little-endian bit stream, padded with zero codes to a multiple of eight codes."""
    stream = sum(c << (bits * i) for i, c in enumerate(codes))
    return list(stream.to_bytes(-(-len(codes) // 8) * bits, "little"))
