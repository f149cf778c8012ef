"""The layouts that GPU kernels decode with shifts and ANDs alone: which bits of a word hold which code.

KERNELS.md's A to I. A row of K weights is cut into S slices of Kq = ceil(K/S) rounded up to 32; word i of the row holds
the codes of weights i, i + Kq, …, i + (S−1)·Kq. Code j of a word q is the finished number ``(XOR of q rotated left by s
for s in shifts[j]) & mask``: sign and exponent lie where the float type has them, the mantissa is 0, and a zero is +0.
There is no subtraction and no table; the row's exponent is a factor of the epilogue. Bits move within a 16-bit (or
8-bit) word, so that two (four) words are decoded in one 32-bit register whatever their neighbours are. As far as the
mask's lowest bit a rotation is a left shift, since what it brings around is masked; by 8 it swaps a word's bytes, one
instruction as well.

The codes of a word are linear functions of its bits over GF(2). Whoever packs solves for the word once: it is the XOR
of one table entry for each code.

``"slices_fp16"`` is uint8 [N, Kq, 2], ``"slices_bf16"`` [N, Kq/2, 4], ``"slices_e4m3"`` [N, Kq, 1]: little-endian
words. Words are full of codes at 4 bits; at 5 they hold three (5.33 bits a weight); 2- and 3-bit weights occupy 4.

Plain torch, as the definition; triton_ops/storage.py does the same.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .format import Format

FP16, BF16, E4M3 = "slices_fp16", "slices_bf16", "slices_e4m3"
LAYOUTS = (FP16, BF16, E4M3)
# The last dimension of a tensor says which it is.
_LAST = {FP16: 2, BF16: 4, E4M3: 1}
# Words of a slice: whole 64-byte pieces, and a tile of any kernel covers a multiple of it.
ALIGN = 32
# The rotation that swaps the bytes of a 16-bit word.
SWAP = 8


@dataclass(frozen=True)
class Codec:
    """How the codes of a word become numbers.

    Attributes:
        width: bits of a word, 16 or 8.
        shifts: for each code of a word, by how much it is rotated left; the results are XORed.
        mask: what is kept of that: the sign's bit, then the bits of the exponent field that are used.
        field: the exponent field's bits of magnitude i are ``field + i``, in units of the lowest bit of the field.
        base: magnitude i decodes to ±2^(base + i).
        unit: the position of the exponent field's lowest bit.
    """

    name: str
    width: int
    shifts: tuple[tuple[int, ...], ...]
    mask: int
    field: int
    base: int
    unit: int

    def __post_init__(self) -> None:
        for s in (s for shifts in self.shifts for s in shifts):
            if s > self.lowest and (self.width, s) != (16, SWAP):
                raise ValueError(
                    f"codec {self.name}: shifts: expected at most {self.lowest}, or {SWAP} of 16-bit words, got {s}: "
                    "bits of the next word would be kept"
                )

    @property
    def lowest(self) -> int:
        """The mask's lowest bit: so far words are shifted, whatever lies beside them."""
        return (self.mask & -self.mask).bit_length() - 1

    @property
    def codes(self) -> int:
        """S, the codes of a word."""
        return len(self.shifts)

    def pattern(self, sign: int, index: int) -> int:
        """The bits of magnitude ``index`` under ``mask``, as the float type has them; 0 for index −1."""
        if index < 0:
            return 0
        bits = sign << (self.width - 1) | (self.field + index) << self.unit
        assert bits & self.mask == bits, (self.name, index)
        return bits

    @functools.cached_property
    def words(self) -> tuple[tuple[int, ...], ...]:
        """words[j][b]: the word whose code j has only bit b of the mask (counted from its lowest) and whose other
        codes are 0. The tables of all patterns follow by XOR."""
        positions = [p for p in range(self.width) if self.mask >> p & 1]
        rows = []  # a row for each bit of each code: which of the word's bits it is the XOR of
        for shifts in self.shifts:
            for p in positions:
                row = 0
                for s in shifts:
                    row ^= 1 << (p - s) % self.width
                rows.append(row)
        solutions = right_inverse(rows)
        step = len(positions)
        return tuple(tuple(solutions[j * step : (j + 1) * step]) for j in range(self.codes))

    def word(self, j: int, pattern: int) -> int:
        """The word whose code j is ``pattern`` and whose other codes are 0."""
        positions = [p for p in range(self.width) if self.mask >> p & 1]
        result = 0
        for b, p in enumerate(positions):
            if pattern >> p & 1:
                result ^= self.words[j][b]
        return result


def right_inverse(rows: list[int]) -> list[int]:
    """For each i a word x with rows[i]·x = 1 and rows[j]·x = 0 for j ≠ i, over GF(2); the rows are independent."""
    # Gauss-Jordan on [rows | identity]: pivot[i] is a column that only reduced row i has.
    work = [(row, 1 << i) for i, row in enumerate(rows)]
    pivots = []
    for i in range(len(work)):
        row, _ = work[i]
        if row == 0:
            raise ValueError("codec: the codes of a word are not independent of each other")
        pivot = row.bit_length() - 1
        pivots.append(pivot)
        for j in range(len(work)):
            if j != i and work[j][0] >> pivot & 1:
                work[j] = (work[j][0] ^ work[i][0], work[j][1] ^ work[i][1])
    # x = Σ over reduced rows r of (combination[r]·e_i) · e_pivot[r]
    return [sum(1 << pivots[r] for r in range(len(work)) if work[r][1] >> i & 1) for i in range(len(work))]


# Of the fewest instructions, found by search: one for each rotation but 0, which codes may share, and one a code.
# KERNELS.md's letters. B, C, F, G and I are not its forms, in which bits of one 16-bit lane count in the other: those
# pair words as they lie in memory, and Triton may pair others.
_CODECS = {
    # 4 bits, four magnitudes or fewer: a flag in the exponent's top bit, then two bits.
    ("paper4", FP16): Codec("A", 16, ((0,), (2,), (8,), (10,)), 0xCC00, 16, 1, 10),
    ("paper4", BF16): Codec("B", 16, ((8,), (4,), (0, 2), (2, 6)), 0xC180, 128, 1, 7),
    # 4 bits, seven magnitudes: the three low bits of the exponent, 0 means 0.
    ("dense4", FP16): Codec("C", 16, ((0,), (7,), (1, 5), (2, 10)), 0x9C00, 1, -14, 10),
    # 5 bits, eight magnitudes: flag and three bits.
    ("paper5", FP16): Codec("I", 16, ((0,), (10,), (2, 5)), 0xDC00, 16, 1, 10),
    ("paper5", BF16): Codec("G", 16, ((0,), (4,), (2, 7)), 0xC380, 128, 1, 7),
    # 5 bits, fifteen magnitudes: the four low bits of the exponent.
    ("dense5", FP16): Codec("F", 16, ((0,), (6,), (1, 10)), 0xBC00, 1, -14, 10),
    # e4m3's exponent has room for all formats of 4 bits in three bits.
    ("paper4", E4M3): Codec("D", 8, ((0,), (1, 3)), 0xB8, 1, -6, 3),
    ("dense4", E4M3): Codec("D", 8, ((0,), (1, 3)), 0xB8, 1, -6, 3),
}


def kind(fmt: Format) -> str:
    """Which words hold a format: its magnitudes decide, and 2 and 3 bits take the place of 4."""
    if fmt.bits < 5:
        return "paper4" if fmt.magnitudes <= 4 else "dense4"
    return "paper5" if fmt.magnitudes <= 8 else "dense5"


def has(layout: str, fmt: Format) -> bool:
    """Whether ``layout`` holds ``fmt``: bfloat16 has no place for "dense" levels, e4m3 none at 5 bits."""
    return (kind(fmt), layout) in _CODECS


def codec(layout: str, fmt: Format) -> Codec:
    """How ``layout`` holds ``fmt``.

    Raises:
        ValueError: there is no such layout, or it does not hold this format.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")
    if not has(layout, fmt):
        raise ValueError(f"layout: {layout!r} does not hold {fmt.bits}-bit {fmt.levels} weights; slices_fp16 holds all")
    return _CODECS[kind(fmt), layout]


def best(dtype: torch.dtype, fmt: Format) -> str:
    """The layout from which products with activations of ``dtype`` are fastest."""
    return BF16 if dtype == torch.bfloat16 and has(BF16, fmt) else FP16


def layout_of(last: int) -> str | None:
    """The layout whose tensors end with a dimension of this size; None if none of these does."""
    return next((layout for layout, size in _LAST.items() if size == last), None)


def words_of_slice(codec: Codec, k: int) -> int:
    """Kq: the words of a row of ``k`` weights."""
    return -(-max(-(-k // codec.codes), 1) // ALIGN) * ALIGN


def shape(layout: str, n: int, k: int, fmt: Format) -> tuple[int, ...]:
    """The shape of an [n, k] weight in ``layout``."""
    c = codec(layout, fmt)
    last = _LAST[layout]
    return n, words_of_slice(c, k) * c.width // 8 // last, last


@functools.lru_cache
def _encode_table(layout: str, fmt: Format) -> tuple[tuple[int, ...], ...]:
    """table[j][code]: the word in which code j is this code of the storage layout; what is not canonical is zero."""
    c = codec(layout, fmt)
    rows = []
    for j in range(c.codes):
        row = []
        for code, level in enumerate(fmt.code_levels):
            index = -1 if level is None or level > 0 else level + fmt.magnitudes - 1
            row.append(c.word(j, c.pattern(code >> (fmt.bits - 1), index)))
        rows.append(tuple(row))
    return tuple(rows)


def encode_table(layout: str, fmt: Format, device: torch.device | str = "cpu") -> Tensor:
    """int32 [S, 2^bits]: the word of each code in each place. A word is the XOR of S entries."""
    return torch.tensor(_encode_table(layout, fmt), dtype=torch.int32, device=device)


def prepack(codes: Tensor, fmt: Format, layout: str) -> Tensor:
    """Codes [N, K] (uint8, as ``reference.unpack_codes`` gives them) as ``layout``: a new tensor."""
    c = codec(layout, fmt)
    n, k = codes.shape
    words = words_of_slice(c, k)
    slices = F.pad(codes.long(), (0, c.codes * words - k)).view(n, c.codes, words)
    table = encode_table(layout, fmt, codes.device).long()
    word = torch.zeros(n, words, dtype=torch.int64, device=codes.device)
    for j in range(c.codes):
        word ^= table[j][slices[:, j]]
    return to_bytes(word, c.width // 8).view(shape(layout, n, k, fmt))


def unprepack(weight: Tensor, n: int, k: int, fmt: Format, layout: str) -> Tensor:
    """The codes [N, K] again, uint8."""
    c = codec(layout, fmt)
    word = from_bytes(weight.reshape(n, -1, c.width // 8))
    codes = []
    for shifts in c.shifts:
        turned = [word << s | word >> (c.width - s) for s in shifts]
        bits = functools.reduce(torch.bitwise_xor, turned) & c.mask
        magnitude = bits & (1 << (c.width - 1)) - 1
        index = (magnitude >> c.unit) - c.field
        fields = torch.tensor([0, *fmt.fields], device=weight.device)
        field = fields[torch.where(magnitude == 0, 0, index + 1).clamp(0, fmt.magnitudes)]
        codes.append((bits >> (c.width - 1)) << (fmt.bits - 1) | field)
    return torch.cat(codes, dim=1)[:, :k].to(torch.uint8)


def to_bytes(words: Tensor, size: int) -> Tensor:
    """The ``size`` low bytes of each word, lowest first: uint8 [..., size]."""
    shifts = torch.arange(0, 8 * size, 8, device=words.device)
    return (words[..., None] >> shifts & 0xFF).to(torch.uint8)


def from_bytes(parts: Tensor) -> Tensor:
    """int64 words of little-endian bytes [..., size]."""
    shifts = torch.arange(0, 8 * parts.shape[-1], 8, device=parts.device)
    return (parts.to(torch.int64) << shifts).sum(-1)
