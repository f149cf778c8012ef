"""Pictures of results, as PNG and SVG: time against M for each shape, and the roofline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

_BASELINES = {
    "dense bfloat16": "#444444",
    "dense float32": "#9aa4ad",
    "int4 g128": "#c8443c",
    "dynamic int8": "#e39a14",
    "cuBLAS bfloat16": "#444444",
    "cuBLAS float16": "#444444",
    "cuBLAS float32": "#9aa4ad",
    "_scaled_mm fp8": "#7b4fa3",
    "_weight_int4pack_mm": "#c8443c",
    "Humming": "#e39a14",
    "GemLite": "#b08968",
    "bitsandbytes NF4": "#d67ab1",
}
_OURS = {4: "#2a9d8f", 5: "#1b6ca8"}
_RC = {
    "svg.hashsalt": "inq",  # the same file twice
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e7ea",
    "axes.axisbelow": True,
}


def draw(results: dict, out: Path) -> list[Path]:
    """Draw what there are rows for into ``out``; the files written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    written = []
    for section in results["sections"]:
        rows = [row for row in section.get("rows", ()) if row["error"] is None]
        for backend in sorted({row["backend"] for row in rows}):
            mine = [row for row in rows if row["backend"] == backend]
            for name, function in (("time", _time), ("roofline", _roofline)):
                stem = f"{name}-{section['isa']}" + ("" if backend == "cpu" else f"-{backend}")
                written += _save(partial(function, section=section, rows=mine), out / stem)
    return written


def _save(draw_on: Callable[[object], bool], stem: Path) -> Iterator[Path]:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Neither pyplot nor a global backend: whoever imports this keeps theirs.
    with matplotlib.rc_context(_RC):
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        if not draw_on(figure):
            return
        for kind in ("png", "svg"):
            path = stem.with_suffix(f".{kind}")
            figure.savefig(path, dpi=120, metadata={"Date": None} if kind == "svg" else None)
            yield path


def _title(section: dict) -> str:
    m = section["machine"]
    if "gpu" in m:
        return f"{m['gpu']}, CUDA {m['cuda']}"
    return f"{m['cpu']}, {m['isa']}, {m['threads']} threads"


def _time(figure, section: dict, rows: list[dict]) -> bool:
    """Median time of ``linear`` against M, a panel for each shape and dtype, with the baselines of 4 bits."""
    linear = [row for row in rows if row["op"] == "linear"]
    panels = list(dict.fromkeys((row["params"]["shape"], row["params"]["dtype"]) for row in linear))
    if not panels:
        return False
    columns = min(len(panels), 4)
    lines = -(-len(panels) // columns)
    figure.set_size_inches(max(3.3 * columns, 5), 3 * lines + 0.6)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True)
    for ax in grid.flat[len(panels) :]:
        ax.set_axis_off()
    seen = {}
    for ax, (shape, dtype) in zip(grid.flat, panels, strict=False):
        here = sorted(
            (r for r in linear if (r["params"]["shape"], r["params"]["dtype"]) == (shape, dtype)),
            key=lambda r: r["params"]["m"],
        )
        for line, colour, style, points in _curves(here):
            if points:
                seen[line] = ax.loglog(*zip(*points, strict=True), style, color=colour, markersize=3, label=line)[0]
        ax.set_title(f"{shape} (K×N), {dtype} x", fontsize=9)
        ms = sorted({row["params"]["m"] for row in here})
        ax.set_xticks(ms[:: 1 if len(ms) < 8 else 2], map(str, ms[:: 1 if len(ms) < 8 else 2]), minor=False)
        ax.set_xticks([], minor=True)
        ax.set_xlabel("M")
        ax.set_ylabel("µs")
    figure.suptitle(_title(section), fontsize=10)
    figure.legend(
        seen.values(), seen.keys(), loc="outside lower center", ncols=3 * min(columns, 2), frameon=False, fontsize=8
    )
    return True


def _curves(rows: list[dict]) -> Iterator[tuple[str, str, str, list]]:
    least = min(row["params"]["bits"] for row in rows)
    for name, colour in _BASELINES.items():
        with_it = [(r, b) for r in rows if r["params"]["bits"] == least for b in r["baselines"] if b["name"] == name]
        yield name, colour, "--", [(r["params"]["m"], b["median_us"]) for r, b in with_it if "median_us" in b]
    for bits in sorted({row["params"]["bits"] for row in rows}):
        points = [(r["params"]["m"], r["time"]["median_us"]) for r in rows if r["params"]["bits"] == bits]
        yield f"inq {bits}-bit", _OURS.get(bits, "#7b4fa3"), "o-", points


def _roofline(figure, section: dict, rows: list[dict]) -> bool:
    """GFLOP/s against operations a byte moved, under the measured copy and product ceilings."""
    products = [row for row in rows if row.get("flops")]
    if not products:
        return False
    figure.set_size_inches(6.5, 4.2)
    ax = figure.subplots()
    low = min(row["flops"] / row["bytes"] for row in products) / 3
    high = max(row["flops"] / row["bytes"] for row in products) * 3
    copy, ceilings = section["ceilings"]["copy_gb_s"], section["ceilings"]["product_gflop_s"]
    for (name, ceiling), style in zip(ceilings.items(), ("--", "-", ":", "-."), strict=False):
        knee = min(max(ceiling / copy, low), high)
        ax.loglog([low, knee, high], [low * copy, knee * copy, min(ceiling, high * copy)], style, color="#444444",
                  label=f"copy {copy:.0f} GB/s, {name} product {ceiling:.0f} GFLOP/s")  # fmt: skip
    groups: dict[str, list[dict]] = {}
    for row in products:
        groups.setdefault(f"{row['op']} {row['params']['bits']}-bit {row['params']['dtype']}", []).append(row)
    for i, (name, members) in enumerate(groups.items()):
        points = [(row["flops"] / row["bytes"], row["gflop_s"]) for row in members]
        ax.loglog(
            *zip(*points, strict=True), "os^vDP*"[i % 7], markersize=4, alpha=0.75, color=f"C{i % 10}", label=name
        )
    ax.set_xlabel("operations a byte (weights, x and y moved once)")
    ax.set_ylabel("GFLOP/s")
    ax.set_title(_title(section), fontsize=10)
    ax.legend(frameon=False, fontsize=7)
    return True
