"""The compiled CPU library's products against the reference: on every instruction set, thread count and format."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import FORMATS, assert_as_good_as_dense, generator, integer_case, plain, random_packed, same_bits

import inq_kernels as inq
from inq_kernels import reference

torch.ops.load_library(str(Path(inq.__file__).parent / "_cpu.so"))
ops = torch.ops.inq_cpu

ALL_ISAS = ("portable", "avx2", "avx512", "amx")
ISAS = ALL_ISAS[: ALL_ISAS.index(ops.detected_isa()) + 1]
DTYPES = (torch.float32, torch.bfloat16)
FMT = inq.Format(4)
ROWS = (0, 1, 2, 3, 7, 16, 33, 130, 300)
# N, K: around 16 columns of a panel, 32 k of a tile and the ends of rows, and past a chunk of K.
SHAPES = ((1, 1), (15, 31), (16, 32), (17, 33), (31, 16), (33, 17), (100, 257), (257, 100), (32, 600), (600, 15))

every_isa = pytest.mark.parametrize("isa", ISAS)
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pytestmark = pytest.mark.usefixtures("native_as_before")


def tail(fmt):
    return fmt.bits, fmt.levels == "dense"


def prepacked(packed):
    fmt = packed.format
    k = math.prod(packed.shape[1:])
    return ops.prepack(packed.weight, k, *tail(fmt)), packed.weight_exp, packed.weight_scale


def linear(x, packed, bias=None):
    return ops.linear(x, *prepacked(packed), bias, *tail(packed.format))


def expected(x, packed, bias=None):
    return reference.linear(x, packed.weight, packed.weight_exp, packed.weight_scale, bias, packed.format)


# --- the layout -------------------------------------------------------------------------------------------------------


def cpu16(codes, fmt):
    """The layout in plain Python from its description (csrc/cpu/layout.h): a list of bytes a tile."""
    n, k = codes.shape
    tiles = []
    for panel, tile in itertools.product(range(-(-n // 16)), range(-(-k // 32))):
        words = [0] * (80 if fmt.bits == 5 else 64)
        for lane, at in itertools.product(range(16), range(32)):
            row, column = panel * 16 + lane, tile * 32 + at
            if row >= n or column >= k:
                continue
            code = int(codes[row, column])
            sign, field = code >> (fmt.bits - 1), code & ((1 << (fmt.bits - 1)) - 1)
            nibble = field if fmt.bits == 5 else sign << 3 | field
            words[at // 8 * 16 + lane] |= nibble << (at % 8 // 2 * 4 + at % 2 * 16)
            if fmt.bits == 5:
                words[64 + lane] |= sign << ((31 if at % 2 else 15) - at // 2)
        tiles.append([word >> shift & 0xFF for word in words for shift in (0, 8, 16, 24)])
    return torch.tensor(tiles, dtype=torch.uint8).view(-(-n // 16), -(-k // 32), -1)


@every_format
@pytest.mark.parametrize(("n", "k"), [(1, 1), (17, 33), (16, 64), (5, 100), (40, 7)])
def test_prepack_is_the_layout(fmt, n, k):
    packed = random_packed(fmt, n, k)
    codes = reference.unpack_codes(packed.weight, fmt.bits, k)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        weight = ops.prepack(packed.weight, k, *tail(fmt))
        assert torch.equal(weight, cpu16(codes, fmt))
        assert torch.equal(ops.unprepack(weight, n, k, *tail(fmt)), packed.weight)


@every_format
def test_unprepack_gives_every_byte_back(fmt):
    # Any bytes at all, reserved codes included.
    stored = torch.randint(0, 256, (37, fmt.row_bytes(96)), dtype=torch.uint8, generator=generator())
    weight = ops.prepack(stored, 96, *tail(fmt))
    assert torch.equal(ops.unprepack(weight, 37, 96, *tail(fmt)), stored)


# --- linear -----------------------------------------------------------------------------------------------------------


@every_isa
@every_format
def test_integers_bit_for_bit(fmt, isa):
    ops.set_isa(isa)
    for seed, (n, k) in enumerate(SHAPES):
        packed = random_packed(fmt, n, k, scale=True, seed=seed)
        bias = torch.randint(-9, 9, (n,), generator=generator(seed)).float()
        for m, dtype in itertools.product(ROWS, DTYPES):
            x = integer_case(fmt, k, (m, k), dtype, seed)
            want = expected(x, packed, bias)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(linear(x, packed, bias), want), (n, k, m, dtype, threads)


@every_isa
@every_dtype
@every_format
def test_as_good_as_dense_and_the_same_for_all_threads(fmt, dtype, isa):
    ops.set_isa(isa)
    for seed, (n, k) in enumerate(SHAPES):
        packed = random_packed(fmt, n, k, scale=seed % 2 == 1, seed=seed)
        for m in ROWS:
            x = torch.randn(m, k, generator=generator(seed)).to(dtype)
            bias = torch.randn(n, generator=generator(seed)) if seed % 3 else None
            torch.set_num_threads(1)
            y = linear(x, packed, bias)
            w = inq.unpack(packed, torch.float64)
            exact = F.linear(x.double(), w, None if bias is None else bias.double())
            # Torch's product, and scale and bias in float32 as the contract has them: where the bias cancels most of
            # the product, what either rounds away in between is more than the result's own rounding.
            dense = F.linear(x, inq.unpack(plain(packed), torch.float64).to(dtype)).float()
            if packed.weight_scale is not None:
                dense = dense * packed.weight_scale.view(-1)
            if bias is not None:
                dense = dense + bias
            assert_as_good_as_dense(y, exact, dense.to(dtype), torch.exp2(packed.weight_exp.double()).view(-1))
            for threads in (2, 3):
                torch.set_num_threads(threads)
                assert same_bits(linear(x, packed, bias), y), (n, k, m, threads)


@every_isa
@every_dtype
def test_a_row_does_not_depend_on_the_others(dtype, isa):
    ops.set_isa(isa)
    packed = random_packed(FMT, 70, 600, scale=True)
    x = torch.randn(300, 600, generator=generator()).to(dtype)
    whole = linear(x, packed)
    for first, last in ((0, 1), (5, 7), (10, 14), (100, 112), (3, 27), (20, 53), (100, 230)):
        assert same_bits(linear(x[first:last], packed), whole[first:last])


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16], ids=str)
def test_any_bias(dtype, isa):
    ops.set_isa(isa)
    packed = random_packed(FMT, 33, 40, scale=True)
    x = integer_case(FMT, 40, (5, 40), torch.float32)
    bias = torch.randn(66, generator=generator()).to(dtype)[::2]
    assert torch.equal(linear(x, packed, bias), expected(x, packed, bias))


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa in ("portable", "avx2", "avx512")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv2d_in_place_or_packed(dtype, isa):
    """Rows that are not aligned to dwords are packed, others are multiplied where they are: the same bits."""
    ops.set_isa(isa)
    for shape, w_shape, *arguments in CONVOLUTIONS.values():
        packed = random_packed(FMT, *w_shape)
        x = torch.randn(shape, generator=generator()).to(dtype, memory_format=torch.channels_last)
        memory = torch.empty(x.numel() + 1, dtype=dtype)
        aside = memory[1:].as_strided(x.shape, x.stride(), 1)
        aside.copy_(x)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert same_bits(conv2d(aside, packed, None, arguments), conv2d(x, packed, None, arguments))


@every_isa
@every_dtype
def test_any_strides_and_leading_shape(dtype, isa):
    ops.set_isa(isa)
    packed = random_packed(FMT, 17, 8)
    base = integer_case(FMT, 8, (8, 16), dtype)
    views = (base.T, base[:, ::2], base.view(2, 8, 8).transpose(0, 1), base[:, :8].flip(1), base[:1, :8].expand(3, 8))
    for x in (*views, base[0, :8], base[:, :8].unsqueeze(1), base[:, 1:9], base[:0, :8].unsqueeze(0)):
        y = linear(x, packed)
        assert y.shape == (*x.shape[:-1], 17)
        assert torch.equal(y, expected(x, packed))


@every_isa
@every_dtype
@pytest.mark.parametrize("m", [1, 4, 40])
def test_extreme_exponents_and_scales(dtype, m, isa):
    # Each row its own n1 over the whole range; n1 = 127 with scale 2^-30 overflows where factors are combined wrongly.
    ops.set_isa(isa)
    n, k = 40, 70
    n1 = torch.linspace(-126, 127, n).round().to(torch.int8).view(-1, 1)
    n1[:3] = 126
    packed = random_packed(FMT, n, k, n1=n1)
    scale = torch.ones(n, 1)
    scale[0], scale[1], scale[-1] = 2.0**40, -(2.0**-30), 2.0**-100
    packed = inq.PackedWeight(packed.weight, packed.weight_exp, scale, FMT, packed.shape)
    x = integer_case(FMT, k, (m, k), dtype)
    want = expected(x, packed)
    assert bool(want.isinf().any())
    assert torch.equal(linear(x, packed), want)


@every_isa
@every_dtype
@pytest.mark.parametrize("m", [1, 3, 40])
def test_not_finite(dtype, m, isa):
    # Inf · 0 is NaN too: nothing is skipped.
    ops.set_isa(isa)
    packed = random_packed(FMT, 50, 70)
    for value in (torch.nan, torch.inf, -torch.inf):
        x = integer_case(FMT, 70, (m, 70), dtype)
        x[m // 2, 69] = value
        assert torch.equal(linear(x, packed).nan_to_num(7.0, 8.0, 9.0), expected(x, packed).nan_to_num(7.0, 8.0, 9.0))


@every_isa
@every_dtype
def test_subnormal_results_are_rounded_not_flushed(dtype, isa):
    ops.set_isa(isa)
    packed = random_packed(inq.Format(2), 20, 9, n1=-126)
    x = torch.full((2, 9), 0.25).to(dtype)
    y = linear(x, packed)
    assert torch.equal(y, expected(x, packed))
    assert bool(((y != 0) & (y.abs() < 2.0**-126)).any())


@every_isa
def test_empty(isa):
    ops.set_isa(isa)
    weight = torch.empty(3, 0, 256, dtype=torch.uint8)
    exponent, bias = torch.zeros(40, 1, dtype=torch.int8), torch.randn(40)
    for m, dtype in itertools.product((0, 1, 50), DTYPES):
        y = ops.linear(torch.empty(m, 0, dtype=dtype), weight, exponent, None, bias, 4, False)
        assert torch.equal(y, bias.to(dtype).expand(m, 40))


def test_errors_say_what_was_wrong():
    packed = random_packed(FMT, 20, 40)
    weight, exponent, _ = prepacked(packed)
    x = torch.randn(2, 40)
    cases = [
        (lambda: ops.linear(x.double(), weight, exponent, None, None, 4, False), "linear: x: expected float32 or bfl"),
        (
            lambda: ops.linear(x[:, :7], weight, exponent, None, None, 4, False),
            r"weight: .*\[2, 1, 256\], got .*\[2,",
        ),
        (lambda: ops.linear(x, weight, exponent, None, None, 5, False), r"weight: .*\[2, 2, 320\], got .*256"),
        (lambda: ops.linear(x, weight, exponent[:19], None, torch.zeros(3), 4, False), r"bias: expected \[19\], got"),
        (lambda: ops.linear(x, weight, exponent.int(), None, None, 4, False), "weight_exp: expected int8, got int32"),
        (
            lambda: ops.linear(x, weight, exponent, torch.ones(3), None, 4, False),
            r"weight_scale: expected shape \[20, 1\], got",
        ),
        (lambda: ops.linear(x, weight, exponent, None, None, 6, False), "bits: expected 2 to 5, got 6"),
        (lambda: ops.prepack(packed.weight, 48, 4, False), r"prepack: weight: .*\[20, 24\], got .*\[20, 20\]"),
        (lambda: ops.unprepack(weight, 33, 40, 4, False), r"unprepack: weight: .*\[3, 2, 256\], got .*\[2, 2, 256\]"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


@every_isa
def test_long_sums_lose_little(isa):
    """Of 14,336 terms: parts of a chunk, chunks of K. Parts that joined the total one after the other lost nearly
    twice as much, and `inq bench` found products that were more than twice as far off as torch's."""
    ops.set_isa(isa)
    packed = random_packed(FMT, 256, 14336)
    w = inq.unpack(plain(packed), torch.float64)
    for m in (2, 40):
        x = torch.randn(m, 14336, generator=generator(m))
        exact = F.linear(x.double(), w)
        error = (linear(x, packed).double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert error < 2.5 * torch.finfo(torch.float32).eps, (m, error / torch.finfo(torch.float32).eps)


@every_isa
@every_dtype
def test_the_sign_of_zero_is_that_of_any_number_of_rows(dtype, isa):
    """A product that underflows to −0, summed from +0, is +0, streamed or in blocks."""
    ops.set_isa(isa)
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    half = inq.pack(torch.tensor([[0.5], [1.0]]), FMT, torch.tensor([[0], [0]], dtype=torch.int8))
    many = linear(torch.full((300, 1), -least, dtype=dtype), half)
    for m in (1, 2, 13, 40):
        assert same_bits(linear(torch.full((m, 1), -least, dtype=dtype), half), many[:m])


# --- which kernel -----------------------------------------------------------------------------------------------------


def test_plan():
    assert ops.plan("linear", 0, 8, 8, "float32", "amx", 2) == "none"
    one = ops.plan("linear", 1, 4096, 14336, "bfloat16", "avx512", 2)
    assert one == "stream isa=avx512 products=bfloat16 rows=1 group=8 threads=2"
    assert ops.plan("linear", 1, 16, 16, "float32", "avx2", 8).endswith("threads=1")
    # Any machine's plan can be asked for on any machine.
    for isa, dtype, m in itertools.product(ALL_ISAS, ("float32", "bfloat16"), (1, 5, 64, 1000)):
        text = ops.plan("linear", m, 500, 700, dtype, isa, 4)
        assert f"isa={isa}" in text or isa == "amx"
        assert ("products=bfloat16" in text) == (dtype == "bfloat16" and isa in ("avx512", "amx"))
    for bad in (("matmul", "float32", "avx2"), ("linear", "float16", "avx2"), ("linear", "float32", "sse")):
        with pytest.raises((RuntimeError, ValueError), match="expected"):
            ops.plan(bad[0], 1, 1, 1, bad[1], bad[2], 1)


# --- linear_dx --------------------------------------------------------------------------------------------------------


def linear_dx(grad, packed):
    return ops.linear_dx(grad, *prepacked(packed), math.prod(packed.shape[1:]), *tail(packed.format))


@every_isa
@every_format
def test_linear_dx(fmt, isa):
    ops.set_isa(isa)
    for seed, (n, k) in enumerate(SHAPES):
        packed = random_packed(fmt, n, k, scale=seed % 2 == 1, seed=seed)
        # Powers of two apart in the sums: exact in float32 only for equal n1.
        even = random_packed(fmt, n, k, n1=1, seed=seed)
        for m, dtype in itertools.product((0, 1, 7, 33, 130), DTYPES):
            grad = integer_case(fmt, n, (m, n), dtype, seed)
            want = reference.linear_dx(grad, even.weight, even.weight_exp, None, k, fmt)
            torch.set_num_threads(1)
            assert torch.equal(linear_dx(grad, even), want), (n, k, m, dtype)
            grad = torch.randn(m, n, generator=generator(seed)).to(dtype)
            y = linear_dx(grad, packed)
            w = inq.unpack(packed, torch.float64)
            dense = grad @ w.to(dtype)
            assert_as_good_as_dense(y, grad.double() @ w, dense, torch.ones(()))
            for threads in (2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(linear_dx(integer_case(fmt, n, (m, n), dtype, seed), even), want)
                assert same_bits(linear_dx(grad, packed), y), (n, k, m, threads)


@every_isa
def test_linear_dx_any_strides_and_shape(isa):
    ops.set_isa(isa)
    packed = random_packed(FMT, 8, 17, n1=0)
    base = integer_case(FMT, 8, (8, 16), torch.float32)
    for grad in (base.T[:, :8], base[:, ::2], base.view(2, 8, 8).transpose(0, 1), base[0, :8], base[:0, :8]):
        y = linear_dx(grad, packed)
        assert y.shape == (*grad.shape[:-1], 17)
        assert torch.equal(y, reference.linear_dx(grad, packed.weight, packed.weight_exp, None, 17, FMT))


# --- conv2d -----------------------------------------------------------------------------------------------------------

# x, weight, stride, padding, dilation, groups.
CONVOLUTIONS = {
    "1x1": ((2, 40, 7, 9), (33, 40, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1, stride": ((2, 300, 7, 9), (70, 300, 1, 1), (2, 2), (0, 0), (1, 1), 1),
    "3x3": ((2, 20, 9, 8), (18, 20, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "3x3, odd channels": ((1, 31, 9, 8), (66, 31, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "7x7": ((1, 3, 20, 19), (16, 3, 7, 7), (2, 2), (3, 3), (1, 1), 1),
    "everything": ((2, 5, 13, 11), (9, 5, 3, 2), (2, 3), (3, 1), (2, 3), 1),
    "one": ((1, 1, 3, 3), (1, 1, 3, 3), (1, 1), (0, 0), (1, 1), 1),
    "large kernel": ((1, 2, 16, 15), (3, 2, 13, 14), (1, 1), (2, 2), (1, 1), 1),
    "groups of panels": ((2, 12, 6, 5), (64, 3, 3, 3), (1, 1), (1, 1), (1, 1), 4),
    "groups": ((2, 10, 6, 5), (15, 2, 3, 3), (1, 2), (1, 2), (2, 1), 5),
    "two groups": ((1, 64, 6, 5), (40, 32, 3, 3), (1, 1), (1, 1), (1, 1), 2),
    "depthwise": ((2, 35, 9, 8), (35, 1, 3, 3), (1, 1), (1, 1), (1, 1), 35),
    "depthwise, two a channel": ((2, 20, 9, 8), (40, 1, 3, 3), (2, 2), (1, 1), (1, 1), 20),
    "batch 0": ((0, 3, 6, 6), (4, 3, 3, 3), (1, 1), (1, 1), (1, 1), 1),
}


def conv2d(x, packed, bias, arguments):
    return ops.conv2d(x, *prepacked(packed), bias, packed.shape[2:], *arguments, *tail(packed.format))


@every_isa
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_conv2d(case, isa):
    ops.set_isa(isa)
    x_shape, w_shape, *arguments = CONVOLUTIONS[case]
    layouts = (torch.contiguous_format, torch.channels_last)
    for seed, (fmt, dtype, layout) in enumerate(itertools.product(FORMATS, DTYPES, layouts)):
        packed = random_packed(fmt, *w_shape, scale=True, seed=seed)
        bias = torch.randint(-9, 9, w_shape[:1], generator=generator(seed)).float() if seed % 3 else None
        x = integer_case(fmt, math.prod(w_shape[1:]), x_shape, dtype, seed).to(memory_format=layout)
        want = reference.conv2d(
            x, packed.weight, packed.weight_exp, packed.weight_scale, bias, w_shape[2:], *arguments, fmt
        )
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = conv2d(x, packed, bias, arguments)
            assert torch.equal(y, want), (fmt, dtype, layout)
            assert y.stride() == want.stride() or y.numel() == 0
        # The largest error is compared. Of one element it is a matter of luck: then of many images.
        images = x_shape[0] * (64 if case == "one" else 1)
        x = torch.randn(images, *x_shape[1:], generator=generator(seed)).to(dtype, memory_format=layout)
        torch.set_num_threads(1)
        y = conv2d(x, packed, bias, arguments)
        w = inq.unpack(packed, torch.float64)
        exact = F.conv2d(x.double(), w, None if bias is None else bias.double(), *arguments)
        dense = F.conv2d(x, inq.unpack(plain(packed), torch.float64).to(dtype), None, *arguments).float()
        dense = dense * packed.weight_scale.view(-1, 1, 1)  # in float32, as above
        if bias is not None:
            dense = dense + bias.view(-1, 1, 1)
        assert_as_good_as_dense(y, exact, dense.to(dtype), torch.exp2(packed.weight_exp.double()).view(-1, 1, 1))
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert same_bits(conv2d(x, packed, bias, arguments).contiguous(), y.contiguous())


@every_isa
def test_conv2d_not_finite_and_padding(isa):
    # NaN reaches its own patches and no other group; Inf · 0 is NaN.
    ops.set_isa(isa)
    for case in ("3x3", "groups of panels", "depthwise", "groups"):
        x_shape, w_shape, *arguments = CONVOLUTIONS[case]
        packed = random_packed(FMT, *w_shape)
        for value, dtype in itertools.product((torch.nan, torch.inf), DTYPES):
            x = integer_case(FMT, math.prod(w_shape[1:]), x_shape, dtype)
            x[0, 1, 2, 3] = value
            want = reference.conv2d(x, packed.weight, packed.weight_exp, None, None, w_shape[2:], *arguments, FMT)
            y = conv2d(x, packed, None, arguments)
            assert torch.equal(y.nan_to_num(7.0, 8.0, 9.0), want.nan_to_num(7.0, 8.0, 9.0)), (case, dtype)


def test_conv2d_errors():
    packed = random_packed(FMT, 6, 2, 3, 3)
    x = torch.randn(1, 4, 5, 5)
    one, zero = (1, 1), (0, 0)
    cases = [
        ((x[0], (3, 3), one, zero, one, 2), r"x: expected \[B, C, H, W\], got \[4, 5, 5\]"),
        ((x, (3, 3), one, zero, one, 3), "groups: expected a divisor of 4, got 3"),
        ((x, (3, 3), zero, zero, one, 2), r"stride: expected two of at least 1 and under 2\^31, got \[0, 0\]"),
        ((x, (3, 3), one, (0, 2**31), one, 2), "padding: expected two of at least 0 and under 2"),
        ((x, (3, 3), one, zero, (2**62 + 1, 1), 2), "dilation: expected two of at least 1 and under 2"),
        # 2 · 2^62 weights a row would be 0 of 64 bits.
        ((x, (2**31 - 1, 2**31 - 1), one, (2**31 - 1,) * 2, one, 1), r"kernel_size: expected fewer than 2\^63 weights"),
        ((x[:, :, :2], (3, 3), one, zero, one, 2), "x: expected an image at least as large as the kernel"),
        ((x, (4, 5), one, zero, one, 2), r"weight: expected shape \[1, 2, 256\], got \[1, 1, 256\]"),
    ]
    for (image, *arguments), message in cases:
        with pytest.raises(ValueError, match=message):
            ops.conv2d(image, *prepacked(packed), None, *arguments, 4, False)
