"""Huffman codes (Huffman 1952), canonical: a table of lengths is all that a decoder needs.

Deep Compression codes its weights with these. They are here for sizes, and to show that what has such a size decodes:
encoding is vectorised, decoding is a Python loop.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# A table holds one byte for the length of each symbol from 0 to the greatest in use.
LENGTH_BITS = 8


def lengths(counts: Sequence[int]) -> list[int]:
    """The length in bits of each symbol's code; 0 for a symbol that never comes. A symbol that is alone takes one bit.

    Σ counts·length is least among all prefix codes. Ties are broken by age, so that lengths are the same everywhere.
    """
    result = [0] * len(counts)
    heap = [(count, symbol, (symbol,)) for symbol, count in enumerate(counts) if count]
    if len(heap) == 1:
        result[heap[0][1]] = 1
    heapq.heapify(heap)
    age = len(counts)
    while len(heap) > 1:
        (a, _, left), (b, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in left + right:
            result[symbol] += 1
        heapq.heappush(heap, (a + b, age, left + right))
        age += 1
    return result


def symbol_counts(symbols: Tensor, alphabet: int) -> list[int]:
    """How often each of 0, …, alphabet − 1 comes, or of 0, …, max(symbols) if that is more."""
    return torch.bincount(symbols.reshape(-1), minlength=alphabet).tolist()


def encode(symbols: Tensor, table: Sequence[int]) -> bytes:
    """The codes of ``symbols`` one after the other, most significant bit first, the last byte filled up with 0."""
    symbols = symbols.reshape(-1).cpu().numpy()
    codes, sizes = np.array(_canonical(table), dtype=object), np.array(table)
    if (sizes[symbols] == 0).any():
        raise ValueError("huffman.encode: symbols: expected symbols that the table has a code for, got others")
    ends = sizes[symbols].cumsum()
    bits = np.zeros(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
    for symbol in np.unique(symbols):
        size = int(sizes[symbol])
        starts = ends[symbols == symbol] - size
        for place in range(size):
            bits[starts + place] = int(codes[symbol]) >> (size - 1 - place) & 1
    return np.packbits(bits).tobytes()


def decode(data: bytes, table: Sequence[int], count: int) -> Tensor:
    """The inverse of ``encode``: ``count`` symbols, int64. ValueError if ``data`` has no such codes."""
    of_code = {(table[symbol], code): symbol for symbol, code in enumerate(_canonical(table)) if table[symbol]}
    bits = iter(np.unpackbits(np.frombuffer(data, dtype=np.uint8)).tolist())
    symbols = []
    for _ in range(count):
        size = code = 0
        while (size, code) not in of_code:
            bit = next(bits, None)
            if bit is None:
                raise ValueError(f"huffman.decode: data: expected {count} symbols, got an end after {len(symbols)}")
            size, code = size + 1, code << 1 | bit
        symbols.append(of_code[size, code])
    return torch.tensor(symbols, dtype=torch.int64)


def _canonical(table: Sequence[int]) -> list[int]:
    """The code of each symbol: by length, then symbol, each is the one before plus 1, shifted to its length."""
    codes = [0] * len(table)
    code = size = 0
    for symbol in sorted((s for s in range(len(table)) if table[s]), key=lambda s: (table[s], s)):
        code <<= table[symbol] - size
        size = table[symbol]
        codes[symbol] = code
        code += 1
    return codes
