"""Triton's storage kernels: bit for bit the reference's bytes and weights, and the words of every slices layout."""

import contextlib
import itertools

import numpy as np
import pytest
import torch
from inq_kernels.triton_ops import storage
from support import FORMATS, generator, random_packed, same_bits
from support_triton import DEVICE, SIZES

from inq_kernels import layouts, reference, slices
from inq_kernels.format import Format

pytestmark = pytest.mark.usefixtures("quick_interpreter")
SHAPES = list(itertools.product(SIZES, SIZES))
DTYPES = storage.DTYPES
WORDS = [(layout, fmt) for layout in slices.LAYOUTS for fmt in FORMATS if slices.has(layout, fmt)]
formats = pytest.mark.parametrize("fmt", FORMATS, ids=str)


def some(i):
    """A sixth of the shapes, others for each i: six neighbours have them all. A program takes milliseconds."""
    return [SHAPES[j] for j in range(len(SHAPES)) if (j + j // 6 + i) % 6 == 0]


words = pytest.mark.parametrize(("layout", "fmt"), WORDS, ids=str)


def quiet():
    """numpy, in which Triton's interpreter computes, warns where a number is too large for float16."""
    return np.errstate(over="ignore", invalid="ignore") if DEVICE == "cpu" else contextlib.nullcontext()


def random_bytes(fmt, n, k, seed=0):
    """Any codes at all, canonical or not, in the storage layout."""
    codes = torch.randint(0, 1 << fmt.bits, (n, k), dtype=torch.uint8, generator=generator(seed + n * k))
    return reference.pack_codes(codes, fmt.bits)


def exponents(n, lowest, highest, seed=0):
    return torch.randint(lowest, highest + 1, (n, 1), generator=generator(seed)).to(torch.int8)


def check_pack(w, n1, fmt):
    expected = reference.pack(w, n1, fmt)
    assert same_bits(storage.pack(w.to(DEVICE), n1.to(DEVICE), fmt.bits, fmt.levels).cpu(), expected)


def check_unpack(stored, n1, scale, k, fmt, dtype):
    expected = reference.unpack(stored, n1, scale, k, fmt, dtype)
    on_device = [None if t is None else t.to(DEVICE) for t in (stored, n1, scale)]
    with quiet():
        w = storage.unpack(*on_device, k, fmt.bits, fmt.levels, dtype)
    assert same_bits(w.cpu(), expected)


# --- pack -------------------------------------------------------------------------------------------------------------


@formats
def test_pack_every_shape(fmt, guarded):
    for i, (n, k) in enumerate(some(FORMATS.index(fmt))):
        dtype = DTYPES[i % 3]
        n1 = exponents(n, -3, 3, seed=i)
        w = torch.randn(n, k, generator=generator(i)).to(dtype)
        check_pack(reference.quantize(w, n1, fmt), n1, fmt)


@formats
def test_pack_every_float_of_16_bits(fmt):
    """Subnormals, −0 and values that are no level: rounded as the reference rounds them."""
    half = FORMATS.index(fmt) % 2
    for dtype, n1s in ((torch.float16, ((-24, -3), (-17, 15))), (torch.bfloat16, ((-126, 0), (-118, 127)))):
        w = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        w = torch.where(w.isfinite(), w, 0.0)
        for n1 in n1s[half]:
            check_pack(w.view(32, -1), torch.full((32, 1), n1, dtype=torch.int8), fmt)


@formats
def test_pack_at_the_edges_of_float32(fmt):
    """Every exponent, with mantissas on both sides of where rounding and ties turn."""
    exponent = torch.arange(255, dtype=torch.int32).view(-1, 1, 1) << 23
    mantissa = torch.tensor([0, 1, 0x1FFFFF, 0x200000, 0x200001, 0x3FFFFF, 0x400000, 0x400001, 0x7FFFFF]).int()
    sign = torch.tensor([0, -(2**31)]).int().view(1, -1, 1)
    w = (sign | exponent | mantissa.view(1, 1, -1)).view(torch.float32).reshape(1, -1)
    for n1 in (-126, -120, 127):
        check_pack(w, torch.tensor([[n1]], dtype=torch.int8), fmt)


def test_pack_any_strides_and_shapes(guarded):
    fmt = Format(5)
    w = torch.randn(6, 5, 3, 4, generator=generator())
    n1 = exponents(9, -2, 2)[::2]
    for strided in (w[:5], w[:5].to(memory_format=torch.channels_last), w.transpose(0, 1), w[:5, ::2], w[:5, :1, 0]):
        check_pack(reference.quantize(strided, n1, fmt), n1, fmt)


def test_pack_of_float64():
    with pytest.raises(TypeError, match="w: expected one of .*float16.*, got torch.float64"):
        storage.pack(torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.int8), 4, "paper")


# --- unpack -----------------------------------------------------------------------------------------------------------


@formats
def test_unpack_every_shape(fmt, guarded):
    for i, (n, k) in enumerate(some(FORMATS.index(fmt))):
        scale = None if i % 2 else torch.randn(n, 1, generator=generator(i))
        check_unpack(random_bytes(fmt, n, k), exponents(n, -9, 9, seed=i), scale, k, fmt, DTYPES[i % 3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@formats
def test_unpack_every_exponent(dtype, fmt):
    """Down to the subnormals and up to what the dtype cannot hold; all codes."""
    stored = reference.pack_codes(torch.arange(1 << fmt.bits, dtype=torch.uint8).expand(256, -1), fmt.bits)
    n1 = torch.arange(-128, 128, dtype=torch.int32).to(torch.int8).view(-1, 1)
    # Scales of full mantissas, subnormal and large ones: results are rounded once, wherever they lie.
    mantissa = torch.rand(256, 1, generator=generator()) + 0.5
    scales = [None, torch.zeros(256, 1), mantissa, -mantissa * 2.0**-20, mantissa * 2.0**-127, -mantissa * 2.0**126]
    for scale in scales:
        check_unpack(stored, n1, scale, 1 << fmt.bits, fmt, dtype)


def test_unpack_rounds_ties_of_subnormals_once():
    """Halves of the smallest subnormals of float32 and float16: an even number of them remains."""
    fmt = Format(5, "dense")
    stored = random_bytes(fmt, 64, 100)
    scale = (2 * torch.arange(64) + 1).float().view(-1, 1) * 2.0**-10
    for dtype, n1 in ((torch.float32, -126), (torch.float16, -9), (torch.bfloat16, -118)):
        check_unpack(stored, torch.full((64, 1), n1, dtype=torch.int8), scale, 100, fmt, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpack_into_memory_that_exists(dtype):
    fmt = Format(3)
    packed = random_packed(fmt, 5, 37, scale=True)
    parts = [t.to(DEVICE) for t in (packed.weight, packed.weight_exp, packed.weight_scale)]
    expected = reference.unpack(packed.weight, packed.weight_exp, packed.weight_scale, 37, fmt, dtype)
    # Other strides, and another shape of as many elements.
    for shape in ((5, 37), (37, 5), (5, 37, 1, 1)):
        out = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
        out = out.t() if shape == (37, 5) else out
        assert storage.unpack_(out, *parts, 37, fmt.bits, fmt.levels) is None
        assert same_bits(out.cpu().reshape(5, 37), expected)
    whole = torch.full((7, 37), torch.nan, dtype=dtype, device=DEVICE)
    storage.unpack_(whole[1:6], *parts, 37, fmt.bits, fmt.levels)
    assert same_bits(whole[1:6].cpu(), expected)
    assert whole[0].isnan().all()
    assert whole[6].isnan().all()


def test_unpack_any_strides():
    fmt = Format(4)
    packed = random_packed(fmt, 6, 50, scale=True)
    parts = [torch.cat([t, t.flip(0)], 1)[:, : t.shape[1]] for t in (packed.weight, packed.weight_exp)]
    scale = packed.weight_scale.expand(6, 3)[:, 1:2]
    assert not any(t.is_contiguous() for t in (*parts, scale[::2]))
    check_unpack(*parts, scale, 50, fmt, torch.float32)
    check_unpack(*(t[::2] for t in (*parts, scale)), 50, fmt, torch.float32)
    check_unpack(parts[0], torch.tensor([[3]], dtype=torch.int8).expand(6, 1), None, 50, fmt, torch.float32)


def test_unpack_to_float64():
    packed = random_packed(Format(4), 2, 3)
    with pytest.raises(TypeError, match="dtype: expected one of .*float16.*, got torch.float64"):
        storage.unpack(packed.weight, packed.weight_exp, None, 3, 4, "paper", torch.float64)


# --- layouts ----------------------------------------------------------------------------------------------------------


@words
def test_words_of_every_shape(layout, fmt, guarded):
    for n, k in some(WORDS.index((layout, fmt))):
        stored = random_bytes(fmt, n, k)
        expected = layouts.prepack(stored, k, fmt, layout)
        laid_out = storage.prepack(stored.to(DEVICE), k, fmt.bits, fmt.levels, layout)
        assert same_bits(laid_out.cpu(), expected), (n, k)
        back = storage.unprepack(laid_out, n, k, fmt.bits, fmt.levels, layout)
        assert same_bits(back.cpu(), layouts.unprepack(expected, n, k, fmt, layout)), (n, k)


@words
def test_unprepack_any_words(layout, fmt):
    """Every word there is, with what should be padding in use."""
    for n, k in ((1, 1), (33, 100), (5, 257), (128, 2048)):
        shape = slices.shape(layout, n, k, fmt)
        count = torch.Size(shape).numel() // (1 if layout == slices.E4M3 else 2)
        laid_out = slices.to_bytes(torch.arange(count) * 40503, 1 if layout == slices.E4M3 else 2).view(shape)
        back = storage.unprepack(laid_out.to(DEVICE), n, k, fmt.bits, fmt.levels, layout)
        assert same_bits(back.cpu(), layouts.unprepack(laid_out, n, k, fmt, layout))


@words
def test_the_constants_of_words_are_those_of_the_table(layout, fmt):
    c = slices.codec(layout, fmt)
    table, constants = slices.encode_table(layout, fmt), storage.word_bits(c)
    for j in range(c.codes):
        for code, level in enumerate(fmt.code_levels):
            index = -1 if level is None or level > 0 else level + fmt.magnitudes - 1
            pattern, word = c.pattern(code >> (fmt.bits - 1), index), 0
            for p in range(c.width):
                if pattern >> p & 1:
                    word ^= constants >> c.width * (c.width * j + p) & (1 << c.width) - 1
            assert word == table[j, code]


@formats
@pytest.mark.parametrize("layout", [layouts.STORAGE, layouts.CPU16])
def test_other_layouts(layout, fmt):
    stored = random_bytes(fmt, 17, 33)
    laid_out = storage.prepack(stored.to(DEVICE), 33, fmt.bits, fmt.levels, layout)
    assert same_bits(laid_out.cpu(), layouts.prepack(stored, 33, fmt, layout))
    back = storage.unprepack(laid_out, 17, 33, fmt.bits, fmt.levels, layout)
    assert same_bits(back.cpu(), stored)
    assert back.data_ptr() != laid_out.data_ptr() != stored.data_ptr()


def test_a_layout_that_does_not_hold_the_format():
    stored = random_bytes(Format(5), 2, 8).to(DEVICE)
    with pytest.raises(ValueError, match="layout: 'slices_e4m3' does not hold 5-bit paper weights"):
        storage.prepack(stored, 8, 5, "paper", "slices_e4m3")
    with pytest.raises(ValueError, match=r"layout: .*got 'tiles'"):
        storage.unprepack(stored, 2, 8, 5, "paper", "tiles")


@formats
def test_fields_are_consecutive(fmt):
    """What kernels rely on when they add an index to FIRST."""
    first = storage.fields(fmt)["FIRST"]
    assert fmt.fields == tuple(range(first, first + fmt.magnitudes))
