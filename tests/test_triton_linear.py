"""Triton's linear, linear_dx and linear_fp8 beside the definition: interpreted on the CPU, or on a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    FORMATS,
    exact_product,
    generator,
    integer_case,
    integer_weight,
    random_packed,
    same_bits,
)
from support_triton import DEVICE, EXAMPLES, MS, SIZES, assert_same, check_error, fenced, guarded, pairwise

import inq_kernels as inq
from inq_kernels import layouts, ops, slices

pytest.importorskip("triton")
from inq_kernels.triton_ops import checks, operands, tiles
from inq_kernels.triton_ops import linear_fp8 as fp8
from inq_kernels.triton_ops.operators import OPERATORS

# numpy warns where the interpreter computes an infinity, which a GPU does silently.
pytestmark = [
    pytest.mark.usefixtures("quick_interpreter"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = (layouts.STORAGE, slices.FP16, slices.BF16)


def weight(fmt, n, k, layout, scale=False, seed=0, n1=None):
    """A packed weight on the device between fences, in ``layout`` if it holds the format, else as kernels like it."""
    packed = random_packed(fmt, n, k, n1=n1, scale=scale, seed=seed)
    if layout != layouts.STORAGE and not slices.has(layout, fmt):
        layout = slices.FP16
    packed = ops.prepack(packed, layout)
    return inq.PackedWeight(*map(fenced, parts_of(packed)), fmt, packed.shape, packed.layout)


def parts_of(packed):
    return packed.weight, packed.weight_exp, packed.weight_scale


def on_cpu(t):
    return None if t is None else t.cpu()


def exact(x, packed, bias=None):
    """support.exact_product of what is on the device: the same bits from every backend, but for the sign of zero."""
    packed = inq.PackedWeight(*map(on_cpu, parts_of(packed)), packed.format, packed.shape, packed.layout)
    return exact_product(x.cpu(), packed, on_cpu(bias)).to(DEVICE)


def exact_dx(grad, packed):
    """grad · W for integers and rows of one exponent, by the definition: an integer sum, rounded to grad's dtype."""
    assert packed.weight_scale is None
    packed = inq.PackedWeight(*map(on_cpu, parts_of(packed)), packed.format, packed.shape, packed.layout)
    w, n2 = integer_weight(packed)
    assert len(n2.unique()) == 1
    return ((grad.cpu().long() @ w).double() * torch.exp2(n2[0].double())).to(grad.dtype).to(DEVICE)


CASES = pairwise(
    m=MS,
    n=SIZES,
    k=SIZES,
    fmt=FORMATS,
    dtype=DTYPES,
    layout=LAYOUTS,
    bias=(False, True),
    scale=(False, True),
    rows=("plain", "strided", "transposed", "three"),
)


def identity(case):
    return f"{case['m']}x{case['n']}x{case['k']}-{case['fmt']}-{case['dtype']}-{case['layout']}"


def rows_of(x, how):
    """The same values with other strides, or as three dimensions."""
    if how == "strided":
        wide = torch.full((2 * x.shape[0] + 1, x.shape[1] + 3), torch.nan, dtype=x.dtype, device=x.device)
        view = wide[1::2, 2 : 2 + x.shape[1]][: x.shape[0]]
        return view.copy_(x)
    if how == "transposed":
        return x.t().contiguous().t()
    return x[None] if how == "three" else x


@pytest.mark.parametrize("case", CASES, ids=identity)
def test_linear_beside_float64_and_the_exact_oracle(case, monkeypatch):
    m, n, k, fmt, dtype = (case[name] for name in ("m", "n", "k", "fmt", "dtype"))
    packed = weight(fmt, n, k, case["layout"], case["scale"])
    bias = fenced(torch.randn(n, generator=generator(1)).to(dtype)) if case["bias"] else None
    x = fenced(rows_of(torch.randn(m, k, generator=generator(2)).to(dtype), case["rows"]))
    with guarded(monkeypatch, reads=(x, *parts_of(packed), bias)):
        y = inq.linear(x, packed, bias, backend="triton")
    assert y.shape == (*x.shape[:-1], n)
    assert y.dtype == dtype
    w = inq.unpack(packed, torch.float64)
    expected = torch.nn.functional.linear(x.double(), w, None if bias is None else bias.double())
    dense = torch.nn.functional.linear(x, w.to(dtype), bias)
    unit = w.abs().amax(1).clamp(min=1e-300)
    check_error(y, expected, dense, unit, x.double().abs() @ w.abs().T)
    # Integers: the sum is exact, so every backend gives the same bits.
    x = fenced(rows_of(integer_case(fmt, k, (m, k), dtype), case["rows"]))
    y = inq.linear(x, packed, bias, backend="triton")
    assert_same(y, exact(x, packed, bias), case["scale"] and case["bias"])


@pytest.mark.parametrize("case", CASES, ids=identity)
def test_linear_dx_beside_float64_and_the_exact_oracle(case, monkeypatch):
    m, n, k, fmt, dtype = (case[name] for name in ("m", "n", "k", "fmt", "dtype"))
    packed = weight(fmt, n, k, case["layout"], case["scale"])
    grad = fenced(rows_of(torch.randn(m, n, generator=generator(3)).to(dtype), case["rows"]))

    def linear_dx(grad, packed):
        tail = (k, fmt.bits, fmt.levels, packed.layout, "triton")
        return torch.ops.inq.linear_dx(grad, *parts_of(packed), *tail)

    with guarded(monkeypatch, reads=(grad, *parts_of(packed))):
        dx = linear_dx(grad, packed)
    w = inq.unpack(packed, torch.float64)
    expected, dense = grad.double() @ w, grad @ w.to(dtype)
    unit = w.abs().amax().clamp(min=1e-300).expand(k)
    check_error(
        dx, expected, dense, unit, grad.double().abs() @ w.abs(), torch.finfo(dtype).eps / 2 if case["scale"] else 0.0
    )
    # Integers, and rows of one exponent: the sums are exact.
    packed = weight(fmt, n, k, case["layout"], n1=-3)
    grad = fenced(rows_of(torch.randint(-1, 2, (m, n), generator=generator(4)).to(dtype), case["rows"]))
    assert same_bits(linear_dx(grad, packed) + 0.0, exact_dx(grad, packed) + 0.0)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    m=st.integers(1, 40), n=st.integers(1, 70), k=st.integers(1, 150), fmt=st.sampled_from(FORMATS),
    dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000),
)  # fmt: skip
def test_random_shapes(m, n, k, fmt, dtype, seed):
    packed = weight(fmt, n, k, slices.best(dtype, fmt), seed=seed)
    x = integer_case(fmt, k, (m, k), dtype, seed).to(DEVICE)
    assert same_bits(inq.linear(x, packed, backend="triton") + 0.0, exact(x, packed) + 0.0)
    packed = weight(fmt, n, k, slices.best(dtype, fmt), seed=seed, n1=-3)
    grad = torch.randint(-1, 2, (m, n), generator=generator(seed)).to(dtype).to(DEVICE)
    parts = (packed.weight, packed.weight_exp, None, k, fmt.bits, fmt.levels, packed.layout)
    assert same_bits(torch.ops.inq.linear_dx(grad, *parts, "triton") + 0.0, exact_dx(grad, packed) + 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_shared_by_programs(dtype, monkeypatch):
    """K so long that programs share it: the same bits each time, and the definition's on integers."""
    fmt = inq.Format(4)
    packed = weight(fmt, 40, 2100, slices.best(dtype, fmt))
    x = torch.randn(3, 2100, generator=generator()).to(dtype).to(DEVICE)
    chosen = []
    select = tiles.select
    monkeypatch.setattr(tiles, "select", lambda *a, **b: chosen.append(select(*a, **b)) or chosen[-1])
    with guarded(monkeypatch):
        y = inq.linear(x, packed, backend="triton")
    assert chosen[0].splits > 1
    assert same_bits(y, inq.linear(x, packed, backend="triton"))
    x = integer_case(fmt, 2100, (3, 2100), dtype).to(DEVICE)
    assert same_bits(inq.linear(x, packed, backend="triton") + 0.0, exact(x, packed) + 0.0)


OTHERS = pairwise(
    sm=(80, 89, 100), op=("linear", "linear_dx", "linear_fp8"), m=(3, 20, 40, 70), n=(40, 48), k=(512, 1000, 2100),
    fmt=(inq.Format(4), inq.Format(4, "dense"), inq.Format(5)), dtype=DTYPES, layout=LAYOUTS,
)  # fmt: skip


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: f"sm_{case['sm']}-{case['op']}-{identity(case)}")
def test_tiles_of_other_gpus(case, monkeypatch):
    """The interpreter takes everything for Hopper. Elsewhere what is left behind whole steps may be a loop of its own,
    in a split, or all of one; sums of e4m3 begin anew after other parts."""
    monkeypatch.setattr(operands, "capability", lambda device: case["sm"])
    m, n, k, fmt, dtype = (case[name] for name in ("m", "n", "k", "fmt", "dtype"))
    dx = case["op"] == "linear_dx"
    packed = weight(fmt, n, k, case["layout"], n1=-3 if dx else None)
    largest = 1 if dx else min(8, 2**24 // (2 ** (fmt.magnitudes - 1) * k))
    x = torch.randint(-largest, largest + 1, (m, n if dx else k), generator=generator(5)).to(dtype)
    x, between = fenced(x), (k,) if dx else (None,)
    with guarded(monkeypatch, reads=(x, *parts_of(packed))):
        y = getattr(torch.ops.inq, case["op"])(
            x, *parts_of(packed), *between, fmt.bits, fmt.levels, packed.layout, "triton"
        )
    expected = exact_dx(x, packed) if dx else exact(x, packed)
    assert same_bits(y + 0.0, expected + 0.0)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_rows_are_decoded_once(fmt, dtype, monkeypatch):
    monkeypatch.setattr(tiles, "DENSE_ROWS", 20)
    packed = weight(fmt, 33, 70, slices.best(dtype, fmt), scale=True)
    x = integer_case(fmt, 70, (21, 70), dtype).to(DEVICE)
    bias = torch.ones(33, dtype=dtype, device=DEVICE)
    assert_same(inq.linear(x, packed, bias, backend="triton"), exact(x, packed, bias), fused=True)


def test_exponents_scales_and_bias_of_any_strides():
    fmt = inq.Format(4)
    packed = weight(fmt, 9, 40, slices.FP16, scale=True)
    parts = (packed.weight_exp, packed.weight_scale, torch.randn(9, generator=generator()).to(DEVICE))
    apart = [torch.stack([t, -t], dim=-1)[..., 0] for t in parts]
    x = torch.randn(3, 40, generator=generator()).to(DEVICE)
    tail = (fmt.bits, fmt.levels, packed.layout, "triton")
    for op in (torch.ops.inq.linear, torch.ops.inq.linear_fp8):
        assert same_bits(op(x, packed.weight, *apart, *tail), op(x, packed.weight, *parts, *tail))
    grad = torch.randn(3, 9, generator=generator()).to(DEVICE)
    dx = [torch.ops.inq.linear_dx(grad, packed.weight, *p[:2], 40, *tail) for p in (apart, parts)]
    assert same_bits(*dx)


@pytest.mark.skipif(DEVICE == "cuda", reason="tests/test_gpu.py has more than 2^31 elements on the device")
@pytest.mark.parametrize("op", ["linear", "linear_dx", "linear_fp8"])
def test_rows_further_apart_than_31_bits_count(op):
    """A stride that int32 holds, and an offset that it does not. Of this memory few pages are ever touched."""
    stride, fmt = 2**30, inq.Format(4)
    packed = weight(fmt, 64, 64, slices.FP16, n1=-3)
    x = torch.randint(-1, 2, (3, 64), generator=generator(1)).half()
    far = torch.empty(2 * stride + 64, dtype=torch.float16).as_strided((3, 64), (stride, 1)).copy_(x)
    between = (64,) if op == "linear_dx" else (None,)
    y = getattr(torch.ops.inq, op)(far, *parts_of(packed), *between, 4, "paper", packed.layout, "triton")
    assert same_bits(y + 0.0, (exact_dx(x, packed) if op == "linear_dx" else exact(x, packed)) + 0.0)


@pytest.mark.parametrize("n1", [-126, -100, 100, 127])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exponents_at_the_ends(dtype, n1):
    """Two factors in the epilogue: one alone would overflow, or be 0."""
    fmt = inq.Format(4)
    packed = random_packed(fmt, 5, 40, n1=n1)
    packed = inq.PackedWeight(packed.weight.to(DEVICE), packed.weight_exp.to(DEVICE), None, fmt, packed.shape)
    x = integer_case(fmt, 40, (2, 40), dtype).to(DEVICE) * 2.0**-8
    y = inq.linear(x, packed, backend="triton")
    assert same_bits(y + 0.0, inq.linear(x, packed, backend="reference") + 0.0)


@pytest.mark.parametrize("fmt", [inq.Format(4), inq.Format(4, "dense"), inq.Format(5), inq.Format(5, "dense")], ids=str)
def test_large_float32(fmt):
    """As far as the dense product goes: weights of up to 1 take no x out of float32's range, nor out of its bits."""
    packed = weight(fmt, 9, 40, slices.FP16, n1=0)
    for size in (2.0**119, 2.0**-119):
        x = torch.randn(3, 40, generator=generator(6)).to(DEVICE) * size
        y, w = inq.linear(x, packed, backend="triton"), inq.unpack(packed, torch.float64)
        check_error(y, x.double() @ w.T, x @ w.float().T, 1.0, x.double().abs() @ w.abs().T)
        grad = x[:, :9]
        parts = (packed.weight, packed.weight_exp, None, 40, fmt.bits, fmt.levels, packed.layout)
        dx = torch.ops.inq.linear_dx(grad, *parts, "triton")
        check_error(dx, grad.double() @ w, grad @ w.float(), 1.0, grad.double().abs() @ w.abs())
        assert bool(y.isfinite().all() & dx.isfinite().all())


@pytest.mark.parametrize(("fmt", "octaves"), [(inq.Format(4), 4), (inq.Format(5), 8)], ids=str)
def test_the_largest_bfloat16(fmt, octaves):
    """Documented in inq.linear: tensor cores sum decoded words, 2^1 and up for paper levels, and the exponent comes
    after them. Sums of 2^(128 − octaves) and more are infinite, a thousandth of that is as exact as ever."""
    packed = weight(fmt, 9, 40, slices.BF16, n1=0)
    w = inq.unpack(packed, torch.float64)
    x = torch.ones(1, 40, dtype=torch.bfloat16, device=DEVICE) * w[4].sign().to(torch.bfloat16)
    for largest, finite in ((2.0 ** (118 - octaves), True), (2.0**127 / w[4].abs().sum().item(), False)):
        y = inq.linear(x * largest, packed, backend="triton")
        assert bool(y[0, 4].isfinite()) == finite
        assert inq.linear(x * largest, packed, backend="reference")[0, 4].isfinite()


# --- fp8 --------------------------------------------------------------------------------------------------------------


def test_rows_as_e4m3_are_the_definitions():
    from inq_kernels import reference

    x = torch.randn(40, 300, generator=generator()) * torch.exp2(
        torch.randint(-140, 120, (40, 1), generator=generator())
    )
    x[0], x[1, 3], x[2, 4], x[3, 5] = 0, torch.nan, torch.inf, -torch.inf
    x[4] = 1.75 * 2.0 ** torch.arange(-20, 5).repeat(12)  # ties of the scale and of rounding
    x[5] = torch.linspace(0, 0.02, 300)
    x[6, 0] = 448.0
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    x[7, :254] = every
    x[8, :253] = (every[1:] + every[:-1]) / 2
    for dtype in DTYPES:
        rows = x.to(dtype).to(DEVICE)
        expected, exponents = reference.quantize_rows_e4m3(rows)
        values, t = fp8.quantize_rows_e4m3(rows)
        assert torch.equal(t, exponents.view(-1).int())
        nan = expected.float().isnan()
        assert torch.equal(values.float().isnan(), nan)
        assert torch.equal(values.view(torch.uint8)[~nan], expected.view(torch.uint8)[~nan])


FP8_CASES = pairwise(
    m=MS, n=SIZES, k=SIZES, fmt=FORMATS, dtype=DTYPES, bias=(False, True), scale=(False, True),
    layout=(*LAYOUTS, slices.E4M3), rows=("plain", "strided", "transposed", "three"),
)  # fmt: skip


def check_fp8(y, expected, size, sums=False):
    """Products of e4m3 are exact and sums differ by their order; a tensor core keeps 14 bits of them. ``sums``: float32
    holds them, so interpreted kernels give the same bits. ``size``: of the sum of the products."""
    if sums and DEVICE == "cpu":
        assert same_bits(y + 0.0, expected + 0.0)
        return
    tolerance = size * 2.0 ** (-22 if DEVICE == "cpu" else -13) + expected.double().abs() * torch.finfo(y.dtype).eps
    assert ((y.double() - expected.double()).abs() <= tolerance).all()


@pytest.mark.parametrize("case", FP8_CASES, ids=identity)
def test_linear_fp8_beside_the_definition(case, monkeypatch):
    m, n, k, fmt, dtype = (case[name] for name in ("m", "n", "k", "fmt", "dtype"))
    packed = weight(fmt, n, k, case["layout"], case["scale"])
    bias = fenced(torch.randn(n, generator=generator(1)).to(dtype)) if case["bias"] else None
    parts = (*parts_of(packed), bias, fmt.bits, fmt.levels, packed.layout)
    x = fenced(rows_of(torch.randn(m, k, generator=generator(2)).to(dtype), case["rows"]))
    with guarded(monkeypatch, reads=(x, *parts[:4])):
        y = torch.ops.inq.linear_fp8(x, *parts, "triton")
    expected = torch.ops.inq.linear_fp8(x, *parts, "reference")
    weights = inq.unpack(packed, torch.float64).abs().sum(1)
    check_fp8(y, expected, weights * x.double().abs().amax(-1, keepdim=True))
    # Small integers are e4m3 numbers, and their sums exact.
    largest = min(8, 2**24 // (2 ** (fmt.magnitudes - 1) * k))
    x = fenced(rows_of(torch.randint(-largest, largest + 1, (m, k), generator=generator(5)).to(dtype), case["rows"]))
    check_fp8(torch.ops.inq.linear_fp8(x, *parts, "triton"), exact(x, packed, bias), weights * largest, sums=True)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    m=st.integers(1, 20), n=st.integers(1, 40), k=st.integers(1, 150), fmt=st.sampled_from(FORMATS),
    dtype=st.sampled_from(DTYPES), scale=st.booleans(), bias=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_random_shapes_of_fp8(m, n, k, fmt, dtype, scale, bias, seed):
    """Integers up to 8 and their sums are exact where they are interpreted: the definition's bits."""
    packed = weight(fmt, n, k, slices.E4M3, scale, seed)
    bias = torch.randn(n, generator=generator(seed)).to(dtype).to(DEVICE) if bias else None
    parts = (*parts_of(packed), bias, fmt.bits, fmt.levels, packed.layout)
    largest = min(8, 2**24 // (2 ** (fmt.magnitudes - 1) * k))
    x = torch.randint(-largest, largest + 1, (m, k), generator=generator(seed)).to(dtype).to(DEVICE)
    y, size = torch.ops.inq.linear_fp8(x, *parts, "triton"), inq.unpack(packed, torch.float64).abs().sum(1) * largest
    check_fp8(y, exact(x, packed, bias), size, sums=True)


@pytest.mark.parametrize(
    "op", ["linear", "linear_fp8", "linear_dx", "conv2d", "conv2d_dx", "unpack_", "unpack", "prepack", "unprepack"]
)
def test_tensors_that_do_not_belong_together(op):
    """A kernel takes sizes as they are: bare operators, too, must refuse what would be read or written beyond."""
    p = weight(inq.Format(4), 8, 36, layouts.STORAGE)
    x, tail = torch.zeros(2, 36, device=DEVICE), (4, "paper", "storage", "triton")
    long = torch.zeros(9, 1, dtype=torch.int8, device=DEVICE)
    short = torch.zeros(7, device=DEVICE)
    image, conv = torch.zeros(1, 4, 5, 5, device=DEVICE), ((3, 3), (1, 1), (0, 0), (1, 1), 1)
    wrong = {
        "linear": [(x, p.weight, long, None, None, *tail), (x, p.weight, p.weight_exp, None, short, *tail)],
        "linear_dx": [
            (x, p.weight, p.weight_exp, None, 36, *tail),
            (x[:, :8], p.weight, p.weight_exp, None, 90, *tail),
        ],
        "conv2d": [
            (image, p.weight, long, None, None, *conv, *tail),
            (image, p.weight, p.weight_exp, None, short, *conv, *tail),
            (image, p.weight, p.weight_exp, None, None, (3, 3), (0, 1), (0, 0), (1, 1), 1, *tail),
            (image, p.weight, p.weight_exp, None, None, (3, 3), (1, 1), (0, 0), (1, 1), 3, *tail),
        ],
        "conv2d_dx": [
            (image, p.weight, p.weight_exp, None, (1, 4, 7, 7), (3, 3), (1, 1), (0, 0), (1, 1), 0, *tail),
            (image, p.weight, p.weight_exp, None, (1, 4, 7, 7), (3, 3), (1, 1), (-1, 0), (1, 1), 1, *tail),
        ],
        "unpack_": [(torch.zeros(2, 40, device=DEVICE), p.weight, p.weight_exp, None, 36, 4, "paper")],
        "unpack": [(p.weight, p.weight_exp, None, 90, 4, "paper", torch.float32)],
        "prepack": [(p.weight, 90, 4, "paper", slices.FP16), (p.weight, -5, 4, "paper", slices.FP16)],
        "unprepack": [(p.weight, 8, 36, 4, "paper", slices.FP16)],
    }
    wrong["linear_fp8"] = wrong["linear"]
    for arguments in wrong[op]:
        with pytest.raises(ValueError, match=r"inq\.\w+: \w+: expected"):
            OPERATORS[op](*arguments)


@pytest.mark.parametrize(
    "op", ["linear", "linear_fp8", "linear_dx", "conv2d", "unpack", "pack", "prepack", "unprepack"]
)
def test_more_rows_than_kernels_count(op):
    """Rows are numbers of 32 bits in kernels, and so is what products sum over. The sizes alone are looked at."""
    most = checks.MOST

    def shaped(*size, dtype=torch.uint8):
        return torch.empty(size, dtype=dtype, device="meta")

    def packed(n, k):
        return shaped(n, -(-k // 8) * 4), shaped(n, 1, dtype=torch.int8), None

    x, tail = torch.float16, (4, "paper", "storage", "triton")
    few, many, wide = packed(1, 8), packed(most + 1, 8), packed(1, most + 1)
    conv = ((1, 1), (1, 1), (0, 0), (1, 1), 1)
    wrong = {
        "linear": [
            (shaped(most + 1, 8, dtype=x), *few, None, *tail),
            (shaped(1, 8, dtype=x), *many, None, *tail),
            (shaped(1, most + 1, dtype=x), *wide, None, *tail),
        ],
        "linear_dx": [
            (shaped(most + 1, 1, dtype=x), *few, 8, *tail),
            (shaped(1, most + 1, dtype=x), *many, 8, *tail),
            (shaped(1, 1, dtype=x), *wide, most + 1, *tail),
        ],
        "conv2d": [
            (shaped(1, 8, 1, 1, dtype=x), *many, None, *conv, *tail),
            (shaped(1, most + 1, 1, 1, dtype=x), *wide, None, *conv, *tail),
        ],
        "unpack": [(*many, 8, 4, "paper", torch.float16)],
        "pack": [(shaped(most + 1, 1, dtype=x), shaped(most + 1, 1, dtype=torch.int8), 4, "paper")],
        "prepack": [(many[0], 8, 4, "paper", slices.FP16)],
        "unprepack": [
            (shaped(*slices.shape(slices.FP16, most + 1, 8, inq.Format(4))), most + 1, 8, 4, "paper", slices.FP16)
        ],
    }
    wrong["linear_fp8"] = wrong["linear"]
    for arguments in wrong[op]:
        with pytest.raises(ValueError, match=f"expected at most {most}( rows)?, got {most + 1}"):
            OPERATORS[op](*arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_outputs(layout):
    """N = 0: an empty product, and a gradient of zeros."""
    fmt = inq.Format(4)
    shape = layouts.shape(layout, 0, 40, fmt)
    none = torch.empty(shape, dtype=torch.uint8, device=DEVICE)
    n1 = torch.empty(0, 1, dtype=torch.int8, device=DEVICE)
    x = torch.ones(3, 40, device=DEVICE, requires_grad=True)
    y = inq.linear(x, inq.PackedWeight(none, n1, None, fmt, (0, 40), layout), backend="triton")
    assert y.shape == (3, 0)
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros(3, 40, device=DEVICE))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_that_are_a_part_of_a_buffer(layout):
    """As files have them: bytes that begin anywhere."""
    fmt = inq.Format(4)
    packed = weight(fmt, 9, 40, layout)
    x = torch.randn(3, 40, generator=generator()).to(DEVICE)
    expected = inq.linear(x, packed, backend="triton")
    for offset in (1, 2, 8):
        buffer = torch.full((packed.weight.numel() + 16,), 255, dtype=torch.uint8, device=DEVICE)
        part = buffer[offset : offset + packed.weight.numel()].view(packed.weight.shape).copy_(packed.weight)
        parts = inq.PackedWeight(part, packed.weight_exp, packed.weight_scale, fmt, packed.shape, packed.layout)
        assert same_bits(inq.linear(x, parts, backend="triton"), expected)


def test_the_smallest_weights_keep_their_gradient():
    """2^n1 goes into the gradient, the rest of the factor behind the sum: nothing becomes subnormal in between."""
    fmt = inq.Format(5)
    packed = random_packed(fmt, 4, 40, n1=-118)
    packed = inq.PackedWeight(packed.weight.to(DEVICE), packed.weight_exp.to(DEVICE), None, fmt, packed.shape)
    grad = torch.ones(3, 4, device=DEVICE)
    parts = (packed.weight, packed.weight_exp, None, 40, 5, "paper", "storage")
    assert same_bits(
        torch.ops.inq.linear_dx(grad, *parts, "triton"), torch.ops.inq.linear_dx(grad, *parts, "reference")
    )
    assert not torch.ops.inq.linear_fp8(
        torch.full((1, 40), 1e-38, device=DEVICE), packed.weight, packed.weight_exp - 8, None, None, 5, "paper",
        "storage", "triton",
    ).isinf().any()  # fmt: skip


# --- the choice of tiles ----------------------------------------------------------------------------------------------


def test_the_choice_is_a_function_of_its_arguments():
    choose = tiles.select
    assert choose("linear", "fp16", 1, 4096, 1024, 132).splits == 4
    assert choose("linear", "fp16", 1, 57344, 2048, 132).splits == 1
    assert choose("linear", "fp16", 4096, 4096, 1024, 132).kernel == "dense"
    assert choose("linear", "fp32", 4096, 4096, 1024, 132).kernel == "tile"
    # More than 65535 programs in a grid's second dimension are none.
    assert choose("linear", "fp16", 4096, 256 * 65535, 32, 132).kernel == "dense"
    assert choose("linear", "fp16", 4096, 256 * 65535 + 1, 32, 132).kernel == "tile"
    assert choose("linear", "fp16", 4096, 1, 64 * 65535, 132).kernel == "dense"
    assert choose("linear", "fp16", 4096, 1, 64 * 65535 + 32, 132).kernel == "tile"
    for m, expected in ((1, 16), (16, 16), (17, 32), (64, 64), (65, 64), (2000, 64)):
        assert choose("linear", "bf16", m, 4096, 1024, 132, tiles.HOPPER).tile.bm == expected
    for n, expected in ((4096, 64), (4097, 32), (4104, 32), (4112, 64)):
        assert choose("linear", "bf16", 64, n, 1024, 132, tiles.HOPPER).tile.bm == expected
        assert choose("linear", "bf16", 64, n, 1024, 132).tile.bm == 64
    wide = choose("linear", "fp16", 1, 100, 4096, 132)
    assert wide.splits * wide.steps >= -(-4096 // wide.tile.bk) > (wide.splits - 1) * wide.steps


def test_tuned_tiles_are_saved_and_loaded(tmp_path, monkeypatch):
    table = {key: dict(row) for key, row in tiles.DEFAULTS.items()}
    table["linear fp16"][16] = tiles.Tile(64, 16, 64, 4, 5)
    tiles.save(tmp_path / "t.json", "a GPU", table)
    assert tiles.load(tmp_path / "t.json") == table
    monkeypatch.setenv(tiles.ENVIRONMENT, str(tmp_path / "t.json"))
    assert tiles.current()["linear fp16"][16].bn == 64
    (tmp_path / "part.json").write_text(
        '{"tiles": {"linear bf16": {"16": {"bn":32,"bm":16,"bk":32,"warps":4,"stages":2}}}}'
    )
    assert tiles.load(tmp_path / "part.json")["linear bf16"][16].bn == 32
    assert tiles.load(tmp_path / "part.json")["linear fp16"] == tiles.DEFAULTS["linear fp16"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "JSONDecodeError"),
        pytest.param("[" * 100_000, "RecursionError", id="nested"),
        ("[]", "TypeError"),
        ('{"tiles": []}', "AttributeError"),
        ('{"tiles": {"linear": {}}}', "expected one of .*got 'linear'"),
        ('{"tiles": {"linear fp16": {"17": {}}}}', "rows: expected one of"),
        ('{"tiles": {"linear fp16": {"16": {"bn": 1}}}}', "expected .*got \\['bn'\\]"),
        ('{"tiles": {"linear fp16": {"16": {"bn":33,"bm":16,"bk":32,"warps":4,"stages":2}}}}', "bn: expected a power"),
        # A tensor core's product of 8-bit numbers takes 32 of them.
        (
            '{"tiles": {"linear e4m3": {"16": {"bn":32,"bm":16,"bk":16,"warps":4,"stages":2}}}}',
            "bk: expected a power of two from 32 to 256, got 16",
        ),
        (
            '{"tiles": {"linear e4m3 of 16": {"16": {"bn":32,"bm":16,"bk":64,"warps":4,"stages":2,"part":16}}}}',
            "part: expected a power of two from 32 to 64, got 16",
        ),
        ('{"tiles": {"linear fp16": {"16": {"bn":"x","bm":16,"bk":32,"warps":4,"stages":2}}}}', "bn: .*got 'x'"),
    ],
)
def test_a_wrong_file_of_tiles(text, message, tmp_path):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=f"INQ_TRITON_TILES: .*{message}"):
        tiles.load(tmp_path / "t.json")


def test_a_file_of_tiles_for_another_gpu(tmp_path, monkeypatch):
    """Tiles that a GPU would compile to something else than what the contract says are refused there, by name."""
    path = tmp_path / "t.json"
    wide = {"linear fp32": {16: tiles.Tile(64, 16, 16, 4, 2)}}
    tiles.save(path, "another GPU", wide)
    assert tiles.load(path, tiles.HOPPER, 90)["linear fp32"][16].bn == 64
    monkeypatch.setenv(tiles.ENVIRONMENT, str(path))
    with pytest.raises(ValueError, match="linear fp32, 16 rows: bn: expected a power of two from 16 to 32, got 64"):
        tiles.current(100)
    tiles.save(path, "another GPU", {"linear_dx fp32": {16: tiles.Tile(64, 64, 16, 4, 2)}})
    with pytest.raises(ValueError, match="linear_dx fp32, 16 rows: bm: expected a power of two from 16 to 32, got 64"):
        tiles.load(path, tiles.BLACKWELL, 100)
    for capability in tiles.CAPABILITIES:
        tiles.save(path, "this GPU", tiles.defaults(capability))
        assert tiles.load(path, tiles.defaults(capability), capability) == tiles.defaults(capability)


@pytest.mark.parametrize("kind", ["missing", "folder", "bytes"])
def test_what_is_no_file_of_tiles(kind, tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    if kind == "folder":
        path.mkdir()
    if kind == "bytes":
        path.write_bytes(b"\xff\xfe{")
    monkeypatch.setenv(tiles.ENVIRONMENT, str(path))
    with pytest.raises(ValueError, match="INQ_TRITON_TILES: expected a file of tiles, got .*t.json: \\w+Error"):
        inq.linear(torch.ones(1, 40, device=DEVICE), weight(inq.Format(4), 8, 40, slices.FP16), backend="triton")
