"""Two results side by side: what became faster or slower."""

from __future__ import annotations

from ..table import render
from .report import key, label, microseconds

# Ratios to a baseline of the same run hardly depend on how busy the machine was; times do.
_HEADERS = ("isa", "case", "backend", "old", "new", "speed-up", "old ratio", "new ratio", "verdict")


def compare(old: dict, new: dict) -> str:
    """A table of the rows that both have, then what only one has, and a warning where the machines differ.

    "faster" and "slower" are said where the 95 % intervals of the ratio to the first baseline do not overlap.
    """
    before, after = _rows(old), _rows(new)
    cells = []
    for name in (name for name in after if name in before):
        cells.append((name[0], label(after[name]), name[2], *_cells(before[name], after[name])))
    lines = [] if _machines(old) == _machines(new) else ["The machines differ, so times cannot be compared:"]
    if lines:
        lines += [f"  old: {_machines(old)}", f"  new: {_machines(new)}"]
    lines.append(render(_HEADERS, cells) if cells else "No case is in both files.")
    for title, one, other in (("Only in the old", before, after), ("Only in the new", after, before)):
        if missing := [f"{name[0]} {label(row)} [{name[2]}]" for name, row in one.items() if name not in other]:
            lines += [f"{title} ({len(missing)}):", *(f"  {line}" for line in missing)]
    return "\n".join(lines)


def _rows(results: dict) -> dict[tuple, dict]:
    return {key(section, row): row for section in results["sections"] for row in section.get("rows", ())}


def _machines(results: dict) -> list[str]:
    fields = ("cpu", "cores", "threads", "isa")
    machines = [section["machine"] for section in results["sections"] if "machine" in section]
    return sorted({", ".join(str(machine[field]) for field in fields) for machine in machines})


def _cells(old: dict, new: dict) -> tuple[str, ...]:
    if old["error"] or new["error"]:
        red = ["red" if row["error"] else microseconds(row["time"]["median_us"]) for row in (old, new)]
        return (*red, "-", "-", "-", "red")
    times = [row["time"]["median_us"] for row in (old, new)]
    first = [_first(row) for row in (old, new)]
    verdict = "no baseline"
    if all(first) and first[0]["name"] == first[1]["name"]:
        a, b = first
        verdict = "faster" if b["low"] > a["high"] else "slower" if b["high"] < a["low"] else "same"
    ratios = [f"{b['ratio']:.2f}" if b else "-" for b in first]
    return (*map(microseconds, times), f"{times[0] / times[1]:.2f}", *ratios, verdict)


def _first(row: dict) -> dict | None:
    return next((b for b in row["baselines"] if "ratio" in b), None)
