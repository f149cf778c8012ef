"""The words of slices.py: what shifts and a mask make of them is the number, in PTX as in the plain form."""

import re

import pytest
import torch
from support import FORMATS, generator

from inq_kernels import slices
from inq_kernels.format import Format

pytest.importorskip("triton")
from inq_kernels.triton_ops import codec as triton_codec

HELD = [(layout, fmt) for layout in slices.LAYOUTS for fmt in FORMATS if slices.has(layout, fmt)]
FLOATS = {slices.FP16: torch.float16, slices.BF16: torch.bfloat16, slices.E4M3: torch.float8_e4m3fn}
INTS = {16: torch.int16, 8: torch.int8}


def run_ptx(text, word):
    """The instructions of the codecs on a 32-bit register; $0 … are results, the last operand is the word."""
    count = max(map(int, re.findall(r"\$(\d+)", text)))
    registers = {f"${count}": word}
    declared, *lines = [line.strip() for line in text.strip("{} ").split(";") if line.strip()]
    assert declared.startswith(".reg .b32 q")
    for line in lines:
        name, rest = line.split(" ", 1)
        to, *given = [part.strip() for part in rest.split(",")]
        values = [registers[g] if g in registers else int(g, 0) for g in given]
        if name == "mov.b32":
            registers[to] = values[0]
        elif name == "shl.b32":
            registers[to] = values[0] << values[1] & 0xFFFFFFFF
        elif name == "prmt.b32":
            *ab, selector = values
            parts = b"".join(v.to_bytes(4, "little") for v in ab)
            registers[to] = int.from_bytes([parts[selector >> 4 * i & 7] for i in range(4)], "little")
        elif name == "and.b32":
            registers[to] = values[0] & values[1]
        elif name == "lop3.b32":
            a, b, c, table = values
            registers[to] = sum(
                (table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i for i in range(32)
            )
        else:
            raise AssertionError(f"unknown instruction {name}")
    return [registers[f"${j}"] for j in range(count)]


def lanes(register, width, float_type):
    """A 32-bit register as numbers of ``float_type``."""
    values = [register >> at & (1 << width) - 1 for at in range(0, 32, width)]
    signed = [v - (1 << width) if v >> (width - 1) else v for v in values]
    return torch.tensor(signed, dtype=INTS[width]).view(float_type).float().tolist()


@pytest.mark.parametrize(("layout", "fmt"), HELD, ids=str)
def test_words_hold_every_code_in_every_place(layout, fmt):
    """A word made of any codes decodes to their values: by the codec's own shifts, and by PTX next to other words."""
    c = slices.codec(layout, fmt)
    n, k = 6, 96 * c.codes
    codes = torch.randint(0, 1 << fmt.bits, (n, k), generator=generator(), dtype=torch.uint8)
    words = slices.from_bytes(slices.prepack(codes, fmt, layout).reshape(n, -1, c.width // 8))
    slice_length = words.shape[1]
    assert slice_length == 96

    def value(code):
        level = fmt.code_levels[code]
        if level is None or level > 0:
            return 0.0
        return (-1.0 if code >> (fmt.bits - 1) else 1.0) * 2.0 ** (c.base + level + fmt.magnitudes - 1)

    text = triton_codec.assembly(c)
    per_register = 32 // c.width
    for row in range(n):
        for at in range(0, slice_length, per_register):
            register = sum(int(words[row, at + i]) << (c.width * i) for i in range(per_register))
            for j, result in enumerate(run_ptx(text, register)):
                got = lanes(result, c.width, FLOATS[layout])
                expected = [value(int(codes[row, j * slice_length + at + i])) for i in range(per_register)]
                assert got == expected


@pytest.mark.parametrize(("layout", "fmt"), HELD, ids=str)
def test_the_plain_form_means_what_the_assembly_does(layout, fmt):
    """For words of any bits, codes or not."""
    c = slices.codec(layout, fmt)
    constants = triton_codec.decoder(layout, fmt).constants
    text = triton_codec.assembly(c)
    for w in some_words(c.width):
        for j, result in enumerate(run_ptx(text, w)):
            first, second = constants["SHIFTS"] >> (10 * j) & 31, constants["SHIFTS"] >> (10 * j + 5) & 31
            bits = rotated(w, first, c.width) ^ (0 if second == 31 else rotated(w, second, c.width))
            bits &= constants["MASK"]
            assert result & (1 << c.width) - 1 == bits
            magnitude = bits & (1 << (c.width - 1)) - 1
            number = 2.0 ** ((magnitude >> constants["UNIT"]) - constants["FIELD"] + constants["BASE"])
            expected = 0.0 if magnitude == 0 else -number if bits >> (c.width - 1) else number
            got = lanes(result, c.width, FLOATS[layout])[0]
            # Bits that are no code may be a number that the float type has and the codec does not name.
            if magnitude == 0 or (magnitude >> constants["UNIT"]) - constants["FIELD"] >= 0:
                assert got == expected


def rotated(word, by, width):
    return (word << by | word >> (width - by)) & (1 << width) - 1


def some_words(width):
    """Every 8-bit word, and some thousands of the 16-bit ones."""
    return range(1 << width) if width == 8 else range(0, 1 << width, 37)


def test_instructions_a_weight():
    """KERNELS.md's counts for one register of words: A 7 for 8 weights, B 8, D 4, I 6 for 6. C, F and G are one more
    than there, where bits of one word count in its neighbour."""
    counted = {
        c.name: (triton_codec.assembly(c).count(";") - 2, c.codes * 32 // c.width) for c in slices._CODECS.values()
    }
    assert counted == {"A": (7, 8), "B": (8, 8), "C": (9, 8), "D": (4, 8), "F": (6, 6), "G": (6, 6), "I": (6, 6)}


@pytest.mark.parametrize(("layout", "fmt"), HELD, ids=str)
@pytest.mark.parametrize("k", [4096, 14336, 28672])
def test_bits_a_weight(layout, fmt, k):
    size = torch.Size(slices.shape(layout, 64, k, fmt)).numel()
    assert size * 8 / (64 * k) <= (4.1 if fmt.bits < 5 else 5.4)


def test_codes_that_depend_on_each_other_are_refused():
    with pytest.raises(ValueError, match="not independent"):
        _ = slices.Codec("wrong", 16, ((0,), (1,), (8,), (10,)), 0xCC00, 16, 1, 10).words


def test_bits_of_the_next_word_are_refused():
    for width, wrong in ((16, 14), (16, 9), (8, 8)):
        message = f"codec wrong: shifts: expected at most 7, or 8 of 16-bit words, got {wrong}: bits of the next word"
        with pytest.raises(ValueError, match=message):
            slices.Codec("wrong", width, ((0,), (2,), (4,), (6, wrong)), 0xC180 if width == 16 else 0x80, 128, 1, 7)


def test_a_layout_that_does_not_hold_a_format():
    with pytest.raises(ValueError, match="'slices_bf16' does not hold 4-bit dense weights; slices_fp16 holds all"):
        slices.shape(slices.BF16, 1, 1, Format(4, "dense"))
    with pytest.raises(ValueError, match="layout: expected one of"):
        slices.codec("tiles", Format(4))
