"""csrc/cuda/linear_hopper.cu and quantize_rows_hopper.cu in the emulator, beside the definition; and their choice."""

import pytest
import torch
from support import FORMATS, assert_as_good_as_dense, generator, integer_case, random_packed, same_bits
from support_emulator import emulated, load, seeds
from support_triton import pairwise

import inq_kernels as inq
from inq_kernels import fragments, slices
from inq_kernels.reference import quantize_rows_e4m3, unpack_codes

NUMBERS = {torch.float16: 0, torch.bfloat16: 1, "e4m3": 2}
LAYOUTS = (fragments.FP16, fragments.BF16, fragments.E4M3)
LEVELS = {"paper4": 0, "dense4": 1, "paper5": 2, "dense5": 3}
FLOATS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
TILES = [(256, 128), (128, 128), (128, 64)]


@pytest.fixture(scope="module")
def library():
    return load("linear_hopper", "linear_hopper.cu", "quantize_rows_hopper.cu")


def address(t):
    return 0 if t is None else t.data_ptr()


def padded(x, extra=0):
    """x with rows of a multiple of 16 bytes, and NaN behind each that nobody may read as a number."""
    m, k = x.shape
    step = 16 // x.element_size()
    wide = torch.empty(m, -(-max(k, 1) // step) * step + extra * step, dtype=x.dtype)
    wide.view(torch.uint8).fill_(0x7F)
    wide[:, :k] = x
    return wide[:, :k]


def linear(library, seed, x, packed, bias, tile, splits=1, rows_exp=None, out_dtype=None, processors=3, **options):
    """[M, N] from x [M, K]: float16, bfloat16, or uint8, the bits of e4m3."""
    fmt, (m, k), n = packed.format, x.shape, packed.shape[0]
    number = NUMBERS["e4m3" if x.dtype == torch.uint8 else x.dtype]
    out_dtype = out_dtype or x.dtype
    words = fragments.prepack(unpack_codes(packed.weight, fmt.bits, k), fmt, LAYOUTS[number])
    choice = (*tile, splits)
    partials, arrivals = library.sizes(m, n, choice)
    with emulated(library, seed=seed, **options) as device:
        y = device.output((m, n), out_dtype, "y")
        parts = device.output((partials,), torch.float32, "partials")
        counts = device.inout(torch.zeros(arrivals, dtype=torch.int32), "arrivals")
        named = dict(x=x, weight=words, weight_exp=packed.weight_exp, scale=packed.weight_scale, bias=bias)
        named = {name: device.input(t, name) for name, t in (named | {"rows_exp": rows_exp}).items()}
        device.call(
            library.linear_hopper, address(named["x"]), x.stride(0), address(named["weight"]),
            address(named["weight_exp"]), address(named["scale"]), address(named["bias"]), address(named["rows_exp"]),
            address(y), address(parts), address(counts), m, n, k, fmt.magnitudes, number, LEVELS[slices.kind(fmt)],
            FLOATS[bias.dtype] if bias is not None else 0, FLOATS[out_dtype], choice, processors,
        )  # fmt: skip
    assert (counts == 0).all()
    return y.clone()


def quantize_rows(library, seed, x):
    (m, k), stride = x.shape, -(-max(x.shape[1], 1) // 16) * 16
    with emulated(library, seed=seed) as device:
        values = device.output((m, k), torch.uint8, "values", stride=(stride, 1))
        exponents = device.output((m,), torch.int32, "exponents")
        rows = device.input(x, "x")
        device.call(
            library.quantize_rows, address(rows), x.stride(0), address(values), stride, address(exponents), m, k,
            FLOATS[x.dtype],
        )  # fmt: skip
    return values, exponents


# Every pair of a kind and a tile: every instance.
CASES = pairwise(
    kind=[(dtype, fmt) for dtype in (torch.float16, torch.bfloat16) for fmt in FORMATS],
    tile=TILES,
    m=(1, 9, 64, 130),
    n=(1, 20, 132, 300),
    k=(1, 40, 96, 200, 330, 1000),
    splits=(1, 2, 3),
    processors=(1, 3, 132),
    bias=(None, torch.float16, torch.bfloat16, torch.float32),
    scale=(False, True),
)


def identity(case):
    dtype, fmt = case["kind"]
    tile = "x".join(map(str, case["tile"]))
    return f"{str(dtype)[6:]}-{fmt.bits}{fmt.levels}-{tile}-{case['m']}x{case['n']}x{case['k']}"


@pytest.mark.parametrize("case", CASES, ids=identity)
@pytest.mark.parametrize("seed", seeds())
def test_linear_beside_float64_and_the_exact_oracle(library, case, seed):
    m, n, k, (dtype, fmt) = (case[name] for name in ("m", "n", "k", "kind"))
    packed = random_packed(fmt, n, k, scale=case["scale"], seed=seed)
    bias = torch.randn(n, generator=generator(1)).to(case["bias"]) if case["bias"] else None
    x = integer_case(fmt, k, (m, k), dtype, seed)
    how = (packed, bias, case["tile"], case["splits"])
    y = linear(library, seed, padded(x, seed % 2), *how, processors=case["processors"])
    # The epilogue adds bias in float32 whatever its type; so does the reference.
    expected = inq.linear(x, packed, bias, backend="reference")
    assert same_bits(y + 0.0, expected + 0.0)
    if seed == 0:
        x = torch.randn(m, k, generator=generator(2)).to(dtype)
        y = linear(library, seed, padded(x), *how, processors=case["processors"])
        w = inq.unpack(packed, torch.float64)
        exact = torch.nn.functional.linear(x.double(), w, None if bias is None else bias.double())
        size = x.double().abs() @ w.abs().T
        if y.numel() > 64:
            dense = torch.nn.functional.linear(x.float(), w.float()).double().to(dtype)
            dense = dense if bias is None else (dense.double() + bias.double()).to(dtype)
            assert_as_good_as_dense(y, exact, dense, w.abs().amax(1).clamp(min=1e-300))
        else:
            finfo = torch.finfo(dtype)
            rounding = exact.abs() * finfo.eps / 2 + finfo.smallest_normal * finfo.eps
            assert ((y.double() - exact).abs() <= size * 2.0**-22 + rounding).all()


@pytest.mark.parametrize("number", NUMBERS, ids=str)
@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_the_rings_turn_over(library, tile, kind, number):
    """One block, two tiles: all its boxes and slots are filled at least once more."""
    fmt = inq.Format(int(kind[-1]), kind[:-1])
    dtype = torch.float32 if number == "e4m3" else number
    k, n, seed = 900, tile[0] + 5, TILES.index(tile) + 3 * LEVELS[kind]
    packed, x = random_packed(fmt, n, k, n1=-3, seed=seed), integer_case(fmt, k, (9, k), dtype, seed)
    values, t = quantize_rows(library, seed, x) if number == "e4m3" else (padded(x), None)
    y = linear(library, seed, values, packed, None, tile, 1, t, dtype, processors=1)
    parts = (packed.weight, packed.weight_exp, None, None, fmt.bits, fmt.levels, "storage", "reference")
    op = torch.ops.inq.linear_fp8 if number == "e4m3" else torch.ops.inq.linear
    assert same_bits(y + 0.0, op(x, *parts) + 0.0)


FP8_CASES = pairwise(
    kind=[(dtype, fmt) for dtype in FLOATS for fmt in FORMATS],
    tile=TILES,
    m=(1, 9, 64, 130),
    n=(1, 20, 132, 300),
    k=(1, 40, 128, 200, 330, 1000),
    splits=(1, 2),
    processors=(1, 3, 132),
    bias=(False, True),
    scale=(False, True),
)


@pytest.mark.parametrize("case", FP8_CASES, ids=identity)
@pytest.mark.parametrize("seed", seeds())
def test_linear_fp8_beside_the_exact_oracle(library, case, seed):
    m, n, k, (dtype, fmt) = (case[name] for name in ("m", "n", "k", "kind"))
    packed = random_packed(fmt, n, k, scale=case["scale"], seed=seed)
    bias = torch.randn(n, generator=generator(1)).to(dtype) if case["bias"] else None
    for x in (integer_case(fmt, k, (m, k), dtype, seed), torch.randn(m, k, generator=generator(2)).to(dtype)):
        values, t = quantize_rows(library, seed, x)
        how = (packed, bias, case["tile"], case["splits"], t, dtype)
        y = linear(library, seed, values, *how, processors=case["processors"])
        parts = (packed.weight, packed.weight_exp, packed.weight_scale, bias)
        expected = torch.ops.inq.linear_fp8(x, *parts, fmt.bits, fmt.levels, "storage", "reference")
        if x.dtype == dtype and bool((x == x.round()).all()):
            assert same_bits(y + 0.0, expected + 0.0)
            continue
        x8, t = quantize_rows_e4m3(x)
        x8, w = x8.double() * torch.exp2(-t.double()), inq.unpack(packed, torch.float64)
        b = torch.zeros(n, dtype=torch.float64) if bias is None else bias.double()
        exact = torch.nn.functional.linear(x8, w, b)
        finfo = torch.finfo(dtype)
        rounding = (exact.abs() * finfo.eps / 2).clamp(min=finfo.smallest_normal * finfo.eps / 2)
        size = torch.nn.functional.linear(x8.abs(), w.abs(), b.abs())
        assert ((y.double() - exact).abs() <= (k + 3) * 2.0**-24 * size + rounding).all()


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("bits", [4, 5])
def test_sums_of_e4m3_leave_the_tensor_core_every_128(library, bits, tile):
    """Hopper keeps 14 bits of them: enough for 128 products of these numbers, and not for all 4000."""
    fmt, k = inq.Format(bits, "paper"), 4000
    n1 = torch.zeros(9, 1, dtype=torch.int8)
    w = 2.0 ** -torch.randint(0, 4, (9, k), generator=generator()).float()
    packed, x = inq.pack(w, fmt, n1), torch.ones(3, k, dtype=torch.float32)
    values, t = quantize_rows(library, 0, x)
    y = linear(library, 0, values, packed, None, tile, 1, t, torch.float32, short_accumulator=1)
    assert torch.equal(y, x @ w.T)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("k", [0, 1, 7, 64, 100, 2100])
def test_rows_in_e4m3(library, dtype, k):
    x = torch.randn(9, k, generator=generator(k)).to(dtype)
    if k:
        finfo = torch.finfo(dtype)
        x[0], x[1], x[2, -1], x[3, 0], x[4, k // 2] = 0, -0.0, torch.nan, torch.inf, -torch.inf
        x[5] *= finfo.smallest_normal * finfo.eps
        x[6, 0], x[7, 0] = finfo.max, 448 * 2.0**-6
        x[8, 0] = torch.nextafter(torch.tensor(448.0).to(dtype), torch.tensor(1000.0).to(dtype)) / 64
    expected, t = quantize_rows_e4m3(x) if k else (x.to(torch.float8_e4m3fn), torch.zeros(9, 1, dtype=torch.int32))
    for seed, rows in enumerate((x, padded(x), torch.cat([x, x], 1)[:, k:])):
        values, exponents = quantize_rows(library, seed, rows)
        assert torch.equal(values, expected.view(torch.uint8))
        assert torch.equal(exponents, t.view(-1))


def test_extreme_exponents(library):
    """Factors past 2^127 and sums that end as subnormal numbers or infinities, in one rounding."""
    fmt = inq.Format(4)
    for n1 in (-126, -100, 100, 127):
        packed = random_packed(fmt, 40, 64, n1=n1)
        x = integer_case(fmt, 64, (9, 64), torch.bfloat16)
        expected = inq.linear(x, packed, backend="reference")
        assert same_bits(linear(library, 0, padded(x), packed, None, (128, 64)) + 0.0, expected + 0.0)
        for scale in (2.0**-100, 2.0**100):
            x = (torch.randn(9, 64, generator=generator(1)) * scale).float()
            values, t = quantize_rows(library, 0, x)
            y = linear(library, 0, values, packed, None, (128, 64), 1, t, torch.float32)
            parts = (packed.weight, packed.weight_exp, None, None)
            expected = torch.ops.inq.linear_fp8(x, *parts, fmt.bits, fmt.levels, "storage", "reference")
            assert torch.allclose(y, expected, rtol=1e-5, atol=1e-44, equal_nan=True)


def test_empty_sizes(library):
    packed = random_packed(inq.Format(4), 3, 8)
    x = torch.zeros(0, 8, dtype=torch.float16)
    assert linear(library, 0, x, packed, None, (128, 64)).shape == (0, 3)
    parts = (torch.zeros(3, 0, dtype=torch.uint8), torch.zeros(3, 1, dtype=torch.int8), None)
    packed, bias = inq.PackedWeight(*parts, inq.Format(4), torch.Size((3, 0))), torch.tensor([1.0, 2.0, -3.0])
    y = linear(library, 0, torch.zeros(2, 8, dtype=torch.float16)[:, :0], packed, bias, (128, 64))
    assert torch.equal(y, bias.half().expand(2, 3))


def test_what_a_tensor_map_cannot_describe_is_an_error(library):
    packed = random_packed(inq.Format(4), 3, 9)
    x = torch.zeros(2, 9, dtype=torch.float16)
    with pytest.raises(AssertionError, match="returned CUDA error 1"):
        linear(library, 0, x, packed, None, (128, 64))
    with pytest.raises(AssertionError, match="returned CUDA error 1"):
        linear(library, 0, padded(x), packed, None, (64, 64))


def test_the_choice(library):
    def choose(m, n, k, x_bytes=2, bits=4, aligned=True, capability=90, processors=132):
        return library.choose(m, n, k, x_bytes, bits, aligned, capability, processors)

    for m in (1, 64, 2048, 100_000):
        assert choose(m, 4096, 4096) is None
        assert choose(m, 4096, 4096, x_bytes=1) is not None
    for capability in (80, 89, 100, 120):
        assert choose(256, 4096, 4096, capability=capability) is None
    assert choose(256, 4096, 4096, aligned=False) is None
    assert choose(256, 0, 4096) is None
    assert choose(256, 4096, 0) is None
    # Many tokens and many features: the tile that reads the least.
    assert choose(2047, 28672, 8192) == (256, 128, 1)
    # Few tiles: K is shared, in parts of at least 512.
    for m in (65, 128, 300, 1024, 2047):
        for n, k in ((4096, 4096), (6144, 4096), (4096, 14336), (10240, 8192), (57344, 8192), (33, 100), (7, 65)):
            for x_bytes, bits in ((2, 4), (2, 5), (1, 4), (1, 5)):
                rows, tokens, splits = choose(m, n, k, x_bytes, bits)
                assert (rows, tokens) in TILES
                assert 1 <= splits <= 8
                assert splits == 1 or k >= 512 * splits
    # Every tile is chosen somewhere.
    ms, sizes = range(65, 2048, 62), (512, 1024, 4096, 8192, 14336)
    chosen = {choose(m, n, k)[:2] for m in ms for n in sizes for k in sizes}
    assert chosen == set(TILES)
