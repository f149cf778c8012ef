"""``inq bench compress``: entropy-coded codes beside their entropy, other coders and other symbols.

Weights are Gaussian, quantized by INQ in one shot, dense and after the smallest were pruned; or the layers of a packed
checkpoint (``--model``). A coder gets the symbols of compression.py (``symbols``), the storage layout as bytes
(``packed``) or a byte for each code (``codes``). Each is decoded and compared before it is timed.

Speed is in float32-equivalent bytes: four a weight, whatever its bits. Times are of the thread's processor, not of the
clock on the wall, and medians over rounds in which all take turns: others on the machine disturb them less.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import json
import lzma
import math
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from .. import checkpoint, compression, ops
from ..format import Format
from ..ops import PackedWeight
from ..table import render
from . import machine

SCHEMA = 1
# Of Gaussian weights: rows and columns, and rounds of timing; and the same with --quick.
_SHAPE, _SHAPE_QUICK = (512, 4096), (128, 4096)
_ROUNDS, _ROUNDS_QUICK = 5, 3
_FORMATS = [Format(bits, levels) for bits in (2, 3, 4, 5) for levels in ("paper", "dense")]
_LZMA = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 0, "pb": 0}]
# What an issue asked for: percent over the entropy, GB/s; of dense layers of 3 to 5 bits, and of all others.
BARS = {"dense": (3.0, 1.0), "other": (3.0, 0.1)}

Decoder = Callable[[], np.ndarray]


def gaussian(fmt: Format, shape: tuple[int, int], pruned: float) -> PackedWeight:
    """INQ in one shot of Gaussian weights whose smallest part was pruned."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=g) * 0.02
    if pruned:
        w[w.abs() <= w.abs().flatten().kthvalue(int(pruned * w.numel())).values] = 0
    n1 = ops.exponents(w, fmt)
    return ops.pack(ops.quantize(w, fmt, n1), fmt, n1)


def _layers(model: Path | None, quick: bool) -> Iterator[tuple[str, PackedWeight]]:
    if model is not None:
        for name, value in checkpoint.load(model).items():
            if isinstance(value, PackedWeight):
                yield name, value
        return
    shape = _SHAPE_QUICK if quick else _SHAPE
    for fmt in _FORMATS:
        if fmt == Format(2, "dense"):  # the same codes as paper levels
            continue
        for granularity in ("tensor", "channel"):
            for pruned in (0.0, 0.9) if granularity == "channel" else (0.0, 0.9, 0.99):
                made = Format(fmt.bits, fmt.levels, granularity)
                name = f"{fmt.bits} {fmt.levels} {granularity}" + (f", {pruned:.0%} pruned" if pruned else "")
                yield name, gaussian(made, shape, pruned)


# --- other coders -----------------------------------------------------------------------------------------------------


def _zstd(symbols: np.ndarray, level: int) -> tuple[int, Decoder]:
    import zstandard

    coded = zstandard.ZstdCompressor(level=level).compress(symbols.tobytes())
    return len(coded), lambda: np.frombuffer(zstandard.ZstdDecompressor().decompress(coded), np.uint8)


def _huffman(symbols: np.ndarray) -> tuple[int, Decoder]:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    coded = coder.compress(symbols.tobytes()) + coder.flush()
    return len(coded), lambda: np.frombuffer(zlib.decompress(coded, -15, symbols.size), np.uint8)


def _deflate(symbols: np.ndarray) -> tuple[int, Decoder]:
    coded = zlib.compress(symbols.tobytes(), 6)
    return len(coded), lambda: np.frombuffer(zlib.decompress(coded, bufsize=symbols.size), np.uint8)


def _lzma(symbols: np.ndarray) -> tuple[int, Decoder]:
    coded = lzma.compress(symbols.tobytes(), lzma.FORMAT_RAW, filters=_LZMA)
    return len(coded), lambda: np.frombuffer(lzma.decompress(coded, lzma.FORMAT_RAW, filters=_LZMA), np.uint8)


def _ans(symbols: np.ndarray) -> tuple[int, Decoder]:
    stream = importlib.import_module("constriction").stream
    counts = np.bincount(symbols)
    used = np.flatnonzero(counts)
    if used.size < 2:
        raise ImportError("a single symbol, which its models do not take")
    numbers = np.zeros(256, np.int32)
    numbers[used] = np.arange(used.size)
    model = stream.model.Categorical((counts[used] / symbols.size).astype(np.float64), perfect=False)
    coder = stream.stack.AnsCoder()
    coder.encode_reverse(numbers[symbols], model)
    coded = coder.get_compressed()
    table = used.astype(np.uint8)
    return coded.nbytes, lambda: table[stream.stack.AnsCoder(coded).decode(model, symbols.size)]


# name → symbols, coder. The first is what compression.py would be without masks and with zstd as it comes.
OTHERS: dict[str, tuple[str, Callable[[np.ndarray], tuple[int, Decoder]]]] = {
    "zstd -3, symbols": ("symbols", lambda s: _zstd(s, 3)),
    "zstd -3, packed": ("packed", lambda s: _zstd(s, 3)),
    "zstd -19, packed": ("packed", lambda s: _zstd(s, 19)),
    "zlib Huffman, symbols": ("symbols", _huffman),
    "zlib -6, packed": ("packed", _deflate),
    "lzma, packed": ("packed", _lzma),
    "ANS (constriction), codes": ("codes", _ans),
    "ANS (constriction), symbols": ("symbols", _ans),
}


# --- one layer --------------------------------------------------------------------------------------------------------


def _entropy(codes: np.ndarray) -> float:
    counts = np.bincount(codes)
    portions = counts[counts > 0] / codes.size
    return float(-(portions * np.log2(portions)).sum())


def _times(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of the processor by median; every round runs each of ``calls`` once."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.thread_time()
            call()
            found[name].append(time.thread_time() - begin)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def measure(name: str, packed: PackedWeight, rounds: int, folder: Path, others: bool = True) -> dict:
    """One row of the results; raises ValueError if something decodes to other codes."""
    fmt, count = packed.format, math.prod(packed.shape)
    codes = compression._codes(packed.weight.numpy(), packed.k, fmt.bits)
    entropy = _entropy(codes)
    encoded = compression.encode(name, packed.weight, packed.shape, fmt)
    row = {"layer": name, "weights": count, "zeros": float((codes == 0).mean()), "entropy": entropy, "others": {}}
    calls: dict[str, Callable[[], object]] = {}
    stored = packed.weight.numel()
    if encoded is not None:
        tensor, coding = encoded
        stored, row["coding"] = tensor.numel(), coding.name
        calls["decode"] = lambda: compression.decode(name, tensor, coding, packed.shape, fmt)
    for compress, file in ((False, "plain"), (True, "compressed")):
        path = folder / f"{file}.safetensors"
        checkpoint.save({"weight": packed}, path, compress)
        calls[f"load {file}"] = lambda path=path: checkpoint.load(path)
    symbols = {"symbols": compression._symbols(codes, fmt.bits), "packed": packed.weight.numpy().reshape(-1)}
    symbols["codes"] = codes
    sizes = {}
    for other, (kind, coder) in OTHERS.items() if others else ():
        try:
            sizes[other], calls[other] = coder(symbols[kind])
        except ImportError as error:
            row["others"][other] = {"reason": str(error)}
            continue
        if not np.array_equal(calls[other](), symbols[kind]):
            raise ValueError(f"{name}: {other}: expected the same symbols after decoding, got others")
    seconds = _times(calls, rounds)
    speeds = {call: 4 * count / max(took, 1e-9) / 1e9 for call, took in seconds.items()}
    row |= {"bits": 8 * stored / count, "over_percent": _over(8 * stored / count, entropy)}
    row |= {f"{call.replace(' ', '_')}_gb_s": speeds[call] for call in calls if call not in OTHERS}
    for other, size in sizes.items():
        bits = 8 * size / count
        row["others"][other] = {"bits": bits, "over_percent": _over(bits, entropy), "decode_gb_s": speeds[other]}
    row["bar"] = _bar(fmt, row)
    return row


def _over(bits: float, entropy: float) -> float:
    return 100 * (bits / entropy - 1) if entropy else math.inf


def _bar(fmt: Format, row: dict) -> str:
    """Whether the row meets what was asked for; small layers are all header, so they are not held against it."""
    over, speed = BARS["dense" if fmt.bits > 2 and row["zeros"] < 0.5 else "other"]
    if row["weights"] < 1 << 18 or "decode_gb_s" not in row:
        return "open"
    return "pass" if row["over_percent"] < over and row["decode_gb_s"] >= speed else "fail"


# --- the table --------------------------------------------------------------------------------------------------------


def text(rows: list[dict]) -> str:
    """Two tables: what files hold and how fast they are read; and other coders, percent over the entropy and GB/s."""
    first = [
        (
            row["layer"], row.get("coding", "packed"), f"{row['entropy']:.3f}", f"{row['bits']:.3f}",
            f"{row['over_percent']:.2f}", *(f"{row[key]:.2f}" if key in row else "-" for key in
            ("decode_gb_s", "load_compressed_gb_s", "load_plain_gb_s")), row["bar"],
        )
        for row in rows
    ]  # fmt: skip
    headers = ("layer", "codes", "entropy", "bits", "over %", "decode GB/s", "load GB/s", "load plain GB/s", "bar")
    names = [name for name in OTHERS if any(name in row["others"] for row in rows)]
    second = []
    for row in (row for row in rows if row["others"]):
        cells = (row["others"].get(name, {"reason": "-"}) for name in names)
        shown = ("-" if "reason" in c else f"{c['over_percent']:.1f} % {c['decode_gb_s']:.2f}" for c in cells)
        second.append((row["layer"], *shown))
    return render(headers, first) + ("\n\n" + render(("layer", *names), second) if names else "")


def run(out: Path | None, model: Path | None = None, quick: bool = False) -> int:
    """Measure, print, and write results.json into ``out``; 1 if a bar is missed."""
    compression.check_available("inq bench compress")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    began, rows = datetime.datetime.now(datetime.timezone.utc), []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, packed in _layers(model, quick):
                # Exponents a channel change the codes little: once beside the other coders is enough.
                others = packed.format.granularity == "tensor"
                rows.append(measure(name, packed, _ROUNDS_QUICK if quick else _ROUNDS, Path(folder), others))
                print(".", end="", file=sys.stderr, flush=True)
    finally:
        torch.set_num_threads(threads)
    print("", file=sys.stderr)
    results = {"schema": SCHEMA, "created": began.isoformat(timespec="seconds"), "machine": machine.describe(),
               "software": machine.software() | _coders(), "rows": rows}  # fmt: skip
    print(text(rows))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (out / "results.txt").write_text(text(rows) + "\n")
    return int(any(row["bar"] == "fail" for row in rows))


def _coders() -> dict[str, str]:
    found = {}
    for name in ("zstandard", "constriction"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
