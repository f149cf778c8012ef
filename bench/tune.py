"""``inq bench tune --device cuda``: which tiles are fastest on the GPU at hand, as a file that INQ_TRITON_TILES names.

Each entry of the table (a kind of product, rows of x) is tried with the tiles that ``candidates`` gives: built by the
compiler, checked like every benchmark, then timed on each shape. The default stays unless another tile is faster by
more than the noise. Choosing needs no GPU: what measures a tile is an argument.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from ..triton_ops import tiles
from ..triton_ops.tiles import Tile
from . import gpu
from .case import Case, Context, Op, Request, Work
from .linear import LINEAR, LINEAR_DX, LINEAR_FP8
from .timing import CudaClock

# Entries of the table: the operator, x's dtype and the bits of weights whose products they are.
KINDS: dict[str, tuple[Op, str, int]] = {
    "linear fp16": (LINEAR, "float16", 4),
    "linear bf16": (LINEAR, "bfloat16", 4),
    "linear e4m3": (LINEAR_FP8, "bfloat16", 4),
    "linear e4m3 of 16": (LINEAR_FP8, "bfloat16", 5),
    "linear fp32": (LINEAR, "float32", 4),
    "linear_dx fp16": (LINEAR_DX, "float16", 4),
    "linear_dx bf16": (LINEAR_DX, "bfloat16", 4),
    "linear_dx fp32": (LINEAR_DX, "float32", 4),
}
# For each column of the table, the rows that are timed: 16 is for single tokens first.
MS = {16: (1, 16), 32: (32,), 64: (64,), 128: (256, 1024)}
SHAPES = ((8192, 8192), (4096, 14336))
# A tile that is not faster by this much may be noise, and its code was not looked at.
GAIN = 0.97
_SAMPLES = 5
# Shared memory that a block can have, KB (CUDA programming guide, by compute capability).
_SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
# float32 sums of a tile that a thread can hold beside everything else.
_MAX_SUMS = 128

# Seconds of one call with this tile in the place of the entry (name, rows); None where it does not build, or is wrong.
Measure = Callable[[str, int, Tile, "tuple[int, int]", int], "float | None"]


def candidates(name: str, rows: int, default: Tile, capability: int) -> list[Tile]:
    """The tiles to try for an entry of the table, the default first."""
    gradient = name.startswith("linear_dx")
    size, words, codes = (4 if "fp32" in name else 1 if "e4m3" in name else 2), 2, 4
    if name == "linear e4m3":
        words, codes = 1, 2
    most = 256
    if "fp32" in name:
        # No tensor cores to feed; and on sm_100 Triton 3.6 makes TF32 of tiles of 64 rows.
        most = 32 if 100 <= capability < 120 else 64
    # Of the gradient the rows of x are the left operand's, so that they make TF32.
    widest = most if gradient and "fp32" in name else 64
    found = [default]
    sides = (16, 32, 64) if gradient or "fp32" in name else (32, 64, 128)
    for bn, bm, bk, warps, stages in itertools.product(
        (32, 64, 128, 256), sorted({min(rows, widest), default.bm}), sides, (4, 8), (default.stages, default.stages + 1)
    ):
        tile = Tile(bn, bm, bk, warps, stages)
        # The gradient loads words and gradients, and keeps a sum for each slice of K; the others load x of each slice.
        loaded = bn * bk * words + (bn * bm if gradient else codes * bk * bm) * size
        held = codes * bk * bm if gradient else bn * bm
        fits = loaded * stages <= 1024 * _SHARED.get(capability, 99) and held <= _MAX_SUMS * 32 * warps
        # Fewer than 1 KB of words a step are all waiting.
        if fits and bn <= most and bn * bk * words >= 1024 and tile not in found:
            found.append(tile)
    return found


def best(default: Tile, times: Mapping[Tile, Sequence[float | None]]) -> tuple[Tile, float]:
    """(the tile, its time as a share of the default's): the least geometric mean over all shapes, by more than noise.

    A tile that failed for a shape is out; if the default did, any other that works is better.
    """
    whole = {tile: [math.log(t) for t in each] for tile, each in times.items() if each and None not in each}
    means = {tile: sum(each) / len(each) for tile, each in whole.items()}
    if not means:
        return default, 1.0
    fastest = min(means, key=means.__getitem__)
    if default not in means:
        return fastest, 0.0
    share = math.exp(means[fastest] - means[default])
    return (fastest, share) if share < GAIN else (default, 1.0)


def search(
    table: Mapping[str, Mapping[int, Tile]],
    names: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    capability: int,
    measure: Measure,
    report: Callable[[str], None] = print,
    within: float | None = None,
    now: Callable[[], float] = time.monotonic,
    keep: Callable[[dict[str, dict[int, Tile]]], None] = lambda found: None,
) -> dict[str, dict[int, Tile]]:
    """The entries of ``table`` that another tile is faster for. ``within``: seconds after which no entry is begun;
    ``keep``: gets what is found so far, at the start and after each entry with a faster tile."""
    began, found = now(), {}
    keep(found)
    entries = [(name, rows) for name in names for rows in table[name]]
    for name, rows in entries:
        if within is not None and now() - began > within:
            report(f"{name}, {rows} rows: left out, {within:g} seconds were over")
            continue
        default = table[name][rows]
        times: dict[Tile, list[float | None]] = {}
        for tile in candidates(name, rows, default, capability):
            each = times.setdefault(tile, [])
            for shape, m in itertools.product(shapes, MS[rows]):
                each.append(measure(name, rows, tile, shape, m))
                if each[-1] is None:
                    break
        tile, share = best(default, times)
        failed = sum(None in each for each in times.values())
        report(f"{name}, {rows} rows: {tile}, {share:.2f} of the default's time; {len(times)} tiles, {failed} failed")
        if tile != default:
            found.setdefault(name, {})[rows] = tile
            keep(found)
    return found


@contextmanager
def _forced(name: str, rows: int, tile: Tile, folder: Path) -> Iterator[None]:
    """This tile for the launchers, by the way that users have: a file for each, since files are read once."""
    path = folder / f"{name.replace(' ', '_')}-{rows}-{tile.bn}-{tile.bm}-{tile.bk}-{tile.warps}-{tile.stages}.json"
    tiles.save(path, "", {name: {rows: tile}})
    before = os.environ.get(tiles.ENVIRONMENT)
    os.environ[tiles.ENVIRONMENT] = str(path)
    try:
        yield
    finally:
        if before is None:
            del os.environ[tiles.ENVIRONMENT]
        else:
            os.environ[tiles.ENVIRONMENT] = before


class OnDevice:
    """Measures tiles on a CUDA device. The data of a shape is made once for all tiles."""

    def __init__(self, folder: Path, device: str = "cuda", clock: Callable[[], CudaClock] = CudaClock):
        self._folder, self._clock = folder, clock
        self._context = Context("triton", device)
        self._work: dict[tuple, Work] = {}

    def __call__(self, name: str, rows: int, tile: Tile, shape: tuple[int, int], m: int) -> float | None:
        with _forced(name, rows, tile, self._folder):
            try:
                work = self._of(name, shape, m)
                if work.check() is not None:
                    return None
                clock = self._clock()
                clock.seconds(work.candidate, 1)  # captured, and warm
                return median(clock.seconds(work.candidate, 1) for _ in range(_SAMPLES))
            # Whatever a compiler says about a tile means that it is not to be used.
            except Exception as error:
                print(f"  {tile}: {type(error).__name__}: {' '.join(str(error).split())[:100]}", file=sys.stderr)
                return None

    def _of(self, name: str, shape: tuple[int, int], m: int) -> Work:
        key = (name, shape, m)
        if key not in self._work:
            op, dtype, bits = KINDS[name]
            self._work = {k: work for k, work in self._work.items() if k[0] == name}  # of one kind at a time
            request = Request(shapes=(shape,), ms=(m,), bits=(bits,), dtypes=(dtype,), device="cuda")
            case: Case = next(iter(op.cases(request)))
            self._context.enter((name, shape))
            self._work[key] = case.build(self._context)
        return self._work[key]


def run(out: Path, shapes: Sequence[tuple[int, int]], names: Sequence[str], within: float | None) -> int:
    """Tune on the current device; ``out``/tiles.json. Returns an exit status.

    The file is there from the start and grows, so that neither a folder that cannot be written to nor an interruption
    costs what was measured.
    """
    found = gpu.describe()
    capability = found["capability"]
    out.mkdir(parents=True, exist_ok=True)
    path = out / "tiles.json"
    with tempfile.TemporaryDirectory() as folder:
        measure = OnDevice(Path(folder))
        # Without e4m3 products (linear_fp8.py) those entries are not used.
        names = [name for name in names if capability >= 89 or "e4m3" not in name]
        tuned = search(
            tiles.defaults(capability), names, shapes or SHAPES, capability, measure, within=within,
            keep=lambda so_far: tiles.save(path, found["gpu"], so_far),
        )  # fmt: skip
    count = sum(map(len, tuned.values()))
    print(f"{path}: {count} tiles that are faster than the defaults; {tiles.ENVIRONMENT}={path} uses them")
    return 0
