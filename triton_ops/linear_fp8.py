"""``linear_fp8``: rows of x rounded to e4m3 with a power-of-two scale each, times weights that e4m3 holds exactly.

Tensor cores add e4m3 products to 14 bits; every 128 k their sum is added to one in float32, and begins anew. In tiles
of more than 32 rows on Hopper that is every 256 k: they have no registers for more (docs/performance.md).

On GPUs without e4m3 products (before sm_89) the same numbers are multiplied as float16: the same sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import slices
from ..format import Format
from . import checks, operands, storage
from .codec import DOT, power_of_two, widened
from .launch import INTERPRETED, on_device_of
from .linear import multiply

# Elements of a row at a time; a row is read twice, the second time from the cache.
_BLOCK = 1024
# sm_89, Ada, is the first with e4m3 tensor cores.
FIRST_E4M3 = 89


@triton.jit
def quantize_rows_kernel(x, values, exponents, K, stride_m, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    """reference.quantize_rows_e4m3, one row a program: values uint8 [M, K], the bits of e4m3, and exponents int32 [M].

    In integers, to nearest even: the same in the interpreter and on every GPU.
    """
    m = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, K, BLOCK):
        v = widened(tl.load(x + m * stride_m + start + i, mask=start + i < K, other=0), INTERPRETED)
        largest = tl.maximum(largest, v.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    bits = tl.max(largest, axis=0)
    # max = f·2^e, 1 ≤ f < 2. 448 = 1.75·2^8 is the largest finite e4m3 value, so t = 8 − e, one less for f > 1.75.
    t = 8 - ((bits >> 23) - 127) - tl.where((bits & 0x7FFFFF) > 0x600000, 1, 0)
    t = tl.minimum(tl.maximum(t, -126), 126)
    finite = bits < 0x7F800000
    t = tl.where(finite & (bits > 0), t, 0)
    tl.store(exponents + m, t)
    for start in range(0, K, BLOCK):
        inside = start + i < K
        v = widened(tl.load(x + m * stride_m + start + i, mask=inside, other=0), INTERPRETED) * power_of_two(t)
        sign = (v.to(tl.int32, bitcast=True) >> 31) & 1
        size = tl.abs(v)
        raw = size.to(tl.int32, bitcast=True)
        # From 2^-6 on: three bits of mantissa remain of 23, and the exponent's bias 127 becomes 7.
        normal = ((raw + 0x7FFFF + ((raw >> 20) & 1)) >> 20) - ((127 - 7) << 3)
        # Below: multiples of 2^-9. Adding 2^14 rounds to them, and their number is in the low bits.
        tiny = (size + 16384.0).to(tl.int32, bitcast=True) & 0xFF
        code = tl.where(size < 0.015625, tiny, normal) | (sign << 7)
        code = tl.where(finite, code, 0x7F)
        tl.store(values + m * K + start + i, code.to(tl.uint8), mask=inside)


def quantize_rows_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x [M, K], last stride 1, as e4m3: (float8_e4m3fn [M, K], int32 exponents t [M]); x ≈ values · 2^−t."""
    m, k = x.shape
    values = torch.empty(m, k, dtype=torch.uint8, device=x.device)
    exponents = torch.empty(m, dtype=torch.int32, device=x.device)
    if m:
        with on_device_of(x):
            quantize_rows_kernel[(m,)](x, values, exponents, k, x.stride(0), BLOCK=_BLOCK, INTERPRETED=INTERPRETED)
    return values.view(torch.float8_e4m3fn), exponents


def product_of(layout: str, capability: int) -> tuple[str, str]:
    """(the type of the products, the layout of the weights) on a kind of GPU, 90 for sm_90."""
    if capability >= FIRST_E4M3:
        return "e4m3", layout
    return "fp16", slices.FP16 if layout == slices.E4M3 else layout


def linear_fp8(x, weight, weight_exp, weight_scale, bias, bits, levels, layout, backend):
    fmt, k = Format(bits, levels), x.shape[-1] if x.dim() else 0
    n = checks.packed("linear_fp8", weight, weight_exp, weight_scale, k, fmt, layout)
    checks.rows("linear_fp8", "x", x, k, tuple(DOT), weight)
    checks.bias("linear_fp8", bias, n, weight)
    # Words of 16 bits that a module holds are converted in the kernel; others become e4m3's where that holds them.
    if layout == slices.E4M3 or (layout not in slices.LAYOUTS and slices.has(slices.E4M3, fmt)):
        weight, layout = storage.ready_as(weight, n, k, fmt, layout, slices.E4M3), slices.E4M3
    else:
        weight, layout = storage.ready(weight, n, k, fmt, layout, x.dtype)
    x8, t = quantize_rows_e4m3(operands.rows(x))
    dot = "e4m3"
    if INTERPRETED:
        x8 = x8.float()
    else:
        dot, wanted = product_of(layout, operands.capability(x.device))
        x8 = x8.to(torch.float16) if dot == "fp16" else x8
        weight, layout = storage.ready_as(weight, n, k, fmt, layout, wanted), wanted
    y = multiply(x8, t, weight, weight_exp, weight_scale, bias, fmt, layout, dot, x.dtype)
    return y.view(*x.shape[:-1], n)
