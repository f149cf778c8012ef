"""How packed weights lie in memory: the storage layout of files, and the layouts that kernels read.

A layout is known by its name, and a tensor's by its shape: ``"storage"`` is uint8 [N, ceil(K/8)·bits] (reference.py),
the others have three dimensions or four, the last of which tells them apart. slices.py has those that Triton kernels
read, of three, and fragments.py those of CUDA kernels, of four.

``"cpu16"``, which the CPU kernels read, is uint8 [ceil(N/16), ceil(K/32), 256], at 5 bits 320: tiles of 16 rows × 32 k.
A tile is four units of 8 k; a unit is 16 little-endian 32-bit words, one for each row, and a word has eight nibbles:
bits 4j…4j+3 hold k = 2j, bits 16+4j…16+4j+3 hold k = 2j + 1, so that one shift brings a pair of neighbours into place
in all 16 rows. A nibble is ``sign << 3 | field``; at 5 bits it is the field, and the signs follow as one word for each
row: bit 15−r is the sign of k = 2r in the tile, bit 31−r that of k = 2r + 1. Padding is zero codes.

Plain torch, as the definition; csrc/cpu/prepack.cpp does the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fragments, reference, slices
from .format import Format

STORAGE = "storage"
CPU16 = "cpu16"
LAYOUTS = (STORAGE, CPU16, *slices.LAYOUTS, *fragments.LAYOUTS)

# Rows and k of a tile.
_N, _K = 16, 32


def layout_of(weight: Tensor) -> str:
    """The layout of a module's ``weight``: they differ in shape, so that nothing beside the tensor can disagree."""
    if weight.dim() == 2:
        return STORAGE
    here = fragments if weight.dim() == 4 else slices
    return here.layout_of(weight.shape[-1]) or CPU16


def shape(layout: str, n: int, k: int, fmt: Format) -> tuple[int, ...]:
    """The shape of an [n, k] weight in ``layout``.

    Raises:
        ValueError: there is no such layout.
    """
    if layout == STORAGE:
        return n, fmt.row_bytes(k)
    if layout == CPU16:
        return -(-n // _N), -(-k // _K), 256 if fmt.bits < 5 else 320
    if layout in slices.LAYOUTS:
        return slices.shape(layout, n, k, fmt)
    if layout in fragments.LAYOUTS:
        return fragments.shape(layout, n, k, fmt)
    raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")


def prepack(weight: Tensor, k: int, fmt: Format, layout: str) -> Tensor:
    """The storage layout ``weight`` as ``layout``: a new tensor."""
    tiles = shape(layout, weight.shape[0], k, fmt)
    if layout == STORAGE:
        return weight.clone()
    if layout in slices.LAYOUTS:
        return slices.prepack(reference.unpack_codes(weight, fmt.bits, k), fmt, layout)
    if layout in fragments.LAYOUTS:
        return fragments.prepack(reference.unpack_codes(weight, fmt.bits, k), fmt, layout)
    codes = reference.unpack_codes(weight, fmt.bits, k).to(torch.int64)
    codes = F.pad(codes, (0, -k % _K, 0, -codes.shape[0] % _N))
    # [panel, row, tile, r, half]: k = 32·tile + 2r + half, r = 4·unit + j
    codes = codes.view(tiles[0], _N, tiles[1], 16, 2)
    sign, field = codes >> (fmt.bits - 1), codes & (1 << (fmt.bits - 1)) - 1
    nibble = field if fmt.bits == 5 else sign << 3 | field
    j, half = _axes(weight)
    body = (nibble.view(*codes.shape[:3], 4, 4, 2) << (4 * j[:4, None] + 16 * half)).sum((4, 5))
    parts = [slices.to_bytes(body.permute(0, 2, 3, 1), 4).flatten(2)]
    if fmt.bits == 5:
        plane = (sign << (15 - j[:, None] + 16 * half)).sum((3, 4))
        parts.append(slices.to_bytes(plane.permute(0, 2, 1), 4).flatten(2))
    return torch.cat(parts, dim=2)


def unprepack(weight: Tensor, n: int, k: int, fmt: Format, layout: str) -> Tensor:
    """The inverse of ``prepack``."""
    tiles = shape(layout, n, k, fmt)
    if layout == STORAGE:
        return weight.clone()
    if layout in slices.LAYOUTS:
        return reference.pack_codes(slices.unprepack(weight, n, k, fmt, layout), fmt.bits)
    if layout in fragments.LAYOUTS:
        return reference.pack_codes(fragments.unprepack(weight, n, k, fmt, layout), fmt.bits)
    j, half = _axes(weight)
    body = slices.from_bytes(weight[..., :256].reshape(*tiles[:2], 4, _N, 4)).permute(0, 3, 1, 2)
    nibble = (body[..., None, None] >> (4 * j[:4, None] + 16 * half) & 15).reshape(tiles[0], _N, tiles[1], 16, 2)
    if fmt.bits == 5:
        plane = slices.from_bytes(weight[..., 256:].reshape(*tiles[:2], _N, 4)).permute(0, 2, 1)
        codes = nibble | (plane[..., None, None] >> (15 - j[:, None] + 16 * half) & 1) << 4
    else:
        codes = (nibble >> 3) << (fmt.bits - 1) | nibble & 7
    codes = codes.reshape(tiles[0] * _N, tiles[1] * _K)[:n, :k]
    return reference.pack_codes(codes.to(torch.uint8), fmt.bits)


def _axes(weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(16, device=weight.device), torch.arange(2, device=weight.device)
