"""Packed weights as FP8 e4m3 and back: one byte a weight and one scale a row.

e4m3 (torch.float8_e4m3fn) has the powers of two 2^-9 to 2^8, the lowest three as subnormals. Every format has at most
15 magnitudes, so each is exact; and so is a row scale where the weight's dtype holds it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..format import N1_MIN, Format
from ..ops import PackedWeight
from .mxfp4 import live_exponents

DTYPE = torch.float8_e4m3fn
_LOWEST, _HIGHEST = -9, 8
# float16 has no smaller power with which 2^-9 is its least subnormal, 2^-24.
_LEAST_FLOAT16 = -15


def why_not(fmt: Format, shape: tuple[int, ...], has_scale: bool) -> str | None:
    """Why a weight of that format and shape cannot be FP8 without loss: no reason is known without its values."""
    return None


def scale_exponents(n1: Tensor, dtype: torch.dtype) -> Tensor:
    """For rows of largest power ``n1`` the power of two that e4m3 values are relative to, as a number of ``dtype``."""
    return (n1.to(torch.int64) - _HIGHEST).clamp(min=_LEAST_FLOAT16 if dtype == torch.float16 else N1_MIN)


def encode(packed: PackedWeight, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(e4m3 values [N, K], scales [N, 1] of ``dtype``) of ``packed``: weight = value · scale of its row.

    Args:
        packed: of shape [N, K], in the storage layout.
        dtype: what the weights will be unpacked to, one of ``ops.FLOATS``.

    Raises:
        ValueError: ``dtype`` holds some row's scale not exactly, or a row scale is not positive, or an exponent is too
            small for ``dtype``.
    """
    fmt = packed.format
    codes = reference.unpack_codes(packed.weight, fmt.bits, packed.k)
    n1 = live_exponents(packed, codes)
    s = scale_exponents(n1, dtype)
    exact = reference._power(s)
    if packed.weight_scale is not None:
        if bad := int((packed.weight_scale <= 0).sum()):
            raise ValueError(f"expected row scales above 0, got {bad} of {packed.shape[0]} that are not")
        exact = exact * packed.weight_scale.double()
    scale = exact.to(dtype)
    if bad := int((scale.double() != exact).sum()):
        raise ValueError(f"expected row scales that {dtype} holds, got {bad} of {packed.shape[0]} that it would round")
    # Relative to 2^n1 a weight is 2^level; relative to 2^s it is 2^(level + n1 − s), by the table's row.
    shift = n1 - s
    least = int(shift.min())
    rows = torch.full((_HIGHEST + 1 - least, 1 << fmt.bits), torch.nan, dtype=torch.float64)
    for code, level in enumerate(fmt.code_levels):
        for row in range(rows.shape[0]):
            if level == 1:
                rows[row, code] = 0.0
            elif level is not None and _LOWEST <= level + least + row <= _HIGHEST:
                sign = -1.0 if code >> (fmt.bits - 1) else 1.0
                rows[row, code] = sign * 2.0 ** (level + least + row)
    index = ((shift - least) << fmt.bits) + codes
    if bad := int(rows.isnan().flatten()[index].sum()):
        raise ValueError(f"expected values within [2^{_LOWEST}, 2^{_HIGHEST}] of their row's scale, got {bad} others")
    table = rows.float().to(DTYPE).view(torch.uint8).flatten()
    return table[index].view(DTYPE), scale


def decode(values: Tensor, scales: Tensor) -> Tensor:
    """value · scale as float64 [N, K], exactly, of e4m3 values [N, K] and scales, of a float dtype: [N, 1] or [N, K/G]
    for groups of G, or of one element for all.

    Raises:
        ValueError: a value or a scale is NaN or Inf.
    """
    for name, tensor in (("values", values), ("scales", scales)):
        if bad := tensor.numel() - int(torch.isfinite(tensor.double()).sum()):
            raise ValueError(f"expected {name} that are finite, got {bad} of {tensor.numel()} that are not")
    wide = values.double()
    if scales.numel() == 1:
        return wide * scales.double().reshape(())
    return (wide.unflatten(1, (scales.shape[1], -1)) * scales.double()[:, :, None]).flatten(1)
