"""The operators of ``inq_kernels.library.SCHEMAS`` on Triton's kernels, by name."""

from __future__ import annotations

from collections.abc import Callable

from .linear import linear
from .linear_dx import linear_dx
from .linear_fp8 import linear_fp8

OPERATORS: dict[str, Callable] = {f.__name__: f for f in (linear, linear_dx, linear_fp8)}
