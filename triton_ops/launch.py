"""What every launcher here needs: whether kernels are interpreted, and the shapes of grids."""

from __future__ import annotations

import triton

# Triton reads TRITON_INTERPRET when a kernel is defined; kernels here are defined right after this.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    """The smallest multiple of b that is at least a."""
    return cdiv(a, b) * b
