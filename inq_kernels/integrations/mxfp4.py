"""Packed weights as MXFP4 and back: E2M1 codes, two a byte, and one E8M0 scale for each 32 of a row.

E2M1 (OCP Microscaling Formats, version 1.0) has the values 0, 0.5, 1, 1.5, 2, 3, 4 and 6 with a sign. Four of them are
powers of two, so a format of at most four magnitudes (paper levels at 2, 3 and 4 bits, dense ones at 2 and 3) is exact.
E8M0 is a biased exponent, 2^(byte − 127); byte 255 is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..format import N1_MIN, N1_MIN_FLOAT16, N1_ZERO_ROW, Format
from ..ops import PackedWeight

GROUP = 32
# The powers of two that E2M1 has are 2^-1 to 2^2; beside each its code.
_LOWEST, _HIGHEST = -1, 2
_CODES = {-1: 1, 0: 2, 1: 4, 2: 6}
MAGNITUDES = len(_CODES)
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS, _NAN = 127, 255
_SIGN = 8
_NO_CODE = 255


def why_not(fmt: Format, shape: tuple[int, ...], has_scale: bool) -> str | None:
    """Why a weight of that format and shape cannot be MXFP4 without loss, or None. Needs no values."""
    if fmt.magnitudes > MAGNITUDES:
        return (
            f"{fmt.bits}-bit {fmt.levels} levels have {fmt.magnitudes} magnitudes, "
            f"and a group of MXFP4 holds {MAGNITUDES} powers of two"
        )
    if has_scale:
        return "it has row scales (weight_scale), and MXFP4 has powers of two alone as scales"
    if shape[1] % GROUP:
        return f"its rows of {shape[1]} weights are no multiple of MXFP4's groups of {GROUP}"
    return None


def scale_exponents(n1: Tensor, dtype: torch.dtype) -> Tensor:
    """For rows of largest power ``n1`` (any integer tensor) the power of two that E2M1 values are relative to.

    It is n1 − 2, so that 2^n1 becomes 4, but never under the least power that ``dtype`` has (for float16 a subnormal):
    loaders compute with the scale as a number of that dtype, or of bfloat16.
    """
    return (n1.to(torch.int64) - _HIGHEST).clamp(min=N1_MIN_FLOAT16 if dtype == torch.float16 else N1_MIN)


def live_exponents(packed: PackedWeight, codes: Tensor) -> Tensor:
    """int64 [N, 1]: n1 of each row, and for rows of zeros, whose n1 may be anything, that of the neutral factor."""
    return torch.where((codes != 0).any(dim=1, keepdim=True), packed.weight_exp.to(torch.int64), N1_ZERO_ROW)


def _table(fmt: Format, device: torch.device) -> Tensor:
    """uint8 [_HIGHEST + 1, 2^bits]: for n1 − scale exponent and a code of ``fmt`` the E2M1 code, or _NO_CODE."""
    table = torch.full((_HIGHEST + 1, 1 << fmt.bits), _NO_CODE, dtype=torch.uint8)
    for code, level in enumerate(fmt.code_levels):
        for shift in range(_HIGHEST + 1):
            if level == 1:
                table[shift, code] = 0
            elif level is not None and _LOWEST <= level + shift <= _HIGHEST:
                table[shift, code] = _CODES[level + shift] | (_SIGN if code >> (fmt.bits - 1) else 0)
    return table.to(device)


def encode(packed: PackedWeight, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(E2M1 codes uint8 [N, K/2], the first of a pair in the low bits; E8M0 scales uint8 [N, K/32]) of ``packed``.

    Args:
        packed: of shape [N, K], in the storage layout, for which ``why_not`` has no reason.
        dtype: what the weights will be unpacked to.

    Raises:
        ValueError: an exponent is too small for ``dtype``.
    """
    fmt = packed.format
    codes = reference.unpack_codes(packed.weight, fmt.bits, packed.k)
    n1 = live_exponents(packed, codes)
    s = scale_exponents(n1, dtype)
    shift = n1 - s
    if bool((shift < 0).any()):
        raise ValueError(f"expected exponents of {dtype}, got {int(n1.min())}")
    nibbles = _table(fmt, codes.device).flatten()[(shift << fmt.bits) + codes]
    if bad := int((nibbles == _NO_CODE).sum()):
        raise ValueError(f"expected values within [0.5, 4] of their group's scale, got {bad} others")
    scales = (s + _BIAS).to(torch.uint8).expand(-1, packed.k // GROUP).contiguous()
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4, scales


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """The values, float64 [N, K], exactly, of E2M1 codes uint8 [N, K/2] and scales uint8 [N, K/32].

    Raises:
        ValueError: a scale is NaN.
    """
    if bad := int((scales == _NAN).sum()):
        raise ValueError(f"expected scales that are numbers, got {bad} NaN (255) of {scales.numel()}")
    table = torch.tensor([*_VALUES, *(-v for v in _VALUES)], dtype=torch.float64, device=codes.device)
    values = table[torch.stack((codes & 15, codes >> 4), dim=2).flatten(1).int()]
    factors = reference._power(scales.to(torch.int64) - _BIAS)
    return (values.unflatten(1, (-1, GROUP)) * factors[:, :, None]).flatten(1)
