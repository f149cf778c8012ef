"""The fragments layouts: what kernels decode from a word is the weight that was put there, for every format."""

import math
import struct

import pytest
import torch
from support import FORMATS, generator

from inq_kernels import fragments, layouts, reference, slices
from inq_kernels.format import Format

SHAPES = [(1, 1), (16, 64), (17, 65), (3, 200), (40, 47), (33, 97), (64, 48)]
HELD = [(layout, fmt) for layout in fragments.LAYOUTS for fmt in FORMATS]
KINDS = {"A": 4, "B": 4, "C": 4, "D": 8, "F": 5, "G": 5, "H": 5, "I": 5, "J": 4, "K": 5}


def canonical_codes(fmt, n, k):
    codes = torch.randint(0, 1 << fmt.bits, (n, k), dtype=torch.uint8, generator=generator(n * k))
    codes[torch.tensor([level is None for level in fmt.code_levels])[codes.long()]] = 0
    return codes


def number(bits, layout):
    """The value of a float's bits, by struct or by e4m3's definition (mantissa 0)."""
    if layout == fragments.FP16:
        return struct.unpack("<e", struct.pack("<H", bits))[0]
    if layout == fragments.BF16:
        return struct.unpack("<f", struct.pack("<I", bits << 16))[0]
    field = bits >> 3 & 15
    assert bits & 7 == 0
    return math.copysign(2.0 ** (field - 7) if field else 0.0, -1 if bits >> 7 else 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("layout", "fmt"), HELD, ids=str)
def test_unprepack_undoes_prepack(layout, fmt, shape):
    codes = canonical_codes(fmt, *shape)
    stored = reference.pack_codes(codes, fmt.bits)
    laid_out = layouts.prepack(stored, shape[1], fmt, layout)
    assert tuple(laid_out.shape) == layouts.shape(layout, *shape, fmt)
    assert laid_out.is_contiguous()
    assert layouts.layout_of(laid_out) == layout
    assert torch.equal(layouts.unprepack(laid_out, *shape, fmt, layout), stored)


@pytest.mark.parametrize(("layout", "fmt"), HELD, ids=str)
def test_a_register_holds_the_numbers_of_its_place(layout, fmt):
    n, k = 35, 150
    codes = canonical_codes(fmt, n, k)
    c = fragments.codec(layout, fmt)
    made = fragments.registers(fragments.prepack(codes, fmt, layout), fmt, layout)
    padded = torch.zeros(made.shape[0] * 16, made.shape[1] * c.k_block, dtype=torch.long)
    padded[:n, :k] = codes
    seen = 0
    for row_block, block in ((0, 0), (made.shape[0] - 1, made.shape[1] - 1)):
        for lane in range(32):
            for r in range(made.shape[3]):
                word = int(made[row_block, block, lane, r])
                step, i = divmod(r, 4)
                for j in range(c.lanes):
                    # The fragment of mma m16n8k16 (PTX ISA), with four numbers a register that of wgmma's k32.
                    row = row_block * 16 + lane // 4 + (8 if i in (1, 3) else 0)
                    at = block * c.k_block + step * 8 * c.lanes + (4 * c.lanes if i >= 2 else 0)
                    at += lane % 4 * c.lanes + j
                    level = fmt.code_levels[padded[row, at]]
                    value = 0.0 if level > 0 else 2.0 ** (c.base - c.lift + fmt.magnitudes - 1 + level)
                    value = -value if padded[row, at] >> (fmt.bits - 1) else value
                    bits = word >> (32 // c.lanes * j) & (1 << 32 // c.lanes) - 1
                    assert number(bits, layout) == value
                    assert bits or value == 0  # zero is +0
                    seen += 1
    assert seen == 2 * 16 * c.k_block


@pytest.mark.parametrize(("layout", "fmt"), HELD, ids=str)
def test_bits_of_a_weight(layout, fmt):
    size = math.prod(fragments.shape(layout, 4096, 4080 if fmt.bits == 5 else 4096, fmt)) * 8 / 4096
    if fmt.bits < 5:
        assert size == 4 * 4096
    elif layout == fragments.E4M3:
        assert size == 5 * 4096
    else:
        assert size * 3 == 16 * 4080


CODECS = {c.name: c for c in fragments._CODECS.values()}


@pytest.mark.parametrize("name", sorted(CODECS))
def test_a_block_is_as_the_names_say(name):
    codec = CODECS[name]
    assert codec.steps == {"H": 2, "D": 2}.get(name, 3 if KINDS[name] == 5 else 4)
    assert codec.k_block == (48 if KINDS[name] == 5 and name != "H" else 64)
    # Finished numbers: a sign, then bits of the exponent field alone.
    for lane in range(codec.lanes):
        part = codec.mask >> lane * codec.width & (1 << codec.width) - 1
        assert part >> (codec.width - 1) == 1
        assert part & (1 << codec.unit) - 1 == 0


@pytest.mark.parametrize("fmt", [Format(5), Format(5, "dense")], ids=str)
def test_sums_are_solved_for_all_neighbours(fmt):
    """Layouts F and G multiply: carries come from other codes of the word, so many words of random codes."""
    layout = fragments.BF16 if fmt.levels == "paper" else fragments.FP16
    codes = canonical_codes(fmt, 512, 9600)
    laid_out = fragments.prepack(codes, fmt, layout)
    assert torch.equal(fragments.unprepack(laid_out, *codes.shape, fmt, layout), codes)


def test_empty():
    for layout, fmt in HELD:
        laid_out = fragments.prepack(torch.zeros(0, 5, dtype=torch.uint8), fmt, layout)
        assert tuple(laid_out.shape) == fragments.shape(layout, 0, 5, fmt)
        assert tuple(fragments.unprepack(laid_out, 0, 5, fmt, layout).shape) == (0, 5)
        laid_out = fragments.prepack(torch.zeros(5, 0, dtype=torch.uint8), fmt, layout)
        assert tuple(fragments.unprepack(laid_out, 5, 0, fmt, layout).shape) == (5, 0)


def test_an_unknown_layout():
    with pytest.raises(ValueError, match=r"^layout: expected one of \('fragments_fp16', .*\), got 'tiles'$"):
        fragments.codec("tiles", Format(4))
    assert slices.layout_of(16) is None


@pytest.mark.parametrize("layout", fragments.LAYOUTS)
def test_what_is_kept_does_not_depend_on_the_default_device(layout):
    """Tables first made where torch makes tensors on another device serve the CPU's all the same."""
    fmt, codes = Format(5), canonical_codes(Format(5), 17, 65)
    expected = fragments.prepack(codes, fmt, layout)
    for cached in (fragments._places, fragments._encode_table, fragments.encode_table):
        cached.cache_clear()
    with torch.device("meta"):
        fragments.encode_table(layout, fmt)
        fragments._places(fragments.codec(layout, fmt))
    assert fragments.encode_table(layout, fmt).device.type == "cpu"
    assert torch.equal(fragments.prepack(codes, fmt, layout), expected)
