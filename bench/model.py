"""What kernels on a GPU should take, before one has been asked: the tables of docs/performance.md.

``python -m inq_kernels.bench.model`` writes them there. Bytes and operations are counted; rates are the vendor's
datasheets; the rest is read off the kernels' machine code (``inq bench static``). No time here is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .. import slices
from ..format import Format
from ..triton_ops import conv2d, tiles
from . import bars, shapes, static
from .conv2d import Layer

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
STATIC = ROOT / "bench" / "results" / "static-3.6.0" / "static.json"
BEGIN, END = "<!-- model: written by python -m inq_kernels.bench.model -->", "<!-- end of model -->"
BEGIN_STATIC, END_STATIC = "<!-- static -->", "<!-- end of static -->"
MS = (1, 16, 64, 256, 4096)
PROCESSORS = 132
# Launches of one tensor: digits are counted, copies of the counters added, one digit selected, in three passes; and the
# exponents, the weights, and the count of what was frozen.
EXPONENTS_LAUNCHES, PARTITION_LAUNCHES = 3, 12
# Leads, not readings: a read stream's share of the datasheet's bandwidth, the second-level cache's bytes a second, the
# clock under load, the share of the tensor cores' rate that dense products of random data reach, a kernel's start.
STREAM, CACHE, CLOCK, DENSE, START = 0.85, 5.5e12, 1.7e9, 0.8, 2e-6
# Triton waits for each product of decoded registers before it begins the next (WARPGROUP.DEPBAR behind every HGMMA).
WAITING = 0.5
# A large copy on an H200, read plus written (KERNELS.md): what shares of the copy bandwidth are shares of.
COPY = 4.3e12


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
        name = f"linear {self.dot} {slices.kind(self.fmt)} m{_first_with_tile(self.dot, tiles.rows_class(self.m), 90)}"
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


@dataclass(frozen=True)
class Convolution:
    """``conv2d`` of ``batch`` images, x and y in bfloat16 and channels-last, weights of 4 bits."""

    layer: Layer
    batch: int

    @property
    def k(self) -> int:
        return self.layer.c * self.layer.kernel**2

    @property
    def pixels(self) -> int:
        return self.batch * self.layer.out**2

    @property
    def weight_bytes(self) -> int:
        return self.layer.n * slices.words_of_slice(slices.codec(slices.BF16, Format(4)), self.k) * 2

    @property
    def bytes(self) -> int:
        """Each operand read once, each result written once."""
        image = self.batch * self.layer.c * self.layer.size**2
        return self.weight_bytes + self.layer.n + 2 * image + 2 * self.pixels * self.layer.n

    @property
    def flops(self) -> int:
        return 2 * self.pixels * self.layer.n * self.k

    def floor(self, gpu: Gpu) -> float:
        """Seconds that no kernel can beat on this GPU."""
        return max(self.bytes / gpu.bandwidth, self.flops / gpu.products["bf16"])

    def expected(self, gpu: Gpu, instructions: dict[int, float]) -> tuple[float, str]:
        """(seconds, what bounds them); ``instructions``: for each element of x that a thread loads, by window."""
        n, k, m = self.layer.n, self.k, self.pixels
        codes = slices.codec(slices.BF16, Format(4)).codes
        choice = conv2d.select("bf16", m, n, 1, k, codes, True, PROCESSORS)
        tile = choice.tile
        m_tiles, n_tiles = -(-m // tile.bm), -(-n // tile.bn)
        parts = 8 * choice.splits * m * n if choice.splits > 1 else 0
        loaded = n_tiles * m_tiles * tile.bm * k
        terms = {
            "memory": self.bytes / (STREAM * gpu.bandwidth),
            "the cache: windows read by every tile": (self.weight_bytes * m_tiles + 2 * loaded + parts) / CACHE,
            "instructions issued: addresses of x": instructions[self.layer.kernel]
            * loaded
            / (PROCESSORS * 128 * CLOCK),
            "tensor cores, waiting": 2 * n_tiles * tile.bn * m_tiles * tile.bm * k / (WAITING * gpu.products["bf16"]),
        }
        bound = max(terms, key=terms.__getitem__)
        return terms[bound] + START * (1 + (choice.splits > 1)), bound


@dataclass(frozen=True)
class Mover:
    """A kernel that multiplies nothing: ``bytes`` read and written in ``launches``."""

    name: str
    case: str
    bytes: int
    launches: int = 1

    def floor(self, gpu: Gpu) -> float:
        """Seconds that no kernel can beat on this GPU."""
        return self.bytes / gpu.bandwidth

    def expected(self, gpu: Gpu) -> tuple[float, str]:
        """(seconds, what bounds them)."""
        moved, started = self.bytes / (STREAM * gpu.bandwidth), self.launches * START
        return moved + started, "memory" if moved > started else "starts of kernels"


def movers() -> list[Mover]:
    """Kernels of the page's first table whose time is that of their bytes."""
    k, n = shapes.MAIN_GPU
    found = []
    for fmt, layout in ((Format(4), slices.BF16), (Format(4), slices.E4M3), (Format(5), slices.BF16)):
        codec = slices.codec(layout, fmt)
        words = n * slices.words_of_slice(codec, k) * codec.width // 8
        found.append(Mover("`prepack`", f"{k}×{n}, {fmt.bits} bits, {layout}", n * fmt.row_bytes(k) + words))
    found.append(Mover("`exponents`", f"{k}×{n}, float32, a tensor", 4 * n * k, EXPONENTS_LAUNCHES))
    # Largest first, then the counts of the bins around it: two reads where each row has its exponent.
    found.append(Mover("`exponents`", f"{k}×{n}, float32, by channel, mse", 8 * n * k, EXPONENTS_LAUNCHES))
    weights = sum(rows * columns for rows, columns in shapes.VGG16)
    found.append(Mover("`partition`", "VGG-16, float32", 20 * weights, PARTITION_LAUNCHES * len(shapes.VGG16)))
    # The second read of a row comes from the cache.
    found += [Mover("`quantize_rows`", f"M = {m}, K = {k}, bfloat16", 3 * m * k + 4 * m) for m in (1, 64, 4096)]
    return found


def instructions_a_weight() -> dict[str, float]:
    """All instructions of the main loop for each weight that a thread decodes, on sm_90, by configuration."""
    return {row["name"]: sum(row["per_weight"].values()) for row in _static(90)}


def instructions_an_element() -> dict[int, float]:
    """All instructions of conv2d's main loop for each element of x that a thread loads, on sm_90, by window: nearly all
    of them are its addresses. Of the largest tile of 16 bits that is in the table."""
    found = {}
    for window in (1, 3):
        rows = [r for r in _static(90) if r["kernel"] == "conv2d_kernel" and f" {window}×{window}," in r["name"]]
        rows = [row for row in rows if row["facts"]["DOT"] in ("bf16", "fp16")]
        row = max(rows, key=lambda row: row["facts"]["BN"] * row["facts"]["BM"])
        found[window] = sum(row["per_weight"].values()) * row["facts"]["BN"] / row["facts"]["BM"]
    return found


def _static(sm: int) -> list[dict]:
    rows = static.read(STATIC)["rows"]
    return [row for row in rows if row["sm"] == sm and row["per_weight"] is not None]


def cublas(gpu: Gpu, k: int, n: int, m: int) -> float:
    """Seconds of the dense product in bfloat16 by the same rates."""
    moved, flops = 2 * (n * k + m * k + m * n), 2 * m * n * k
    return max(moved / (STREAM * gpu.bandwidth), flops / (DENSE * gpu.products["bf16"])) + START


def of_bars() -> dict[str, tuple[float, float, bool, str]]:
    """What the model expects of each bar it can speak of: (value, limit, whether more is better, what bounds it)."""
    h200, found = GPUS[1], instructions_a_weight()
    k, n = shapes.MAIN_GPU
    result = {}
    for m, limit in bars.H200_CUBLAS.items():
        product = Product(k, n, m, Format(4))
        time, bound = product.expected(h200, found)
        name = f"H200 linear 4-bit M={m}"
        result[f"{name}: cuBLAS bfloat16"] = (cublas(h200, k, n, m) / time, limit, True, bound)
        if m <= 8:
            result[f"{name}: of the copy bandwidth"] = (product.bytes / time / COPY, 0.65, True, bound)
    for m, limit in bars.H200_FP8.items():
        time, bound = Product(k, n, m, Format(4), "e4m3").expected(h200, found)
        result[f"H200 linear_fp8 4-bit M={m}: cuBLAS bfloat16"] = (cublas(h200, k, n, m) / time, limit, True, bound)
    time, bound = next(each for each in movers() if each.name == "`partition`").expected(h200)
    for rule in ("max", "mse"):
        result[f"H200 partition VGG-16, {rule}: time"] = (time * 1e3, 1.0, False, f"{bound} and starts of kernels")
    for op, size in (("masked_adamw", 28), ("masked_sgd", 20)):
        # Of torch's fused step, which moves the same without the mask.
        name = f"H200 {op}: time, of torch's fused step without a mask"
        result[name] = ((size + 1 / 8) / size, 1.02, False, "memory")
    return result


def missed() -> list[str]:
    """The bars that the model itself expects to be missed, markdown."""
    lines = []
    for name, (value, limit, at_least, bound) in of_bars().items():
        if value < limit if at_least else value > limit:
            word = "at least" if at_least else "at most"
            lines.append(f"- {name}: {value:.2f} expected, {word} {limit:g} asked ({bound})")
    return lines


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


def _convolutions() -> list[str]:
    names = " | ".join(f"{gpu.name} floor µs" for gpu in GPUS)
    lines = [f"| layer | images | MB | GFLOP | {names} | expected on an H200 | × floor | bound by |", "|" + "---|" * 9]
    found = instructions_an_element()
    for layer in shapes.RESNET50_GPU:
        for batch in shapes.BATCHES:
            each = Convolution(Layer(*layer), batch)
            time, bound = each.expected(GPUS[1], found)
            floors = [each.floor(gpu) for gpu in GPUS]
            cells = [each.layer, batch, f"{each.bytes / 1e6:.1f}", f"{each.flops / 1e9:.1f}"]
            cells += [*map(_microseconds, floors), _microseconds(time), f"{time / floors[1]:.1f}", bound]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def _movers() -> list[str]:
    names = " | ".join(f"{gpu.name} floor µs" for gpu in GPUS)
    lines = [f"| kernel | case | MB | launches | {names} | expected on an H200 | bound by |", "|" + "---|" * 8]
    for each in movers():
        time, bound = each.expected(GPUS[1])
        cells = [each.name, each.case, f"{each.bytes / 1e6:.1f}", str(each.launches)]
        cells += [*(_microseconds(each.floor(gpu)) for gpu in GPUS), _microseconds(time), bound]
        lines.append("| " + " | ".join(cells) + " |")
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
    lines += ["### `conv2d`, 4 bits, x bfloat16 and channels-last", "", *_convolutions(), ""]
    lines += ["### Kernels that move bytes", "", *_movers(), ""]
    lines += ["### Bars that this model expects to be missed", "", *missed(), ""]
    return "\n".join([*lines, END])


def instructions() -> str:
    """The table of integer instructions a weight, markdown."""
    capabilities = (80, 86, 89, 90)
    lines = [BEGIN_STATIC, "| product | M up to | " + " | ".join(f"sm_{sm}" for sm in capabilities) + " |"]
    lines.append("|" + "---|" * (2 + len(capabilities)))
    rows = {(row["name"], row["sm"]): row for row in static.read(STATIC)["rows"]}
    for dot in ("fp16", "bf16", "e4m3"):
        for m in tiles.ROWS:
            found = [rows.get((f"linear {dot} paper4 m{_first_with_tile(dot, m, sm)}", sm)) for sm in capabilities]
            cells = ["–" if row is None else f"{row['per_weight']['integer']:.2f}" for row in found]
            # More rows are decoded once and multiplied by the library, but for e4m3.
            last = "any" if dot == "e4m3" else tiles.DENSE_ROWS - 1
            lines.append(f"| {dot} | {m if m < tiles.ROWS[-1] else last} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, END_STATIC])


def _first_with_tile(dot: str, rows: int, sm: int) -> int:
    """Each tile is in the table once, under the fewest rows that it is for."""
    row = tiles.defaults(sm)[f"linear {dot}"]
    return next(r for r in tiles.ROWS if row[r] == row[rows])


def page(text: str) -> str:
    """``text`` with the tables as they are now."""
    for begin, end, table in ((BEGIN, END, tables), (BEGIN_STATIC, END_STATIC, instructions)):
        before, rest = text.split(begin)
        text = before + table() + rest.split(end)[1]
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
