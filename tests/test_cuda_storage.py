"""The CUDA storage kernels, run by the emulator: bit for bit the reference's bytes and weights, and fragments'."""

import itertools

import pytest
import torch
from support import FORMATS, generator, random_packed, same_bits
from support_emulator import emulated, load, seeds

from inq_kernels import fragments, reference, slices

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 31, 32, 33, 100, 257)
SHAPES = list(itertools.product(SIZES, SIZES))
# slices.kind, in the order of decode.cuh's Levels.
LEVELS = ("paper4", "dense4", "paper5", "dense5")
formats = pytest.mark.parametrize("fmt", FORMATS, ids=str)
layouts = pytest.mark.parametrize("layout", fragments.LAYOUTS)
all_seeds = pytest.mark.parametrize("seed", seeds())


@pytest.fixture(scope="module")
def library():
    return load("storage")


def some(i):
    """A sixth of the shapes, others for each i: six neighbours have them all."""
    return [SHAPES[j] for j in range(len(SHAPES)) if (j + j // 6 + i) % 6 == 0]


def address(t):
    return 0 if t is None else t.data_ptr()


def flags(fmt):
    return {"bits": fmt.bits, "dense": fmt.levels == "dense"}


def random_bytes(fmt, n, k, seed=0):
    """Any codes at all, canonical or not, in the storage layout."""
    codes = torch.randint(0, 1 << fmt.bits, (n, k), dtype=torch.uint8, generator=generator(seed + n * k))
    return reference.pack_codes(codes, fmt.bits)


def exponents(n, lowest, highest, seed=0):
    return torch.randint(lowest, highest + 1, (n, 1), generator=generator(seed)).to(torch.int8)


def check_pack(library, w, n1, fmt, seed=0, offset=0):
    n, k = w.shape
    with emulated(library, seed) as device:
        out = device.output((n, fmt.row_bytes(k)), torch.uint8, "out", offset)
        on_device = device.input(w, "w", offset * w.element_size()), device.input(n1, "n1")
        status = library.pack(
            w=on_device[0].data_ptr(), n1=on_device[1].data_ptr(), out=out.data_ptr(), n=n, k=k, **flags(fmt),
            dtype=DTYPES.index(w.dtype),
        )  # fmt: skip
        assert status == 0 or library._faults()
    assert same_bits(out, reference.pack(w, n1, fmt)), (fmt, w.shape)


def check_unpack(library, stored, n1, scale, k, fmt, dtype, seed=0, offset=0):
    n = len(stored)
    with emulated(library, seed) as device:
        out = device.output((n, k), dtype, "out", offset * torch.empty(0, dtype=dtype).element_size())
        codes, n1_, scale_ = device.input(stored, "codes", offset), device.input(n1, "n1"), device.input(scale, "scale")
        status = library.unpack(
            codes=codes.data_ptr(), n1=n1_.data_ptr(), scale=address(scale_), out=out.data_ptr(), n=n, k=k,
            **flags(fmt), dtype=DTYPES.index(dtype),
        )  # fmt: skip
        assert status == 0 or library._faults()
    assert same_bits(out, reference.unpack(stored, n1, scale, k, fmt, dtype)), (fmt, k, dtype)


# --- pack -------------------------------------------------------------------------------------------------------------


@all_seeds
@formats
def test_pack_every_shape(library, fmt, seed):
    for i, (n, k) in enumerate(some(FORMATS.index(fmt) + seed)):
        n1 = exponents(n, -3, 3, seed=i)
        w = torch.randn(n, k, generator=generator(i)).to(DTYPES[(i + seed) % 3])
        check_pack(library, reference.quantize(w, n1, fmt), n1, fmt, seed, offset=i % 2)


@formats
def test_pack_every_float_of_16_bits(library, fmt):
    """Subnormals, −0 and values that are no level: rounded as the reference rounds them."""
    half = FORMATS.index(fmt) % 2
    for dtype, n1s in ((torch.float16, ((-24, -3), (-17, 15))), (torch.bfloat16, ((-126, 0), (-118, 127)))):
        w = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        w = torch.where(w.isfinite(), w, 0.0)
        for n1 in n1s[half]:
            check_pack(library, w.view(32, -1), torch.full((32, 1), n1, dtype=torch.int8), fmt)


@formats
def test_pack_at_the_edges_of_float32(library, fmt):
    """Every exponent, with mantissas on both sides of where rounding and ties turn."""
    exponent = torch.arange(255, dtype=torch.int32).view(-1, 1, 1) << 23
    mantissa = torch.tensor([0, 1, 0x1FFFFF, 0x200000, 0x200001, 0x3FFFFF, 0x400000, 0x400001, 0x7FFFFF]).int()
    sign = torch.tensor([0, -(2**31)]).int().view(1, -1, 1)
    w = (sign | exponent | mantissa.view(1, 1, -1)).view(torch.float32).reshape(1, -1)
    for n1 in (-126, -120, 127):
        check_pack(library, w, torch.tensor([[n1]], dtype=torch.int8), fmt)


# --- unpack -----------------------------------------------------------------------------------------------------------


@all_seeds
@formats
def test_unpack_every_shape(library, fmt, seed):
    for i, (n, k) in enumerate(some(FORMATS.index(fmt) + seed)):
        scale = None if i % 2 else torch.randn(n, 1, generator=generator(i))
        dtype = DTYPES[(i + seed) % 3]
        check_unpack(library, random_bytes(fmt, n, k), exponents(n, -9, 9, seed=i), scale, k, fmt, dtype, seed, i % 3)


@formats
def test_unpack_every_code_with_every_exponent(library, fmt):
    """All 256 n1 of a byte: in 16 bits they over- and underflow, and subnormals are exact. Row scales round the result
    or leave the range, in both directions; one is 0, one is negative."""
    n1 = torch.arange(-128, 128, dtype=torch.int32).to(torch.int8).view(-1, 1)
    codes = torch.arange(1 << fmt.bits, dtype=torch.uint8).expand(256, -1)
    stored = reference.pack_codes(codes, fmt.bits)
    scale = torch.randn(256, 1, generator=generator(1)) * torch.exp2(
        torch.randint(-40, 41, (256, 1), generator=generator(2)).float()
    )
    scale[::17] = 0
    for dtype in DTYPES:
        for s in (None, scale):
            check_unpack(library, stored, n1, s, 1 << fmt.bits, fmt, dtype)


# --- fragments --------------------------------------------------------------------------------------------------------


def run_fragments(library, name, source, out_shape, table, n, k, fmt, layout, seed, offset):
    number = {"number": fragments.LAYOUTS.index(layout), "levels": LEVELS.index(slices.kind(fmt))}
    with emulated(library, seed) as device:
        out = device.output(out_shape, torch.uint8, "out", offset if name == "unprepack" else 0)
        source = device.input(source, "source", offset if name == "prepack" else 0)
        if name == "prepack":
            where = {
                "codes": source.data_ptr(),
                "out": out.data_ptr(),
                "table": device.input(table, "table").data_ptr(),
            }
        else:
            where = {"fragments": source.data_ptr(), "codes": out.data_ptr()}
        status = getattr(library, name)(**where, n=n, k=k, **flags(fmt), **number)
        assert status == 0 or library._faults()
    return out


@layouts
@formats
def test_fragments_every_shape(library, fmt, layout):
    codec = fragments.codec(layout, fmt)
    table = fragments._encode_table(codec, fmt).to(torch.int32)
    for seed in seeds():
        for i, (n, k) in enumerate(some(FORMATS.index(fmt) + fragments.LAYOUTS.index(layout) + seed)[:3]):
            stored = random_packed(fmt, n, k, seed=i).weight
            expected = fragments.prepack(reference.unpack_codes(stored, fmt.bits, k), fmt, layout)
            made = run_fragments(library, "prepack", stored, expected.shape, table, n, k, fmt, layout, seed, i)
            assert torch.equal(made, expected), (n, k)
            back = run_fragments(library, "unprepack", made, stored.shape, None, n, k, fmt, layout, seed, i)
            assert torch.equal(back, stored), (n, k)


@layouts
@formats
def test_codes_that_are_not_canonical(library, fmt, layout):
    """Codes of all kinds, and codes in the padding: as the definition has them."""
    n, k = 5, 141
    codec = fragments.codec(layout, fmt)
    table = fragments._encode_table(codec, fmt).to(torch.int32)
    stored = random_bytes(fmt, n, k)
    stored[:, -1] |= 0xC0
    expected = fragments.prepack(reference.unpack_codes(stored, fmt.bits, k), fmt, layout)
    made = run_fragments(library, "prepack", stored, expected.shape, table, n, k, fmt, layout, 0, 0)
    assert torch.equal(made, expected)


@layouts
@formats
def test_unprepack_any_words(library, fmt, layout):
    """No word makes it read or write out of bounds, and each gives the definition's codes."""
    n, k = 17, 70
    words = torch.randint(0, 256, fragments.shape(layout, n, k, fmt), dtype=torch.uint8, generator=generator(3))
    codes = fragments.unprepack(words, n, k, fmt, layout)
    expected = reference.pack_codes(codes, fmt.bits)
    made = run_fragments(library, "unprepack", words, expected.shape, None, n, k, fmt, layout, 0, 1)
    assert torch.equal(made, expected)
