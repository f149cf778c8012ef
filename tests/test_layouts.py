"""The layouts: cpu16's words are where its description says, and every layout gives the storage layout back."""

import struct

import pytest
import torch
from support import FORMATS, generator

from inq_kernels import layouts, reference, slices
from inq_kernels.format import Format

SHAPES = [(1, 1), (3, 7), (16, 32), (17, 33), (40, 100), (5, 257)]


def holds(layout, fmt):
    return layout not in slices.LAYOUTS or slices.has(layout, fmt)


def random_codes(fmt, n, k):
    return torch.randint(0, 1 << fmt.bits, (n, k), dtype=torch.uint8, generator=generator(n * k))


HELD = [(layout, fmt) for layout in layouts.LAYOUTS for fmt in FORMATS if holds(layout, fmt)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("layout", "fmt"), HELD, ids=str)
def test_unprepack_undoes_prepack(layout, fmt, shape):
    codes = random_codes(fmt, *shape)
    if layout not in (layouts.STORAGE, layouts.CPU16):  # GPUs' have no place for a code that names no value
        codes[torch.tensor([level is None for level in fmt.code_levels])[codes.long()]] = 0
    stored = reference.pack_codes(codes, fmt.bits)
    laid_out = layouts.prepack(stored, shape[1], fmt, layout)
    assert tuple(laid_out.shape) == layouts.shape(layout, *shape, fmt)
    assert layouts.layout_of(laid_out) == layout
    assert laid_out.data_ptr() != stored.data_ptr()
    assert torch.equal(layouts.unprepack(laid_out, *shape, fmt, layout), stored)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_the_words_of_cpu16(bits):
    fmt = Format(bits)
    codes = random_codes(fmt, 40, 70)
    laid_out = layouts.prepack(reference.pack_codes(codes, bits), 70, fmt, layouts.CPU16)
    for n, k in ((0, 0), (5, 13), (17, 40), (31, 63), (39, 69), (39, 7)):
        tile = laid_out[n // 16, k // 32].numpy().tobytes()
        inside, row = k % 32, n % 16
        (word,) = struct.unpack_from("<I", tile, inside // 8 * 64 + row * 4)
        nibble = word >> (4 * (inside % 8 // 2) + 16 * (inside % 2)) & 15
        if bits == 5:
            (plane,) = struct.unpack_from("<I", tile, 256 + row * 4)
            expected = nibble | (plane >> (15 - inside // 2 + 16 * (inside % 2)) & 1) << 4
        else:
            expected = nibble >> 3 << (bits - 1) | nibble & 7
        assert expected == codes[n, k]


def test_bits_a_weight():
    for bits, expected in ((2, 4), (3, 4), (4, 4), (5, 5)):
        size = torch.Size(layouts.shape(layouts.CPU16, 4096, 14336, Format(bits))).numel()
        assert size * 8 == expected * 4096 * 14336


def test_an_unknown_layout():
    with pytest.raises(ValueError, match=r"^layout: expected one of \('storage', 'cpu16', .*\), got 'tiles'$"):
        layouts.shape("tiles", 1, 1, Format(4))
