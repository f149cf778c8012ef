"""CUDA's linear and linear_dx by mma.sync in the emulator: every kernel that choose() can return, on ragged shapes."""

import functools
import itertools
import math

import pytest
import torch
from support import assert_as_good_as_dense, generator, integer_case, random_packed, same_bits

import inq_kernels as inq
from inq_kernels import fragments, layouts, reference, slices
from inq_kernels.format import Format

support_emulator = pytest.importorskip("support_emulator")
pytest.importorskip("pybind11")

NUMBERS = {torch.float16: 0, torch.bfloat16: 1}
LAYOUTS = {torch.float16: fragments.FP16, torch.bfloat16: fragments.BF16}
KINDS = ("paper4", "dense4", "paper5", "dense5")
FORMATS = {"paper4": Format(4), "dense4": Format(4, "dense"), "paper5": Format(5), "dense5": Format(5, "dense")}
BIAS_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
LINEAR = list(itertools.product((torch.float16, torch.bfloat16), KINDS, (8, 16, 32, 64)))
LINEAR_DX = list(itertools.product((torch.float16, torch.bfloat16), KINDS, (8, 16, 32)))


@functools.cache
def library():
    return support_emulator.load("linear", "linear.cu", "linear_dx.cu")


def choose(dx, sm_count, m, n, k, dtype=torch.float16, bits=4, capability=80):
    return library().choose(dx, sm_count, capability, m, n, k, dtype == torch.float16, bits)


def run(dx, x, packed, bias=None, seed=0, sm_count=1, offset=0, capability=80, traffic=None):
    """y, or dx of the gradient x, from the emulated kernel; ``offset``: bytes that x is off a multiple of 256;
    ``traffic``: a list to which what the kernel read and wrote is added."""
    fmt, dtype, (n, k), m = packed.format, x.dtype, packed.shape, x.shape[0]
    choice = choose(dx, sm_count, m, n, k, dtype, fmt.bits, capability)
    weight = torch.zeros(layouts.shape(LAYOUTS[dtype], n, k, fmt), dtype=torch.uint8)
    if n:
        weight = layouts.prepack(packed.weight, k, fmt, LAYOUTS[dtype])
    with support_emulator.emulated(library(), seed=seed) as device:
        tensors = {"weight": weight, "weight_exp": packed.weight_exp, "weight_scale": packed.weight_scale, "bias": bias}
        given = {name: device.input(t, name) for name, t in tensors.items()}
        x = device.input(x, "x", offset)
        out = device.output((m, k if dx else n), dtype, "out")
        partials = device.output((choice.partials,), torch.float32, "partials")
        flags = device.inout(torch.zeros(choice.flags, dtype=torch.int32), "flags")
        device.call(
            library().run,
            dx,
            choice,
            x.data_ptr(),
            x.stride(0),
            *(0 if t is None else t.data_ptr() for t in given.values()),
            out.data_ptr(),
            partials.data_ptr(),
            flags.data_ptr(),
            m,
            n,
            k,
            NUMBERS[dtype],
            KINDS.index(slices.kind(fmt)),
            fmt.magnitudes,
            0 if bias is None else BIAS_TYPES[bias.dtype],
        )
        if traffic is not None:
            traffic.append(device.traffic())
    assert not flags.any()  # ready for the next launch
    return out


def rows(m, k, dtype, integers=None, seed=2, padding=0):
    """Random x [m, k] of a row stride that is ``padding`` more; of a format's integers where it is given."""
    values = torch.randn(m, k, generator=generator(seed)).to(dtype)
    if integers is not None:
        values = integer_case(integers, k, (m, k), dtype, seed)
    wide = torch.full((m, k + padding), torch.nan, dtype=dtype)
    wide[:, :k] = values
    return wide[:, :k]


def check(dx, y, x, packed, bias=None):
    w = inq.unpack(packed, torch.float64)
    wide = None if bias is None else bias.double()
    if dx:
        exact, dense, unit = x.double() @ w, x @ w.to(x.dtype), w.abs().amax().expand(w.shape[1])
    else:
        exact = torch.nn.functional.linear(x.double(), w, wide)
        # On a processor with AMX torch 2.13 multiplies what lies behind a row of a padded x, too: by zeros, but NaN.
        dense = torch.nn.functional.linear(x.contiguous(), w.to(x.dtype), None if bias is None else bias.to(x.dtype))
        unit = w.abs().amax(1).clamp(min=1e-300)
    assert_as_good_as_dense(y, exact, dense, unit)


def integer_result(dx, x, packed, bias=None):
    parts = (packed.weight, packed.weight_exp, packed.weight_scale)
    if dx:
        return reference.linear_dx(x, *parts, packed.shape[1], packed.format)
    return reference.linear(x, *parts, bias, packed.format)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", fragments.LAYOUTS)
def test_decoded_words(layout, kind):
    """decode.cuh beside fragments.registers, on blocks of random codes."""
    fmt = FORMATS[kind]
    c = fragments.codec(layout, fmt)
    n, k = 64, 4 * c.k_block
    codes = torch.randint(0, 1 << fmt.bits, (n, k), dtype=torch.uint8, generator=generator(3))
    codes[torch.tensor([level is None for level in fmt.code_levels])[codes.long()]] = 0
    weight = fragments.prepack(codes, fmt, layout)
    expected = fragments.registers(weight, fmt, layout)
    halves = expected[..., None] >> torch.tensor([0, 16]) & 0xFFFF
    lifted = torch.where(halves & 0x7FFF > 0, halves + (c.lift << c.unit), halves)
    expected = lifted[..., 0] | lifted[..., 1] << 16 if c.lift else expected
    out = torch.empty(32, 4 * c.steps, dtype=torch.int32)
    for row, block in itertools.product(range(weight.shape[0]), range(weight.shape[1])):
        part = weight[row, block].contiguous()
        said = library().decode(fragments.LAYOUTS.index(layout), KINDS.index(kind), part.data_ptr(), out.data_ptr())
        assert torch.equal(out.long() & 0xFFFFFFFF, expected[row, block])
        assert (said["k_block"], said["k_step"], said["steps"]) == (c.k_block, c.k_step, c.steps)
        assert (said["bytes"], said["words"], said["base"]) == (part.numel(), c.lane_words, c.base)
        assert said["number"] == fragments.LAYOUTS.index(layout)


# --- every kernel -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "kind", "tokens"), LINEAR, ids=str)
def test_linear(dtype, kind, tokens):
    fmt = FORMATS[kind]
    for seed in support_emulator.seeds():
        # Tails everywhere, loads of two bytes, sums that two blocks share.
        m, n, k = tokens - 1, 41, 203
        packed = random_packed(fmt, n, k, scale=bool(seed % 2), seed=seed)
        assert choose(False, 1, m, n, k, dtype, fmt.bits).tokens == tokens
        x = rows(m, k, dtype, integers=fmt)
        bias = torch.randint(-8, 9, (n,), generator=generator(1)).to(dtype) if seed % 2 else None
        assert same_bits(run(False, x, packed, bias, seed) + 0.0, integer_result(False, x, packed, bias) + 0.0)
        # Loads of 16 bytes and more tiles than one.
        m, n, k = tokens, 136, 296
        packed = random_packed(fmt, n, k, seed=seed)
        x = rows(m, k, dtype, padding=8)
        bias = torch.randn(n, generator=generator(1)).to(dtype)
        check(False, run(False, x, packed, bias, seed, sm_count=3), x, packed, bias)


@pytest.mark.parametrize(("dtype", "kind", "tokens"), LINEAR_DX, ids=str)
def test_linear_dx(dtype, kind, tokens):
    fmt = FORMATS[kind]
    for seed in support_emulator.seeds():
        m, n, k = tokens - 1, 131, 75
        packed = random_packed(fmt, n, k, n1=-3, seed=seed)
        assert choose(True, 1, m, n, k, dtype, fmt.bits).tokens == tokens
        grad = rows(m, n, dtype, integers=fmt)
        assert same_bits(run(True, grad, packed, None, seed) + 0.0, integer_result(True, grad, packed) + 0.0)
        m, n, k = tokens, 152, 300
        packed = random_packed(fmt, n, k, scale=bool(seed % 2), seed=seed)
        grad = rows(m, n, dtype)
        check(True, run(True, grad, packed, None, seed, sm_count=3), grad, packed)


INSTANCES = [(False, *each) for each in LINEAR] + [(True, *each) for each in LINEAR_DX]


@pytest.mark.parametrize(("dx", "dtype", "kind", "tokens"), INSTANCES, ids=str)
def test_the_ring_of_stages_turns_over(dx, dtype, kind, tokens):
    """One block with more of the depth than its stages hold; weights are read once."""
    fmt = FORMATS[kind]
    step = 64 if dx else (192 if fmt.bits == 5 else 256) // (1 if tokens < 32 else 2)
    stages = choose(dx, 1, tokens, 16, 16, dtype, fmt.bits, 86).stages
    depth = (stages + 2) * step - 9
    n, k = (depth, 24) if dx else (24, depth)
    choice = choose(dx, 1, tokens, n, k, dtype, fmt.bits, 86)
    assert (choice.tokens, choice.ctas) == (tokens, 1)
    packed, seed = random_packed(fmt, n, k, n1=-3, seed=tokens), INSTANCES.index((dx, dtype, kind, tokens))
    x, traffic = rows(tokens, depth, dtype, integers=fmt, padding=-depth % 8), []
    y = run(dx, x, packed, seed=seed, capability=86, traffic=traffic)
    assert same_bits(y + 0.0, integer_result(dx, x, packed) + 0.0)
    assert traffic[0]["weight"] == (math.prod(layouts.shape(LAYOUTS[dtype], n, k, fmt)), 0)


# --- every way through one --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [Format(2), Format(3), Format(3, "dense")], ids=str)
@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_few_bits(dtype, fmt):
    packed = random_packed(fmt, 33, 70)
    x = rows(3, 70, dtype, integers=fmt)
    assert same_bits(run(False, x, packed) + 0.0, integer_result(False, x, packed) + 0.0)
    packed = random_packed(fmt, 33, 70, n1=2)
    grad = rows(3, 33, dtype, integers=fmt)
    assert same_bits(run(True, grad, packed) + 0.0, integer_result(True, grad, packed) + 0.0)


@pytest.mark.parametrize("dx", [False, True])
@pytest.mark.parametrize(("offset", "padding", "k"), [(0, 0, 64), (0, 8, 72), (4, 0, 66), (0, 2, 70), (2, 1, 65)])
def test_any_alignment_of_rows(offset, padding, k, dx):
    fmt, m = Format(5), 5
    packed = random_packed(fmt, *(((k, 50)) if dx else (50, k)), n1=-1)
    x = rows(m, k, torch.bfloat16, integers=fmt, padding=padding)
    assert same_bits(run(dx, x, packed, offset=offset) + 0.0, integer_result(dx, x, packed) + 0.0)


@pytest.mark.parametrize("dx", [False, True])
@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 7), (3, 5, 0), (1, 1, 1), (9, 16, 64)], ids=str)
def test_small_and_empty(shape, dx):
    m, n, k = shape
    packed = random_packed(Format(4), n, k, n1=0) if n and k else None
    if packed is None:
        weight = torch.zeros(layouts.shape(layouts.STORAGE, n, k, Format(4)), dtype=torch.uint8)
        packed = inq.PackedWeight(weight, torch.zeros(n, 1, dtype=torch.int8), None, Format(4), torch.Size((n, k)))
    x = rows(m, n if dx else k, torch.float16)
    bias = None if dx else torch.randn(n, generator=generator())
    y = run(dx, x, packed, bias)
    w = inq.unpack(packed, torch.float64) if n and k else torch.zeros(n, k, dtype=torch.float64)
    exact = x.double() @ w if dx else x.double() @ w.T + bias.double()
    assert y.shape == exact.shape
    torch.testing.assert_close(y, exact.half(), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("dx", [False, True])
def test_any_number_of_tokens(dx):
    """Above 64 by tiles of tokens."""
    packed = random_packed(Format(4), 100, 140, n1=-2)
    x = rows(150, 100 if dx else 140, torch.float16, integers=Format(4))
    assert choose(dx, 2, 150, 100, 140).m_tiles == (5 if dx else 3)
    assert same_bits(run(dx, x, packed, sm_count=2) + 0.0, integer_result(dx, x, packed) + 0.0)


@pytest.mark.parametrize("dx", [False, True])
def test_a_block_may_have_parts_of_two_tiles(dx):
    """Four blocks share three tiles: the second ends the first tile and begins the second one."""
    n, k = (300, 600) if dx else (300, 1100)
    choice = choose(dx, 2, 3, n, k)
    assert (choice.tiles, choice.units, choice.ctas) == (3, 5, 4)
    packed = random_packed(Format(4), n, k, n1=-2)
    x = rows(3, n if dx else k, torch.float16, integers=Format(4))
    for seed in support_emulator.seeds():
        assert same_bits(run(dx, x, packed, seed=seed, sm_count=2) + 0.0, integer_result(dx, x, packed) + 0.0)


@pytest.mark.parametrize("dx", [False, True])
def test_a_token_has_the_same_sum_whatever_the_others_are(dx):
    packed = random_packed(Format(5), 150, 700) if not dx else random_packed(Format(5), 500, 100)
    x = rows(64, packed.shape[0 if dx else 1], torch.bfloat16)
    whole = run(dx, x, packed, sm_count=4)
    assert choose(dx, 4, 64, *packed.shape, torch.bfloat16, 5).partials > 0
    for m in (1, 8, 15, 30, 40):
        assert same_bits(run(dx, x[:m], packed, sm_count=4, seed=m), whole[:m])


@pytest.mark.parametrize("dx", [False, True])
@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
@pytest.mark.parametrize("n1", [-126, -60, 90, 127])
def test_exponents_at_the_ends(n1, dtype, dx):
    """One factor of the epilogue would be out of range; inf and 0 where the reference has them."""
    fmt = Format(4)
    packed = random_packed(fmt, 40, 70, n1=n1)
    x = torch.full((2, 40 if dx else 70), 2.0**-14 if n1 > 0 else 2.0**12).to(dtype)
    x[:, 1:] = 0
    assert same_bits(run(dx, x, packed) + 0.0, integer_result(dx, x, packed) + 0.0)


@pytest.mark.parametrize("bias", BIAS_TYPES, ids=str)
def test_bias_of_any_type(bias):
    packed = random_packed(Format(4), 40, 70, scale=True)
    x = rows(3, 70, torch.float16, integers=Format(4))
    b = torch.randint(-8, 9, (40,), generator=generator(1)).to(bias)
    assert same_bits(run(False, x, packed, b) + 0.0, integer_result(False, x, packed, b) + 0.0)


def test_not_numbers_stay_in_their_rows():
    packed = random_packed(Format(4), 40, 70)
    x = rows(9, 70, torch.float16)
    clean = run(False, x, packed)
    x[4, 3], x[7, 69] = torch.inf, torch.nan
    y = run(False, x, packed)
    assert not y[4].isfinite().any()
    assert y[7].isnan().all()
    for m in (0, 1, 2, 3, 5, 6, 8):
        assert same_bits(y[m], clean[m])


# --- choose() ---------------------------------------------------------------------------------------------------------

SIZES = [(6144, 4096), (4096, 14336), (57344, 8192), (8192, 28672), (1024, 4096), (16, 100000), (5, 7), (1 << 21, 4096)]


@pytest.mark.parametrize("bits", [4, 5])
@pytest.mark.parametrize("dx", [False, True])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_choices(n, k, dx, bits):
    for sm_count, capability in ((132, 90), (108, 80), (84, 86), (1, 120)):
        first = None
        for m in (1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 4096):
            c = choose(dx, sm_count, m, n, k, torch.float16, bits, capability)
            out, depth = (k, n) if dx else (n, k)
            assert c.m_tiles * c.tokens >= m > (c.m_tiles - 1) * c.tokens
            assert c.tiles * c.rows >= out > (c.tiles - 1) * c.rows
            assert c.units * (64 if dx else 192 if bits == 5 else 256) >= depth
            assert c.shared_bytes <= 99 * 1024
            assert c.warps in (1, 2, 4, 8)
            assert 0 < c.ctas <= c.tiles * c.units
            if m > 64:
                assert (c.ctas, c.partials, c.flags) == (c.tiles, 0, 0)
                continue
            # The order of a token's sum does not depend on the others.
            first = first or c
            assert (c.rows, c.ctas, c.units) == (first.rows, first.ctas, first.units)
            # At most eight parts of a tile, and no more blocks than wanted unless there are more tiles.
            assert c.ctas <= 8 * c.tiles
            assert c.ctas <= sm_count * 2


def test_large_products_keep_32_kilobytes_in_flight():
    for bits, tokens in itertools.product((4, 5), (8, 16, 32, 64)):
        c = choose(False, 132, tokens, 8192, 8192, torch.float16, bits, 90)
        assert c.rows == 128
        # Two blocks an SM; a stage has four blocks of weights, or two, along the depth for each 16 rows.
        assert 2 * (c.stages - 1) * c.rows // 16 * (4 if tokens < 32 else 2) * 512 >= 32 * 1024
        assert 2 * (c.shared_bytes + 1024) <= 227 * 1024
        assert 1.9 * 132 <= c.ctas <= 2 * 132


def test_no_part_is_large():
    """Workspace of products of a few tokens is a small part of the weights'."""
    c = choose(False, 132, 8, 8192, 8192, torch.float16, 4, 90)
    assert 4 * c.partials < 8192 * 8192 / 2 / 8
