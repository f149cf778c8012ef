"""What a product on a GPU should take, before one has been asked: the tables of docs/performance.md.

``python -m inq_kernels.bench.model`` writes them there. Bytes and operations are counted; rates are the vendor's
datasheets; the rest is read off the kernels' machine code (``inq bench static``). No time here is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .. import slices
from ..format import Format
from ..triton_ops import tiles
from . import shapes, static

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
STATIC = ROOT / "bench" / "results" / "static-3.6.0" / "static.json"
BEGIN, END = "<!-- model: written by python -m inq_kernels.bench.model -->", "<!-- end of model -->"
BEGIN_STATIC, END_STATIC = "<!-- static -->", "<!-- end of static -->"
MS = (1, 16, 64, 256, 4096)
PROCESSORS = 132
# Leads, not readings: a read stream's share of the datasheet's bandwidth, the second-level cache's bytes a second, the
# clock under load, the share of the tensor cores' rate that dense products of random data reach, a kernel's start.
STREAM, CACHE, CLOCK, DENSE, START = 0.85, 5.5e12, 1.7e9, 0.8, 2e-6
# Triton waits for each product of decoded registers before it begins the next (WARPGROUP.DEPBAR behind every HGMMA).
WAITING = 0.5


@dataclass(frozen=True)
class Gpu:
    """Datasheet rates: bytes a second, operations a second of dense 16-bit and 8-bit products."""

    name: str
    bandwidth: float
    products: dict[str, float]


_HOPPER = {"bf16": 989e12, "e4m3": 1979e12}
GPUS = (Gpu("H100", 3.35e12, _HOPPER), Gpu("H200", 4.8e12, _HOPPER))


@dataclass(frozen=True)
class Product:
    """``linear`` (dot "bf16") or ``linear_fp8`` (dot "e4m3") of x [m, k] in bfloat16 and a weight [n, k]."""

    k: int
    n: int
    m: int
    fmt: Format
    dot: str = "bf16"

    @property
    def layout(self) -> str:
        return slices.E4M3 if self.dot == "e4m3" else slices.BF16

    @property
    def weight_bytes(self) -> int:
        codec = slices.codec(self.layout, self.fmt)
        return self.n * slices.words_of_slice(codec, self.k) * codec.width // 8

    @property
    def bytes(self) -> int:
        """Each operand read once, each result written once."""
        return self.weight_bytes + self.n + 2 * self.m * self.k + 2 * self.m * self.n

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    def floor(self, gpu: Gpu) -> float:
        """Seconds that no kernel can beat on this GPU."""
        return max(self.bytes / gpu.bandwidth, self.flops / gpu.products[self.dot])

    def expected(self, gpu: Gpu, instructions: dict[str, float]) -> tuple[float, str]:
        """(seconds, what bounds them) of the kernel that ``tiles.select`` chooses, ``instructions``: for each weight
        and thread of the main loop, by name of the configuration."""
        codec = slices.codec(self.layout, self.fmt)
        words = slices.words_of_slice(codec, self.k)
        choice = tiles.select("linear", self.dot, self.m, self.n, words, PROCESSORS, tiles.defaults(90))
        start = START
        if choice.kernel == "dense":
            # Decoded once to 16 bits, read again by the library; sums leave it in float32.
            moved = self.weight_bytes + 2 * self.n * self.k + 10 * self.m * self.n
            time = moved / (STREAM * gpu.bandwidth) + self.flops / (DENSE * gpu.products["bf16"])
            return time + 3 * start, "the library's product, after decoding"
        tile = choice.tile
        m_tiles, n_tiles = -(-self.m // tile.bm), -(-self.n // tile.bn)
        parts = 8 * choice.splits * self.m * self.n if choice.splits > 1 else 0
        quantized = 2 * self.m * self.k if self.dot == "e4m3" else 0
        size = 1 if self.dot == "e4m3" else 2
        name = f"linear {self.dot} {slices.kind(self.fmt)} m{_first_rows(tiles.HOPPER, self.dot, tile)}"
        each = instructions[name] * n_tiles * tile.bn * m_tiles * words * codec.codes
        terms = {
            "memory": (self.bytes + quantized) / (STREAM * gpu.bandwidth),
            "the cache: x read again by every tile": (
                self.weight_bytes * m_tiles + n_tiles * size * self.m * self.k + parts
            )
            / CACHE,
            "instructions issued": each / (PROCESSORS * 128 * CLOCK),
            "tensor cores, waiting": 2 * n_tiles * tile.bn * m_tiles * tile.bm * self.k
            / (WAITING * gpu.products[self.dot]),
        }  # fmt: skip
        bound = max(terms, key=terms.__getitem__)
        return terms[bound] + start * (1 + (choice.splits > 1) + (self.dot == "e4m3")), bound


def _first_rows(table: dict[str, dict[int, tiles.Tile]], dot: str, tile: tiles.Tile) -> int:
    """The column of a table that first has a tile: configurations are named for it."""
    return next(rows for rows, each in table[f"linear {dot}"].items() if each == tile)


def instructions_a_weight() -> dict[str, float]:
    """All instructions of the main loop for each weight that a thread decodes, on sm_90, by configuration."""
    rows = static.read(STATIC)["rows"]
    return {
        row["name"]: sum(row["per_weight"].values())
        for row in rows
        if row["sm"] == 90 and row["per_weight"] is not None
    }


def _microseconds(seconds: float) -> str:
    us = seconds * 1e6
    return f"{us:.1f}" if us < 100 else f"{us:,.0f}"


def _table(fmt: Format, dot: str, found: dict[str, float]) -> list[str]:
    head = ["(K, N)", "M", "MB", "GFLOP", *(f"{gpu.name} floor µs" for gpu in GPUS), "expected on an H200", "× floor"]
    lines = ["| " + " | ".join([*head, "bound by"]) + " |", "|" + "---|" * (len(head) + 1)]
    for k, n in sorted(shapes.SHAPES_GPU, key=lambda shape: (shape != shapes.MAIN_GPU, shape[0] * shape[1])):
        for m in MS:
            product = Product(k, n, m, fmt, dot)
            time, bound = product.expected(GPUS[1], found)
            floors = [product.floor(gpu) for gpu in GPUS]
            cells = [f"({k}, {n})", m, f"{product.bytes / 1e6:.1f}", f"{product.flops / 1e9:.1f}"]
            cells += [*map(_microseconds, floors), _microseconds(time), f"{time / floors[1]:.1f}", bound]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def tables() -> str:
    """The tables of the page, markdown."""
    found = instructions_a_weight()
    lines = [BEGIN]
    for title, fmt, dot in (
        ("`linear`, 4 bits, x bfloat16", Format(4), "bf16"),
        ("`linear`, 5 bits (5.33 in use), x bfloat16", Format(5), "bf16"),
        ("`linear_fp8`, 4 bits, x bfloat16 rounded to e4m3 in the call", Format(4), "e4m3"),
    ):
        lines += [f"### {title}", "", *_table(fmt, dot, found), ""]
    return "\n".join([*lines, END])


def instructions() -> str:
    """The table of integer instructions a weight, markdown."""
    capabilities = (80, 86, 89, 90)
    lines = [BEGIN_STATIC, "| product | M up to | " + " | ".join(f"sm_{sm}" for sm in capabilities) + " |"]
    lines.append("|" + "---|" * (2 + len(capabilities)))
    rows = {(row["name"], row["sm"]): row for row in static.read(STATIC)["rows"]}
    for dot in ("fp16", "bf16", "e4m3"):
        for m in tiles.ROWS:
            found = []
            for sm in capabilities:
                table = tiles.defaults(sm)
                tile = table[f"linear {dot}"][m]
                found.append(rows.get((f"linear {dot} paper4 m{_first_rows(table, dot, tile)}", sm)))
            cells = ["–" if row is None else f"{row['per_weight']['integer']:.2f}" for row in found]
            lines.append(f"| {dot} | {m if m < tiles.ROWS[-1] else '2047'} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, END_STATIC])


def page(text: str) -> str:
    """``text`` with the tables as they are now."""
    for begin, end, table in ((BEGIN, END, tables), (BEGIN_STATIC, END_STATIC, instructions)):
        before, rest = text.split(begin)
        text = before + table() + rest.split(end)[1]
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
