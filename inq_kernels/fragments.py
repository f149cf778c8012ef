"""The layouts "fragments" that CUDA kernels read: words as the lanes of a warp hold a tensor core's A operand.

A weight is cut into blocks of 16 rows × ``step · steps`` k. Lane l = 4g + t of a warp owns the 16 bytes at 16·l of a
block, four little-endian words w0…w3 (and at 5 bits for e4m3 a fifth, w4, at 512 + 4·l), and decodes them into
registers in the order in which an mma wants them: register 4s + i is register i of step s.

- ``"fragments_fp16"``, ``"fragments_bf16"``: mma.sync m16n8k16. Register i of step s has row g + 8·(i % 2) and
  k = 16·s + 8·(i // 2) + 2·t, + 1, the lower k in the low half. A block has 4 steps, at 5 bits 3 (six codes a word).
- ``"fragments_e4m3"``: wgmma m64k32, 16 rows of its 64. Register i of step s has row g + 8·(i % 2) and
  k = 32·s + 16·(i // 2) + 4·t, … + 3, the lowest k in the lowest byte. A block has 2 steps.

How registers follow from words is KERNELS.md's layouts A to I; J and K are dense levels for bfloat16. Registers are
finished numbers: sign and exponent in the float's place, mantissa 0, a zero is +0. csrc/cuda/decode.cuh has the same
expressions. All but two kinds are linear over GF(2) in the bits of the words, so a word is the XOR of one table entry
for each code; "F" and "G" multiply, and ``_solve_sum`` finds the bits that are still open from the lowest up.

The tensors are uint8 [ceil(N/16), ceil(K/block), 32, 16] for fp16, […, 64, 8] for bf16, […, 128, 4] for e4m3 (at 5
bits […, 160, 4]): the last size tells them apart. Rows and k past the end hold zero codes. 2- and 3-bit weights are
held as 4-bit ones.

Plain torch, as the definition; csrc/cuda/storage.cu does the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import slices
from .format import Format

FP16, BF16, E4M3 = "fragments_fp16", "fragments_bf16", "fragments_e4m3"
LAYOUTS = (FP16, BF16, E4M3)
# The last two dimensions: bytes of a block's first four words a lane, in pieces that tell the layouts apart.
_LAST = {FP16: 16, BF16: 8, E4M3: 4}
ROWS, _LANES = 16, 32
_WORD = 0xFFFFFFFF

# A 32-bit word, or many: a Python int or an int64 tensor.
Word = Any


def _rotl(q: Word, s: int) -> Word:
    return (q << s | q >> (32 - s)) & _WORD


def _layout_c(q: Word) -> list[Word]:
    t = (q << 2) ^ _rotl(q, 4)
    return [q, q << 8, t, (t & 0x009C009C) << 8]


def _layout_j(q: Word) -> list[Word]:
    t = (q << 4) ^ _rotl(q, 11)
    return [q, q << 3, t, (t & 0x10701070) << 3]


def _layout_h(*w: Word) -> list[Word]:
    return [*w, w[0] << 5 ^ w[1] << 3, w[2] << 5 ^ w[3] << 3, w[1] << 2 ^ w[3] << 1 ^ w[4] << 5]


@dataclass(frozen=True)
class Codec:
    """How words become registers.

    Attributes:
        lanes: numbers in a register, 2 or 4.
        words: words that are decoded together.
        registers: from those words, what ``& mask`` makes the registers of.
        mask: which bits of a register are used: for each number the sign and bits of the exponent field.
        field: the exponent field of magnitude i is ``field + i``, in units of bit ``unit`` of a number.
        base: magnitude i decodes to ±2^(base + i), ``lift`` included.
        lift: the power of two that kernels multiply registers by.
        factor: the sum form's multiplier, where the last register is ``q·factor & mask``; else 0.
    """

    name: str
    lanes: int
    words: int
    registers: Callable[..., list[Word]]
    mask: int
    field: int
    base: int
    unit: int
    lift: int = 0
    factor: int = 0

    @property
    def width(self) -> int:
        """Bits of a number."""
        return 32 // self.lanes

    @property
    def count(self) -> int:
        """Registers from ``words`` words."""
        return len(self.registers(*[0] * self.words))

    @property
    def steps(self) -> int:
        """Steps of a block, four registers each, from its four (or five) words a lane."""
        return self.count * (4 if self.words == 1 else 1) // 4

    @property
    def k_step(self) -> int:
        """k of a step: 16 for two numbers a register, 32 for four."""
        return 8 * self.lanes

    @property
    def k_block(self) -> int:
        return self.steps * self.k_step

    @property
    def lane_words(self) -> int:
        """Words of a lane in a block."""
        return 4 if self.words == 1 else self.words

    def pattern(self, sign: int, index: int) -> int:
        """The bits of magnitude ``index`` as the float type has them, before ``lift``; 0 for index −1."""
        if index < 0:
            return 0
        bits = sign << (self.width - 1) | (self.field + index) << self.unit
        assert bits & self.mask == bits, (self.name, index)
        return bits

    @functools.cached_property
    def bits(self) -> dict[tuple[int, int], int]:
        """[register, bit] -> the words (w0 lowest) of which only this bit of this register follows; for a sum form
        of the last register only the place where it is wanted, word 1."""
        places = [p for p in range(32) if self.mask >> p & 1]
        linear = self.count - (1 if self.factor else 0)
        rows = []
        for r in range(linear):
            for p in places:
                row = 0
                for source in range(32 * self.words):
                    unit = [1 << source - 32 * w if 0 <= source - 32 * w < 32 else 0 for w in range(self.words)]
                    row |= (self.registers(*unit)[r] >> p & 1) << source
                rows.append(row)
        solved = dict(zip([(r, p) for r in range(linear) for p in places], slices.right_inverse(rows), strict=True))
        return solved | {(r, p): 1 << 32 + p for r in range(linear, self.count) for p in places}


def _shifts(*shifts: int) -> Callable[..., list[Word]]:
    return lambda q: [q << s for s in shifts]


# e4m3's exponent has room for all levels: "paper" codes are held as dense ones.
_D = Codec("D", 4, 1, lambda q: [q, q << 1 ^ q << 3], 0xB8B8B8B8, 1, -6, 3)
_H = Codec("H", 4, 5, _layout_h, 0xF8F8F8F8, 1, -6, 3)
# Rotations take whole words: all others are left shifts, whose bits past 31 fall to the mask.
_CODECS = {
    ("paper4", FP16): Codec("A", 2, 1, _shifts(0, 2, 8, 10), 0xCC00CC00, 16, 1, 10),
    ("paper4", BF16): Codec("B", 2, 1, lambda q: [q, q << 2, q << 4, q << 6 ^ q << 14], 0xC180C180, 128, 1, 7),
    ("dense4", FP16): Codec("C", 2, 1, _layout_c, 0x9C009C00, 1, -14, 10),
    ("dense4", BF16): Codec("J", 2, 1, _layout_j, 0x83808380, 1, 0, 7, 126),
    ("paper5", FP16): Codec("I", 2, 1, lambda q: [q, q << 6, q << 8 ^ q << 11], 0xDC00DC00, 16, 1, 10),
    ("paper5", BF16): Codec("G", 2, 1, lambda q: [q, q << 4, q * 132], 0xC380C380, 128, 1, 7, 0, 132),
    ("dense5", FP16): Codec("F", 2, 1, lambda q: [q, q << 6, q * 1026], 0xBC00BC00, 1, -14, 10, 0, 1026),
    ("dense5", BF16): Codec("K", 2, 1, lambda q: [q, q << 4, q << 7 ^ _rotl(q, 13)], 0x87808780, 1, 0, 7, 126),
    ("paper4", E4M3): _D,
    ("dense4", E4M3): _D,
    ("paper5", E4M3): _H,
    ("dense5", E4M3): _H,
}


def codec(layout: str, fmt: Format) -> Codec:
    """How ``layout`` holds ``fmt``: each holds all formats.

    Raises:
        ValueError: there is no such layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")
    return _CODECS[slices.kind(fmt), layout]


def layout_of(last: int) -> str | None:
    """The layout whose tensors end with a dimension of this size; None if none of these does."""
    return next((layout for layout, size in _LAST.items() if size == last), None)


def shape(layout: str, n: int, k: int, fmt: Format) -> tuple[int, ...]:
    """The shape of an [n, k] weight in ``layout``."""
    c = codec(layout, fmt)
    last = _LAST[layout]
    return -(-n // ROWS), -(-k // c.k_block), 4 * _LANES * c.lane_words // last, last


@functools.lru_cache
def _places(c: Codec) -> Tensor:
    """Where a block [16, k_block] has the codes of [lane, group of words, register, number], flat. On the CPU whatever
    torch's default device is, as what is kept for others must be."""
    lane = torch.arange(_LANES, device="cpu").view(-1, 1, 1)
    register = torch.arange(4 * c.steps, device="cpu").view(1, -1, 1)
    number = torch.arange(c.lanes, device="cpu").view(1, 1, -1)
    step, i = register // 4, register % 4
    row = lane // 4 + 8 * (i % 2)
    k = step * c.k_step + c.k_step // 2 * (i // 2) + c.lanes * (lane % 4) + number
    return (row * c.k_block + k).view(_LANES, c.lane_words // c.words, c.count, c.lanes)


@functools.lru_cache
def _encode_table(c: Codec, fmt: Format) -> Tensor:
    """int64 [register, number, code, word]: what a code adds, by XOR, to the words that it is in (``Codec.bits``); what
    is not canonical is zero."""
    words = c.words + (1 if c.factor else 0)
    table = torch.zeros(c.count, c.lanes, len(fmt.code_levels), words, dtype=torch.int64, device="cpu")
    for code, level in enumerate(fmt.code_levels):
        index = -1 if level is None or level > 0 else level + fmt.magnitudes - 1
        pattern = c.pattern(code >> (fmt.bits - 1), index)
        for register in range(c.count):
            for number in range(c.lanes):
                total = 0
                for p in range(c.width):
                    if pattern >> p & 1:
                        total ^= c.bits[register, number * c.width + p]
                for w in range(words):
                    table[register, number, code, w] = total >> 32 * w & _WORD
    return table


@functools.lru_cache
def encode_table(layout: str, fmt: Format) -> Tensor:
    """What csrc/cuda/storage.cu packs by: ``_encode_table`` as int32, on the CPU."""
    return _encode_table(codec(layout, fmt), fmt).to(torch.int32)


def _solve_f(q: Tensor, wanted: Tensor) -> Tensor:
    """``q`` with its open bits such that q·1026 has ``wanted`` under layout F's mask: (q << 1) + (q << 10).

    From the lowest bit up; a copy of bit 15 in bit 24 makes the carry into bit 26 bit 15, whatever bits 16 to 19 are.
    """

    def missing(bit: int, bits: int) -> Tensor:
        return (wanted >> bit) - (q * 1026 >> bit) & bits

    q = q | missing(10, 15)
    q = q ^ missing(15, 1) << 14
    q = q | (q >> 15 & 1) << 24
    q = q | missing(26, 15) << 16
    return q ^ missing(31, 1) << 30


def _solve_g(q: Tensor, wanted: Tensor) -> Tensor:
    """The same for q·132 and layout G: (q << 2) + (q << 7). Bits 16 to 18 give bits 23 to 25, into which they carry, so
    both carries are tried, and where neither is consistent, again with the free bit 22: always enough (all tried)."""

    def missing(word: Tensor, bit: int, bits: int) -> Tensor:
        return (wanted >> bit) - (word * 132 >> bit) & bits

    q = q | missing(q, 7, 7)
    q = q | missing(q, 14, 3) << 12
    result = None
    for free, carry in ((1, 1), (1, 0), (0, 1), (0, 0)):
        trial = q | free << 22
        trial = trial | (missing(trial, 23, 7) - carry & 7) << 16
        trial = trial | missing(trial, 30, 3) << 28
        right = trial * 132 & 0xC380C380 == wanted
        result = trial if result is None else torch.where(right, trial, result)
    return result


_SOLVE_SUM = {"F": _solve_f, "G": _solve_g}


def prepack(codes: Tensor, fmt: Format, layout: str) -> Tensor:
    """Codes [N, K] (uint8, as ``reference.unpack_codes`` gives them) as ``layout``: a new tensor."""
    c = codec(layout, fmt)
    n, k = codes.shape
    rows, blocks = shape(layout, n, k, fmt)[:2]
    tiles = F.pad(codes.long(), (0, blocks * c.k_block - k, 0, rows * ROWS - n))
    tiles = tiles.view(rows, ROWS, blocks, c.k_block).transpose(1, 2).reshape(rows, blocks, ROWS * c.k_block)
    # [row, block, lane, group of words, register, number]
    placed = tiles[:, :, _places(c).to(codes.device)]
    table = _encode_table(c, fmt).to(codes.device)
    words: list[Any] = [0] * table.shape[3]
    for register in range(c.count):
        for number in range(c.lanes):
            for w in range(table.shape[3]):
                words[w] = words[w] ^ table[register, number, :, w][placed[..., register, number]]
    if c.name in _SOLVE_SUM:
        words = [_SOLVE_SUM[c.name](*words)]
    # [row, block, lane, word]
    word = torch.stack(words, dim=-1).reshape(rows, blocks, _LANES, c.lane_words)
    parts = [slices.to_bytes(w, 4).flatten(2) for w in word.split(4, dim=-1)]
    return torch.cat(parts, dim=2).view(shape(layout, n, k, fmt))


def unprepack(weight: Tensor, n: int, k: int, fmt: Format, layout: str) -> Tensor:
    """The codes [N, K] again, uint8."""
    c = codec(layout, fmt)
    magnitude_mask = (1 << (c.width - 1)) - 1
    numbers = registers(weight, fmt, layout)[..., None] >> torch.arange(0, 32, c.width, device=weight.device)
    index = ((numbers & magnitude_mask) >> c.unit) - c.field
    fields = torch.tensor([0, *fmt.fields], device=weight.device)
    field = fields[torch.where(numbers & magnitude_mask == 0, 0, index + 1).clamp(0, fmt.magnitudes)]
    codes = (numbers >> (c.width - 1) & 1) << (fmt.bits - 1) | field
    rows, blocks = weight.shape[:2]
    tiles = torch.empty(rows, blocks, ROWS * c.k_block, dtype=torch.uint8, device=weight.device)
    tiles[:, :, _places(c).to(weight.device).flatten()] = codes.to(torch.uint8).flatten(2)
    tiles = tiles.view(rows, blocks, ROWS, c.k_block).transpose(1, 2)
    return tiles.reshape(rows * ROWS, blocks * c.k_block)[:n, :k]


def registers(weight: Tensor, fmt: Format, layout: str) -> Tensor:
    """What kernels decode ``weight`` to: int64 [row, block, lane, register], before ``lift``."""
    c = codec(layout, fmt)
    rows, blocks = weight.shape[:2]
    data = weight.flatten(2)
    parts = [part.view(rows, blocks, _LANES, part.shape[2] // 128, 4) for part in data.split(512, dim=2)]
    words = torch.cat([slices.from_bytes(part) for part in parts], dim=3)
    groups = words.view(rows, blocks, _LANES, c.lane_words // c.words, c.words)
    made = [register & c.mask for register in c.registers(*groups.unbind(-1))]
    return torch.stack(made, dim=-1).flatten(3)
