"""Which kernel and which tile runs a product: pure functions of a description, the same on every machine.

Tables by capability, kind of product and rows of x. A tuned file (JSON, one for each GPU, ``save`` and ``load``) takes
the place of single entries; nothing is tuned by itself.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT = "INQ_TRITON_TILES"
# sm_80, A100; sm_86 and sm_89, consumer Ampere and Ada; sm_90, Hopper; sm_100 and sm_120, Blackwell.
CAPABILITIES = (80, 86, 89, 90, 100, 120)
# Rows of x up to which a column of the table is used; beyond the last, the last.
ROWS = (16, 32, 64, 128)
# Decoding once and calling the library is 2.7 % of a product of 8192 rows, 20 % of one of 1024 (KERNELS.md).
DENSE_ROWS = 2048
# A grid's second dimension is 65535 programs: of 64 words that are decoded, of 256 outputs whose sums are rounded.
_DENSE_WORDS, _DENSE_OUTPUTS = 65535 * 64, 65535 * 256
# Bytes in flight decide the speed of few rows; programs beyond two for each processor add only their start.
_WAVES = 2
# A split must leave a program this many words of a row, so that its loads overlap.
_LEAST_WORDS = 256


@dataclass(frozen=True)
class Tile:
    """A tile of a product: BN outputs (weights' rows) × BM rows of x, BK words of each slice a step.

    ``part``: words of a row that one load of ``linear`` reads; BK where it is not given. Of more parts fewer addresses
    are computed, but Hopper's tensor cores take a descriptor for each.
    """

    bn: int
    bm: int
    bk: int
    warps: int
    stages: int
    part: int = 0

    def __post_init__(self) -> None:
        if not self.part:
            object.__setattr__(self, "part", self.bk)


@dataclass(frozen=True)
class Choice:
    """``kernel`` is "tile" (decoded in the loop) or "dense" (decoded once, multiplied by the library)."""

    kernel: str
    tile: Tile | None
    splits: int = 1
    steps: int = 0  # tiles of words a program, where splits > 1


# Chosen by what machine code they become (`inq bench static`), not yet by time: at most 1.3 integer instructions a
# weight for 16-bit products on sm_80 to sm_90, 0.7 for e4m3 on sm_90, no spills, and shared memory that a block can
# have: 163 KB on sm_80, 227 on sm_90 and sm_100, 99 on the others. What a step costs beside decoding is nearly the same
# for all, 20 to 80 instructions, so a thread decodes 256 weights or more in it. A step of 128×64 16-bit words is 16 KB,
# and x takes S·BM·BK elements. With two stages a step's loads are in flight while the one before is multiplied in
# another block: what they need of shared memory leaves room for two or three.
_16 = {
    16: Tile(128, 16, 64, 4, 3, 32),
    32: Tile(128, 32, 64, 4, 3, 32),
    64: Tile(128, 64, 64, 4, 2, 32),
    128: Tile(128, 64, 64, 4, 2, 32),  # twice as large, it spilled where K is masked
}
# Hopper's tensor cores read x through descriptors, some ten instructions for each part: the same for more weights. With
# 128 rows of x a thread has no registers for as many.
_16_HOPPER = {
    16: Tile(256, 16, 64, 4, 2),
    32: Tile(256, 32, 64, 4, 2),
    64: Tile(256, 64, 64, 4, 2),
    128: Tile(256, 64, 64, 4, 2),
}
# Where N is no multiple of 16, each sum has an address of its own, and those of 64 rows spilled.
_16_HOPPER_RAGGED = dict.fromkeys((64, 128), _16_HOPPER[32])
# Blackwell's sums lie in tensor memory, 512 columns of it, and each slice of K has its own.
_16_BLACKWELL = {
    16: Tile(128, 16, 64, 4, 3, 32),
    32: Tile(128, 32, 64, 4, 3),
    64: Tile(128, 64, 32, 4, 3),
    128: Tile(128, 64, 32, 4, 3),
}
_FP8 = {
    16: Tile(128, 16, 128, 4, 3, 64),
    32: Tile(128, 32, 64, 4, 3),  # twice as long, sums that are parts spilled
    64: Tile(128, 64, 64, 4, 3),
    128: Tile(128, 128, 64, 8, 3),
}
_FP8_HOPPER = {
    16: Tile(256, 16, 128, 4, 3, 64),
    32: Tile(256, 32, 128, 4, 3, 64),
    64: Tile(256, 64, 256, 8, 2, 128),
    128: Tile(256, 64, 256, 8, 2, 128),
}
# Words of 16 bits whose numbers are converted take more registers.
_FP8_OF_16 = {
    16: Tile(128, 16, 64, 4, 3),
    32: Tile(128, 32, 64, 4, 3),
    64: Tile(128, 64, 64, 4, 3, 32),
    128: Tile(128, 128, 64, 8, 2, 32),
}
# The S products of 128 rows have more tensor memory than there is.
_FP8_OF_16_BLACKWELL = _FP8_OF_16 | {128: _FP8_OF_16[64]}
# No tensor cores: IEEE float32 products. 64 rows spilled where K is masked.
_FP32 = {rows: Tile(64, min(rows, 32), 16, 4, 2) for rows in ROWS}
# The gradient: BN rows of weights are summed over a step, BK words give BK columns in each slice, so S accumulators.
_DX = {rows: Tile(64, 16 if rows == 16 else 32, 64, 4, 2) for rows in ROWS}
# 64 rows of x are the least of Hopper's own product instructions.
_DX_HOPPER = {rows: Tile(64, 64, 64, 4, 2) for rows in ROWS}
DEFAULTS: dict[str, dict[int, Tile]] = {
    "linear fp16": _16,
    "linear bf16": _16,
    "linear e4m3": _FP8,
    "linear e4m3 of 16": _FP8_OF_16,
    "linear fp32": _FP32,
    "linear_dx fp16": _DX,
    "linear_dx bf16": _DX,
    "linear_dx fp32": {rows: Tile(32, 16, 16, 4, 2) for rows in ROWS},
}
HOPPER: dict[str, dict[int, Tile]] = DEFAULTS | {
    "linear fp16": _16_HOPPER,
    "linear bf16": _16_HOPPER,
    "linear e4m3": _FP8_HOPPER,
    "linear_dx fp16": _DX_HOPPER,
    "linear_dx bf16": _DX_HOPPER,
    "linear fp16 ragged": _16_HOPPER_RAGGED,
    "linear bf16 ragged": _16_HOPPER_RAGGED,
}
# There, Triton 3.6 makes TF32 products of float32 tiles of 64 rows, whatever precision is asked for.
_FP32_BLACKWELL = {rows: Tile(32, min(rows, 64), 16, 4, 2) for rows in ROWS}
BLACKWELL: dict[str, dict[int, Tile]] = DEFAULTS | {
    "linear fp16": _16_BLACKWELL,
    "linear bf16": _16_BLACKWELL,
    "linear fp32": _FP32_BLACKWELL,
    "linear e4m3 of 16": _FP8_OF_16_BLACKWELL,
}


def defaults(capability: int) -> dict[str, dict[int, Tile]]:
    """The table of a kind of GPU, 90 for sm_90."""
    if capability == 90:
        return HOPPER
    # sm_103 has sm_100's tensor memory; sm_120 has none.
    return BLACKWELL if 100 <= capability < 120 else DEFAULTS


def product(dot: str, source: str) -> str:
    """What a table calls products of type ``dot`` with decoded numbers of type ``source``."""
    return "e4m3 of 16" if dot == "e4m3" and source != "e4m3" else dot


def row(table: Mapping[str, Mapping[int, Tile]], product: str, n: int) -> Mapping[int, Tile]:
    """The row of a table for ``product``, "linear fp16", with what is in "linear fp16 ragged" instead if n, the rows of
    weights, is no multiple of 16."""
    return {**table[product], **table.get(f"{product} ragged", {})} if n % 16 else table[product]


def rows_class(m: int) -> int:
    """The column of the table for ``m`` rows."""
    return next((rows for rows in ROWS if m <= rows), ROWS[-1])


def select(
    op: str, dot: str, m: int, n: int, words: int, processors: int, table: Mapping[str, Mapping[int, Tile]] = DEFAULTS
) -> Choice:
    """The kernel of a product.

    Args:
        op: "linear" or "linear_dx".
        dot: the type of its products, as ``product`` calls it: "fp16", "bf16", "fp32", "e4m3" or "e4m3 of 16".
        m: rows of x.
        n: rows of the weight.
        words: of a slice (slices.words_of_slice).
        processors: multiprocessors of the GPU.
        table: of tiles, as ``current`` gives it.
    """
    whole = words <= _DENSE_WORDS and n <= _DENSE_OUTPUTS
    if op == "linear" and dot in ("fp16", "bf16") and m >= DENSE_ROWS and whole:
        return Choice("dense", None)
    tile = row(table, f"{op} {dot}", n)[rows_class(m)]
    if op != "linear":
        return Choice("tile", tile)
    programs, steps = -(-n // tile.bn) * -(-m // tile.bm), -(-words // tile.bk)
    splits = max(min(_WAVES * processors // programs, steps * tile.bk // _LEAST_WORDS), 1)
    each = -(-steps // splits)
    return Choice("tile", tile, -(-steps // each), each)


def save(path: Path | str, device: str, table: Mapping[str, Mapping[int, Tile]]) -> None:
    """Write ``table`` as JSON. ``device``: the GPU's name, for people."""
    entries = {key: {str(m): dataclasses.asdict(t) for m, t in row.items()} for key, row in table.items()}
    Path(path).write_text(json.dumps({"device": device, "tiles": entries}, indent=1) + "\n")


def load(
    path: Path | str, base: Mapping[str, Mapping[int, Tile]] = DEFAULTS, capability: int = 0
) -> dict[str, dict[int, Tile]]:
    """The table of a file that ``save`` wrote, or that a person did; entries that it lacks are those of ``base``.
    ``capability``: of the GPU that is to run them, where it is known.

    Raises:
        ValueError: it is no such file, or an entry is unknown or not a tile that kernels can have.
    """
    try:
        given = json.loads(Path(path).read_text())["tiles"]
        table = {key: dict(row) for key, row in base.items()}
        for key, row in given.items():
            if key not in table:
                raise ValueError(f"tiles: expected one of {list(table)}, got {key!r}")
            for text, fields in row.items():
                rows = _known_rows(text)
                table[key][rows] = _tile(f"{key}, {rows} rows", key, fields, capability)
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{ENVIRONMENT}: expected a file of tiles, got {path}: {type(error).__name__}: {error}"
        ) from error
    return table


def _known_rows(text: str) -> int:
    if text not in map(str, ROWS):
        raise ValueError(f"rows: expected one of {ROWS}, got {text!r}")
    return int(text)


def _tile(name: str, key: str, fields: Mapping[str, object], capability: int) -> Tile:
    expected = [field.name for field in dataclasses.fields(Tile)]
    if sorted({*fields, "part"}) != sorted(expected):
        raise ValueError(f"{name}: expected {expected}, got {sorted(fields)}")
    limits = {"bn": (16, 256), "bm": (16, 256), "bk": (16, 256), "warps": (1, 16), "stages": (1, 8)}
    limits |= {"part": (16, fields["bk"])} if "part" in fields else {}
    if "e4m3" in key:
        # A tensor core's product of 8-bit numbers takes 32 of them.
        limits |= {field: (32, limits[field][1]) for field in ("bk", "part") if field in limits}
    if "fp32" in key and 100 <= capability < 120:
        # Larger ones would be TF32 there (_FP32_BLACKWELL): the rows of the left operand, which the gradient's is.
        limits["bm" if key.startswith("linear_dx") else "bn"] = (16, 32)
    for field, (least, most) in limits.items():
        value = fields[field]
        power = field != "stages"
        if type(value) is not int or not least <= value <= most or (power and value & (value - 1)):
            kind = "a power of two" if power else "a number"
            raise ValueError(f"{name}: {field}: expected {kind} from {least} to {most}, got {value!r}")
    return Tile(**fields)  # type: ignore[arg-type]


def current(capability: int = 0) -> dict[str, dict[int, Tile]]:
    """The table in use on a kind of GPU: its defaults, with what the file that INQ_TRITON_TILES names has instead."""
    path = os.environ.get(ENVIRONMENT)
    return _loaded(path, capability) if path else defaults(capability)


@functools.lru_cache
def _loaded(path: str, capability: int) -> dict[str, dict[int, Tile]]:
    # Read once: not at every product.
    return load(path, defaults(capability), capability)
