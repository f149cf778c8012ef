"""Entropy-coded codes: a packed weight's storage layout in fewer bytes, for files alone, and bit for bit back again.

The codes of a weight, row after row without their padding, become *symbols* of a byte each: as many neighbouring codes
as a byte holds (4, 2, 2 and 1 at 2, 3, 4 and 5 bits), the first in the lowest bits. At 3 and 5 bits, where they do not
fill the byte, each block of 131,072 symbols, with zeros up to a multiple of eight, is in the order 0, 8, 16, …, 1, 9,
…, so that whole rows of symbols make the layout's bytes. zstd codes the symbols: a Huffman code for every 128 KiB, and
references where bytes repeat.

No symbol takes less than a bit of it, so it is far from the entropy where most codes are zero. There the zeros are
taken out first: a *mask* has one bit a code, the first code's the lowest of a byte, set where the code is not zero; and
the codes that are left are symbols of their own, as numbers in the list of those that occur, 8, 4, 2 or 1 to a byte.
Where the bytes of the mask are mostly zero, the same is done to them.

What is stored of a weight is its *streams*, each one zstd frame or, without a symbol, nothing: the last mask, the bytes
of the mask before it that are not zero, …, the codes that are not zero. How many symbols a stream must hold follows
from the weight's shape and the masks before it. Never more is asked of the decoder, whatever its own headers say.

bench/compress.py measures this beside other coders and other symbols.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import files
from .files import CheckpointError
from .format import Format

if TYPE_CHECKING:  # numpy comes when it is used, and zstandard is optional
    import numpy as np
    from numpy import ndarray

CODER = "zstd"
# How many times zeros may be taken out. A mask has an eighth of the bytes of what it is a mask of.
MAX_ZEROS = 3
# A decoded weight is at most so many times larger than what is stored of it, so that a small file cannot fill the
# memory. Where a coding is smaller than that, zero bytes follow its streams.
MAX_RATIO = 64
# The window of a frame: the memory that its decoder takes, and how far Huffman codes reach.
_WINDOW_LOG = 17
# Where more symbols than this are not zero, taking out zeros makes nothing smaller: by measurement.
_FEW_ZEROS = 0.75
# Of a zstd block's header: one byte follows, that is repeated.
_REPEATED = 1
# Symbols of a block, which are decoded at a time: they and what is made of them stay in a cache.
_BLOCK = 1 << 17
_KEYS = {"coder", "zeros", "values", "streams", "sha256"}


@dataclass(frozen=True)
class Coding:
    """How the codes of one weight are stored.

    Attributes:
        zeros: how many times zeros were taken out.
        values: the codes other than zero that occur, ascending; empty where no zeros were taken out.
        streams: the bytes of each stream, in the order of the file.
        sha256: of the storage layout that they decode to.
    """

    zeros: int
    values: tuple[int, ...]
    streams: tuple[int, ...]
    sha256: str

    @property
    def name(self) -> str:
        """For people."""
        return f"{CODER}, zeros out {self.zeros}×" if self.zeros else CODER

    def to_json(self) -> dict[str, object]:
        """What the manifest holds."""
        lists = {"values": list(self.values), "streams": list(self.streams)}
        return {"coder": CODER, "zeros": self.zeros, **lists, "sha256": self.sha256}


def read_coding(where: str, value: object, bits: int) -> Coding:
    """The coding that a manifest describes. Raises CheckpointError if it is none."""
    where = f"{where}: coding"
    if not isinstance(value, dict) or set(value) != _KEYS:
        got = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise CheckpointError(f"{where}: expected exactly {', '.join(sorted(_KEYS))}, got {got}")
    zeros, values, streams = value["zeros"], value["values"], value["streams"]
    if value["coder"] != CODER:
        raise CheckpointError(f"{where}: coder: expected {CODER!r}, got {str(value['coder'])[:80]!r}")
    if not files.is_int(zeros, 0, MAX_ZEROS):
        raise CheckpointError(f"{where}: zeros: expected an integer in [0, {MAX_ZEROS}], got {str(zeros)[:80]}")
    ascending = isinstance(values, list) and all(files.is_int(v, 1, (1 << bits) - 1) for v in values)
    if not ascending or any(a >= b for a, b in pairwise(values)) or (values and not zeros):
        allowed = f"ascending codes in [1, {(1 << bits) - 1}]" if zeros else "none, since no zeros are taken out"
        raise CheckpointError(f"{where}: values: expected {allowed}, got {str(values)[:80]}")
    sizes = isinstance(streams, list) and all(files.is_int(s, 0, files.MAX_ELEMENTS) for s in streams)
    if not sizes or len(streams) != zeros + 1:
        raise CheckpointError(f"{where}: streams: expected the bytes of each of {zeros + 1}, got {str(streams)[:80]}")
    return Coding(zeros, tuple(values), tuple(streams), files.check_sha256(where, value["sha256"]))


def stored_bytes(coding: Coding, shape: tuple[int, ...], fmt: Format) -> int:
    """The bytes that a file holds of a weight: its streams, and zero bytes up to the least that is allowed."""
    return max(sum(coding.streams), -(-shape[0] * fmt.row_bytes(math.prod(shape[1:])) // MAX_RATIO))


def check_available(where: str) -> None:
    """An ImportError that says what to install, where the coder's library is missing."""
    try:
        import zstandard  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{where}: entropy-coded files need the package zstandard: pip install 'inq_kernels[compress]'"
        ) from error


# --- symbols ----------------------------------------------------------------------------------------------------------


def _codes_a_symbol(bits: int) -> int:
    return 8 // bits


def _bits_a_value(values: Sequence[int]) -> int:
    """1, 2, 4 or 8: the bits in which a code's number in the list of ``values`` is a part of a symbol."""
    return next(width for width in (1, 2, 4, 8) if len(values) <= 1 << width)


@functools.cache
def _shifts(bits: int) -> list[list[tuple[int, np.ufunc, int, int | None]]]:
    """For each byte that eight values fill, the values of which it has bits: which, how to shift it, by how much, and
    what to keep of it; None where all of it is kept."""
    import numpy as np

    value, shifts = (1 << bits) - 1, []
    for byte in range(bits):
        parts = []
        for place in range(8 * byte // bits, min((8 * byte + 7) // bits, 7) + 1):
            shift = place * bits - 8 * byte
            if shift < 0:
                parts.append((place, np.right_shift, -shift, value >> -shift))
            else:
                kept = value << shift
                parts.append((place, np.left_shift, shift, None if kept <= 0xFF else kept & 0xFF))
        shifts.append(parts)
    return shifts


def _narrow(places: ndarray, bits: int) -> ndarray:
    """One little-endian bit stream of values of ``bits`` bits, uint8 [8, n]: the first of every eight, the second, …"""
    import numpy as np

    count = places.shape[1]
    # Words of eight bytes at a time; what a shift brings in from the next byte is masked away.
    words = np.ascontiguousarray(np.pad(places, ((0, 0), (0, -count % 8))) if count % 8 else places).view("<u8")
    stream, part, column = np.empty((count, bits), np.uint8), np.empty_like(words[0]), np.empty_like(words[0])
    for byte, parts in enumerate(_shifts(bits)):
        into = column
        for place, move, shift, kept in parts:
            move(words[place], shift, out=into)
            if kept is not None:
                np.bitwise_and(into, kept * 0x0101010101010101, out=into)
            if into is part:
                np.bitwise_or(column, part, out=column)
            into = part
        # A column at a time: numpy's inner loop is as long as there are groups of eight.
        stream[:, byte] = column.view(np.uint8)[:count]
    return stream.reshape(-1)


def _widen(stream: ndarray, bits: int) -> ndarray:
    """The values of a bit stream, in their order: uint8 [8n]."""
    import numpy as np

    groups = stream.reshape(-1, bits)
    values = np.empty((groups.shape[0], 8), np.uint8)
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        part = groups[:, byte] >> shift
        if shift + bits > 8:
            part |= groups[:, byte + 1] << 8 - shift
        values[:, place] = part & (1 << bits) - 1
    return values.reshape(-1)


def _eights(values: ndarray) -> ndarray:
    """Values in their order as ``_narrow`` takes them, with zeros up to a multiple of eight."""
    return _padded(values, 8).reshape(-1, 8).T


def _padded(values: ndarray, multiple: int) -> ndarray:
    import numpy as np

    return np.pad(values, (0, -values.size % multiple))


def _codes(weight: ndarray, k: int, bits: int) -> ndarray:
    """The codes of a storage layout [N, …], row after row, without the padding of rows."""
    return _widen(weight.reshape(-1), bits).reshape(weight.shape[0], -1)[:, :k].reshape(-1)


def _layout(codes: ndarray, k: int, bits: int) -> ndarray:
    """The inverse of ``_codes``."""
    import numpy as np

    rows = np.pad(codes.reshape(-1, k), ((0, 0), (0, -k % 8)))
    return _narrow(_eights(rows.reshape(-1)), bits).reshape(rows.shape[0], -1)


# --- encoding ---------------------------------------------------------------------------------------------------------


def encode(where: str, weight: Tensor, shape: tuple[int, ...], fmt: Format) -> tuple[Tensor, Coding] | None:
    """The storage layout ``weight`` of a weight of that shape and format as stored bytes, and their description: the
    coding that takes the fewest. None if all of them take as many as the storage layout, or more.

    Raises:
        CheckpointError: what was written does not decode to the same. ImportError: zstandard is not installed.
    """
    import numpy as np

    check_available(where)
    k = math.prod(shape[1:])
    codes = _codes(weight.numpy(), k, fmt.bits)
    best = (0, (), [_compress(_symbols(codes, fmt.bits))])
    level, values, streams = codes, (), []
    for zeros in range(1, MAX_ZEROS + 1):
        flags = level != 0
        left, mask = level[flags], np.packbits(flags, bitorder="little")
        if left.size > _FEW_ZEROS * level.size:
            break
        if zeros == 1:
            values = tuple(np.flatnonzero(np.bincount(left, minlength=1)).tolist())
            left = _numbers(left, values)
        streams, level = [_compress(left), *streams], mask
        if _size(coded := [_compress(mask), *streams]) < _size(best[2]):
            best = (zeros, values, coded)
    zeros, values, coded = best
    coding = Coding(zeros, values, tuple(map(len, coded)), files.sha256(weight))
    size = stored_bytes(coding, shape, fmt)
    if size >= weight.numel():
        return None
    stored = torch.frombuffer(bytearray(b"".join(coded).ljust(size, b"\0")), dtype=torch.uint8)
    if not torch.equal(decode(where, stored, coding, shape, fmt), weight):
        raise CheckpointError(f"{where}: expected codes that decode to what was encoded, got others")
    return stored, coding


def _symbols(codes: ndarray, bits: int) -> ndarray:
    """As many codes a byte as it holds, in the order of the file."""
    import numpy as np

    together = _codes_a_symbol(bits)
    symbols = np.zeros(-(-codes.size // together), np.uint8)
    for place in range(together):
        part = codes[place::together]
        symbols[: part.size] |= part << place * bits
    if bits * together == 8:
        return symbols
    blocks = (symbols[at : at + _BLOCK] for at in range(0, symbols.size, _BLOCK))
    return np.concatenate([_eights(block).reshape(-1) for block in blocks])


def _size(streams: Sequence[bytes]) -> int:
    return sum(map(len, streams))


def _numbers(left: ndarray, values: Sequence[int]) -> ndarray:
    """Codes as symbols: their numbers in ``values``, as many as a byte holds."""
    import numpy as np

    width, numbers = _bits_a_value(values), np.zeros(256, np.uint8)
    numbers[list(values)] = np.arange(len(values))
    return _narrow(_eights(numbers[left]), width)[: -(-left.size * width // 8)]


def _compress(symbols: ndarray) -> bytes:
    import zstandard

    if not symbols.size:
        return b""
    # The fewest references that zstd's parameters allow: one costs more than the Huffman codes of a few symbols, and
    # weights repeat by chance alone.
    parameters = zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_FAST, window_log=_WINDOW_LOG, hash_log=6, chain_log=6, search_log=1, min_match=7,
        target_length=0,
    )  # fmt: skip
    return zstandard.ZstdCompressor(compression_params=parameters).compress(symbols.tobytes())


# --- decoding ---------------------------------------------------------------------------------------------------------


def decode(where: str, stored: Tensor, coding: Coding, shape: tuple[int, ...], fmt: Format) -> Tensor:
    """The storage layout of a weight of that shape and format: the inverse of ``encode``, for bytes from anywhere.

    ``stored`` has ``stored_bytes`` bytes; memory that this takes is in proportion to what it returns.

    Raises:
        CheckpointError: the bytes are not the streams of such a weight, or decode to another than ``coding.sha256``.
    """
    import numpy as np

    if (expected := stored_bytes(coding, shape, fmt)) != stored.numel():
        raise CheckpointError(f"{where}: expected {expected} stored bytes, got {stored.numel()}")
    data, n, k = stored.numpy(), shape[0], math.prod(shape[1:])
    ends = np.cumsum(coding.streams).tolist()
    if data[ends[-1] :].any():
        raise CheckpointError(f"{where}: expected zero bytes after the streams, got others")
    streams = [
        _Stream(f"{where}: stream {i}", data[end - size : end])
        for i, (size, end) in enumerate(zip(coding.streams, ends, strict=True))
    ]
    count = n * k
    # Codes as one bit stream without the padding of rows; it is the layout itself where rows have no padding.
    flat = np.zeros((count + 7) // 8 * fmt.bits, np.uint8)
    if coding.zeros:
        _decode_masked(streams, coding, count, fmt.bits, flat)
    else:
        _decode_symbols(streams[0], count, fmt.bits, flat)
    weight = torch.from_numpy(flat.reshape(n, -1) if k % 8 == 0 else _with_padding(flat, n, k, fmt.bits))
    if (got := files.sha256(weight)) != coding.sha256:
        raise CheckpointError(f"{where}: coding: expected codes of sha256 {coding.sha256}, got {got}")
    return weight


def _with_padding(flat: ndarray, n: int, k: int, bits: int) -> ndarray:
    """The storage layout of a bit stream of codes, some rows or a part of one at a time: each code takes bytes
    meanwhile."""
    import numpy as np

    layout = np.empty((n, (k + 7) // 8 * bits), np.uint8)
    # Eight rows begin where a byte does.
    rows, columns = (max(_BLOCK // k // 8, 1) * 8, k) if k <= _BLOCK else (1, _BLOCK)
    for start in range(0, n, rows):
        for column in range(0, k, columns):
            width, first = min(columns, k - column), start * k + column
            count = min(rows, n - start) * width
            piece = flat[first // 8 * bits : (first + count + 7) // 8 * bits]
            codes = _widen(piece, bits)[first % 8 :][:count]
            made = _layout(codes, width, bits)
            layout[start : start + rows, column // 8 * bits :][:, : made.shape[1]] = made
    return layout


def _frame_bytes(data: memoryview) -> int:
    """The bytes of the zstd frame that ``data`` begins with, as the headers of its blocks say: more than there are
    where it is cut short."""
    import zstandard

    at, last = zstandard.frame_header_size(data), False
    while not last:
        header = int.from_bytes(data[at : at + 3], "little")
        last, kind, size = header & 1, header >> 1 & 3, header >> 3
        at += 3 + (1 if kind == _REPEATED else size)
        if at > len(data):
            return at
    return at + 4 * zstandard.get_frame_parameters(data).has_checksum


class _Stream:
    """The symbols of one stream, as many as they are asked for: the decoder writes into memory that is ours."""

    def __init__(self, where: str, data: ndarray) -> None:
        import zstandard

        self.where, self._error, self._reader, self._count = where, zstandard.ZstdError, None, 0
        self._data = memoryview(data)
        if data.size:
            decoder = zstandard.ZstdDecompressor(max_window_size=1 << _WINDOW_LOG)
            # Across frames, so that symbols that follow the first one are seen.
            self._reader = decoder.stream_reader(self._data, read_across_frames=True)

    def _into(self, buffer: ndarray) -> int:
        if self._reader is None or not buffer.size:
            return 0
        try:
            return self._reader.readinto(buffer)
        except self._error as error:
            raise CheckpointError(f"{self.where}: expected a zstd frame, got: {error}") from None

    def read(self, count: int) -> ndarray:
        """The next ``count`` symbols. Raises CheckpointError if there are fewer."""
        import numpy as np

        symbols, at = np.empty(count, np.uint8), 0
        while at < count:
            got = self._into(symbols[at:])
            if not got:
                raise CheckpointError(f"{self.where}: expected {self._count + count} symbols, got {self._count + at}")
            at += got
        self._count += count
        return symbols

    def end(self) -> None:
        """A CheckpointError if there are more symbols, or other bytes than those of one whole frame."""
        import numpy as np

        if self._into(np.empty(1, np.uint8)):
            raise CheckpointError(f"{self.where}: expected {self._count} symbols, got more")
        there = len(self._data)
        if there and not self._count:
            raise CheckpointError(f"{self.where}: expected no bytes for no symbols, got {there}")
        if there:
            self._check_frame(there)

    def _check_frame(self, there: int) -> None:
        """A CheckpointError if a frame that all symbols came from is not whole, or not alone: the decoder passes over
        frames without symbols, and does not miss the end of one."""
        import zstandard

        expected = f"{self.where}: expected one zstd frame of {there} bytes, got"
        if self._data[:4] != zstandard.FRAME_HEADER:
            raise CheckpointError(f"{expected} another kind of frame first")
        if (size := _frame_bytes(self._data)) != there:
            what = "that needs more" if size > there else "with others behind"
            raise CheckpointError(f"{expected} one of {size}, {what}")

    def check_mask(self, mask: ndarray, size: int) -> None:
        """A CheckpointError if a mask of ``size`` symbols, which this stream has helped to make, has bits beyond."""
        if size % 8 and mask[-1] >> size % 8:
            raise CheckpointError(f"{self.where}: expected a mask of {size} bits, got more")


def _decode_symbols(stream: _Stream, count: int, bits: int, flat: ndarray) -> None:
    """``count`` codes, as they are in the symbols of one stream, into the bit stream ``flat``."""
    together = _codes_a_symbol(bits)
    used, total, at, surplus = bits * together, -(-count // together), 0, False
    for start in range(0, total, _BLOCK):
        size = min(_BLOCK, total - start)
        symbols = stream.read(size if used == 8 else -(-size // 8) * 8)
        if int(symbols.max()) >> used:
            raise CheckpointError(f"{stream.where}: expected symbols of {used} bits, got {int(symbols.max())}")
        piece = symbols if used == 8 else _narrow(symbols.reshape(8, -1), used)
        surplus |= bool(piece[flat.size - at :].any())
        piece = piece[: flat.size - at]
        flat[at : at + piece.size] = piece
        at += piece.size
    stream.end()
    if surplus or int.from_bytes(flat[-bits:].tobytes(), "little") >> bits * ((count - 1) % 8 + 1):
        raise CheckpointError(f"{stream.where}: expected {count} codes and zeros behind them, got more")


def _decode_masked(streams: Sequence[_Stream], coding: Coding, count: int, bits: int, flat: ndarray) -> None:
    """``count`` codes, zeros where the masks say so, into the bit stream ``flat``."""
    import numpy as np

    sizes = [count]  # of the codes, and of each mask in bytes
    for _ in range(coding.zeros):
        sizes.append((sizes[-1] + 7) // 8)
    mask = streams[0].read(sizes[-1])
    streams[0].end()
    for outer, stream, size in zip(streams, streams[1:-1], sizes[-2:0:-1], strict=False):
        outer.check_mask(mask, size)
        flags = np.unpackbits(mask, bitorder="little", count=size).view(bool)
        mask = np.zeros(size, np.uint8)
        mask[flags] = left = stream.read(int(np.count_nonzero(flags)))
        if not left.all():
            raise CheckpointError(f"{stream.where}: expected no zeros, which are taken out, got some")
        stream.end()
    streams[-2].check_mask(mask, count)
    _place(streams[-1], mask, coding.values, bits, flat)


def _place(stream: _Stream, mask: ndarray, values: Sequence[int], bits: int, flat: ndarray) -> None:
    """Codes from a stream of their numbers in ``values`` to where ``mask`` has a bit, as a bit stream."""
    import numpy as np

    pieces = range(0, mask.size, _BLOCK // 8)
    total = sum(int(np.count_nonzero(np.unpackbits(mask[at : at + _BLOCK // 8]))) for at in pieces)
    width = _bits_a_value(values)
    together = 8 // width
    symbols = stream.read(-(-total // together))
    stream.end()
    if total % together and int(symbols[-1]) >> width * (total % together):
        raise CheckpointError(f"{stream.where}: expected {total} codes, got more")
    # The codes of every symbol; 0, which is no value, for numbers beyond the list.
    table = np.zeros((256, together), np.uint8)
    for place in range(together):
        numbers = np.arange(256) >> width * place & (1 << width) - 1
        table[:, place] = np.array([*values, *[0] * (256 - len(values))], np.uint8)[numbers]
    done = 0
    for at in pieces:
        flags = np.unpackbits(mask[at : at + _BLOCK // 8], bitorder="little").view(bool)
        here, first = int(np.count_nonzero(flags)), done // together
        left = table[symbols[first : -(-(done + here) // together)]].reshape(-1)[done - first * together :][:here]
        if not left.all():
            raise CheckpointError(f"{stream.where}: expected numbers of the {len(values)} values, got others")
        codes = np.zeros(flags.size, np.uint8)
        codes[flags] = left
        flat[at * bits : at * bits + mask[at : at + _BLOCK // 8].size * bits] = _narrow(_eights(codes), bits)
        done += here
