"""Rows for people, results as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from .. import files

SCHEMA = 1


def key(section: dict, row: dict) -> tuple:
    """What says that two rows of two files are the same measurement."""
    return (section["isa"], row["op"], row["backend"], json.dumps(row["params"], sort_keys=True))


def label(row: dict) -> str:
    """``linear 14336x4096 m=1 4-bit bfloat16``."""
    p = row["params"]
    words = [row["op"], str(p["shape"])]
    words += [f"m={p['m']}"] if "m" in p else []
    words += [f"{p['bits']}-bit"] if "bits" in p else []
    words += [str(p[name]) for name in ("exponent", "dtype", "call") if name in p]
    words += [f"into {p['out']} memory"] if "out" in p else []
    return " ".join(words + (["with grad"] if p.get("grad") else []))


def row_lines(row: dict) -> Iterator[str]:
    """A row for people: the candidate, then a line for each baseline."""
    if row["error"] is not None:
        yield f"{label(row)} [{row['backend']}]: RED, so no speed: {row['error']}"
        return
    t = row["time"]
    numbers = f"{microseconds(t['median_us'])} ({t['p10_us']:.4g} to {t['p90_us']:.4g})  {row['gb_s']:.1f} GB/s"
    numbers += f" ({row['of_copy']:.0%} of copy)"
    if "gflop_s" in row:
        numbers += f"  {row['gflop_s']:.1f} GFLOP/s ({row['of_product']:.0%} of product)"
    yield f"{label(row)} [{row['backend']}]: {numbers}{_facts(row['facts'])}"
    for b in row["baselines"]:
        if "reason" in b:
            yield f"    {b['name']:<24} {b['reason']}"
        else:
            interval = f"[{b['low']:.2f}, {b['high']:.2f}]"
            numbers = f"{microseconds(b['median_us'])}  {b['ratio']:6.2f}× {interval}, {_pairs(b)}"
            how = b.get("timing", "")
            yield f"    {b['name']:<24} {numbers}{'  ' + how if how.startswith('eager') else ''}"
    yield from _eager(row)


def _pairs(baseline: dict) -> str:
    """Results from before pairs were set aside have no ``taken``."""
    pairs, taken = baseline["pairs"], baseline.get("taken", baseline["pairs"])
    if baseline.get("busy"):
        return f"{pairs} pairs, busy"
    return f"{pairs} pairs" if pairs == taken else f"{pairs} quiet of {taken} pairs"


def _eager(row: dict) -> Iterator[str]:
    """The times from Python, launches included, where they were taken beside those of graphs."""
    if eager := row.get("eager"):
        first = next((b for b in eager["baselines"] if "ratio" in b), None)
        beside = f", {first['ratio']:.2f}× {first['name']}" if first else ""
        yield f"    {'eager':<24} {microseconds(eager['time']['median_us'])}{beside}"


def _facts(facts: dict) -> str:
    return "".join(f"  {name} {v:.4g}" if isinstance(v, float) else f"  {name} {v}" for name, v in facts.items())


def microseconds(us: float) -> str:
    """``1234.5 µs`` with four digits."""
    return f"{us:.4g} µs" if us < 10_000 else f"{us:.0f} µs"


def write(path: Path, results: dict) -> None:
    """The results as JSON, whole or not at all."""
    files.write_text(path, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read(path: Path) -> dict:
    """Results as ``write`` left them.

    Raises:
        ValueError: the file holds something else. OSError.
    """
    try:
        results = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected JSON of inq bench, got something else: {error}") from None
    if not isinstance(results, dict) or results.get("schema") != SCHEMA or "sections" not in results:
        got = results.get("schema") if isinstance(results, dict) else type(results).__name__
        raise ValueError(f"{path}: expected results of inq bench with schema {SCHEMA}, got {got!r}")
    return results
