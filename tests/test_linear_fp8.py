"""linear_fp8: rows of x in e4m3 with a power-of-two scale each, and then the product of exactly those numbers."""

from bisect import bisect_left
from fractions import Fraction

import oracle
import pytest
import torch
import torch.nn.functional as F
from support import DTYPES, FORMATS, generator, integer_case, plain, random_packed, same_bits

import inq_kernels as inq
from inq_kernels.reference import quantize_rows_e4m3

FMT = inq.Format(4)
ops = torch.ops.inq

# e4m3: 4 bits of exponent (bias 7), 3 of mantissa, no infinities. Code 127 is NaN; a code c below has value E4M3[c].
E4M3 = [Fraction(c, 8) / 2**6 if c < 8 else (1 + Fraction(c % 8, 8)) * oracle.power(c // 8 - 7) for c in range(127)]


def round_e4m3(x):
    """To the nearest, ties to the even code; |x| is at most the largest."""
    above = bisect_left(E4M3, abs(x))
    if E4M3[above] != abs(x):
        distance = [abs(abs(x) - E4M3[c]) for c in (above - 1, above)]
        if distance[0] < distance[1] or (distance[0] == distance[1] and above % 2):
            above -= 1
    return -E4M3[above] if x < 0 else E4M3[above]


def expected_rows(x):
    """(values, t): the oracle's e4m3 numbers of each row and its scale 2^t, for finite x."""
    values, exponents = [], []
    for row in x:
        exact = oracle.fractions(row)
        largest, t = max(abs(v) for v in exact), 0
        if largest:
            t = oracle.floor_log2(448 / largest)
            t = min(max(t, -126), 126)
        values.append([float(round_e4m3(v * oracle.power(t))) for v in exact])
        exponents.append([t])
    return torch.tensor(values, dtype=torch.float64), torch.tensor(exponents)


def call(x, packed, bias=None):
    weights = (packed.weight, packed.weight_exp, packed.weight_scale)
    return ops.linear_fp8(x, *weights, bias, packed.format.bits, packed.format.levels, "storage", "")


def check(x, packed, bias=None):
    """Against float64: sums of K exact products in float32 lose at most K·2^-24 of the sum of their magnitudes."""
    values, t = expected_rows(x)
    x8 = values * torch.exp2(-t.double())
    w = inq.unpack(packed, torch.float64)
    b = torch.zeros(packed.shape[0]) if bias is None else bias
    exact = F.linear(x8, w, b.double())
    y = call(x, packed, bias)
    assert y.dtype == x.dtype
    # Two more roundings in float32 for the scale and the bias, and one to the dtype of y.
    magnitude = F.linear(x8.abs(), w.abs(), b.double().abs())
    finfo = torch.finfo(x.dtype)
    rounding = (exact.abs() * finfo.eps / 2).clamp(min=finfo.smallest_normal * finfo.eps / 2)
    allowed = (packed.k + 2) * 2.0**-24 * magnitude + rounding
    assert bool(((y.double() - exact).abs() <= allowed).all())


def test_the_oracle_itself():
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert oracle.fractions(codes.float()) == E4M3
    assert [round_e4m3(Fraction(v)) for v in ("17", "-19", "21.5", "0.0009", "0.001")] == [16, -20, 22, 0, E4M3[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_in_e4m3(dtype):
    x = torch.randn(8, 50, generator=generator(1)).to(dtype)
    # 448·2^k is the largest that fits; the number after it needs the next scale.
    x[0], x[1], x[2, 3], x[3, 5] = (
        0,
        x[1] * 1e-4,
        7.0,
        torch.tensor(7.0, dtype=dtype).nextafter(torch.tensor(8.0).to(dtype)),
    )
    values, t = quantize_rows_e4m3(x)
    expected, exponents = expected_rows(x)
    assert values.dtype == torch.float8_e4m3fn
    assert torch.equal(values.double(), expected)
    assert torch.equal(t.long(), exponents)
    assert t[[0, 2, 3]].view(-1).tolist() == [0, 6, 5]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_against_the_product_of_its_e4m3_rows(fmt, dtype):
    packed = random_packed(fmt, 9, 70, scale=True)
    x, bias = torch.randn(6, 70, generator=generator(2)), torch.randn(9, generator=generator(3))
    # float64 x is rounded to float32 first.
    check(x.to(dtype), packed, bias)
    check(x.to(dtype), plain(packed))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_small_integers_bit_for_bit(fmt):
    # Integers up to 16 are e4m3 numbers, so this is linear.
    packed = random_packed(fmt, 7, 30)
    x = integer_case(fmt, 30, (5, 30), torch.float32).clamp(-16, 16)
    assert torch.equal(call(x, packed), inq.linear(x, packed))


@pytest.mark.parametrize("shape", [(11,), (0, 11), (2, 3, 11)], ids=str)
def test_any_leading_shape(shape):
    packed = random_packed(FMT, 5, 11)
    x = torch.randn(shape)
    assert call(x, packed).shape == (*shape[:-1], 5)
    if x.dim() == 3:
        check(x.flatten(0, 1), packed)


def test_rows_of_zeros_are_the_bias():
    packed, bias = random_packed(FMT, 5, 11, scale=True), torch.randn(5)
    assert torch.equal(call(torch.zeros(2, 11), packed, bias), bias.expand(2, 5))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_spoils_no_other(value):
    # Weights without zeros, so that the value reaches every output.
    packed = inq.pack(torch.ones(5, 11), FMT)
    x = torch.randn(3, 11)
    expected = call(x, packed)
    x[1, 4] = value
    y = call(x, packed)
    assert not bool(y[1].isfinite().any())
    assert same_bits(y[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("size", [2.0**126, 2.0**100, 2.0**-100, 2.0**-117, 2.0**-130, 2.0**-149])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_huge_and_tiny_rows(dtype, size):
    # 2^-126 is the smallest scale: rows under 2^-117 lose bits in e4m3, and under 2^-136 they are 0.
    x = ((torch.rand(3, 20, generator=generator(4)) + 0.5) * size).to(dtype)
    check(x, random_packed(FMT, 5, 20, n1=-3))


@pytest.mark.parametrize(("n1", "size"), [(127, 2.0**-8), (127, 2.0**-100), (-126, 1.0), (-126, 2.0**120)])
def test_extreme_exponents(n1, size):
    # 2^n1 and the scale of the row meet in the product: neither alone may overflow or underflow.
    x, packed = torch.randn(3, 20, generator=generator(5)) * size, random_packed(inq.Format(3), 5, 20, n1=n1)
    assert bool(call(x, packed).isfinite().all())
    check(x, packed)


def test_not_rounded_twice_under_autocast():
    packed, x, bias = random_packed(FMT, 5, 40), torch.randn(6, 40), torch.randn(5)
    expected = call(x, packed, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(call(x, packed, bias), expected)


@pytest.mark.parametrize("shape", [(4, 13), (13,), (2, 3, 13), (0, 13)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, shape):
    packed = random_packed(FMT, 5, 13, scale=True)
    weights, tail = (packed.weight, packed.weight_exp), (4, "paper", "storage", "")
    x, bias = torch.randn(shape).to(dtype), torch.randn(5).to(dtype)
    torch.library.opcheck(ops.linear_fp8.default, (x, *weights, packed.weight_scale, bias, *tail))
    torch.library.opcheck(ops.linear_fp8.default, (x, *weights, None, None, *tail))
