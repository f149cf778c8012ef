"""The pictures of ``inq demo``, as SVG. matplotlib is imported when a picture is drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from .. import checkpoint, ops
from .train import FLOAT, Places

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

COLOURS = {5: "#1b6ca8", 4: "#2a9d8f", 3: "#e39a14", 2: "#c8443c"}
GREY = "#9aa4ad"
# The layer whose weights are drawn: more than half of all.
LAYER = "fc1"
# Weights under 2^LOWEST are drawn as zeros.
LOWEST = -12

_RC = {
    "svg.hashsalt": "inq",  # the same file twice
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.grid": True,
    "grid.color": "#e4e7ea",
    "axes.axisbelow": True,
}


@dataclass(frozen=True)
class Figure:
    """A picture, its heading and its legend in words; ``draw`` takes an empty canvas, the output folder, results."""

    title: str
    caption: str
    size: tuple[float, float]
    draw: Callable[[Canvas, Path, dict], None]


def figure_svg(figure: Figure, out: Path, results: dict, kind: str = "svg") -> bytes:
    """``figure`` as an SVG file's bytes (``kind`` "png" for a look at it)."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    # Neither pyplot nor a global backend: whoever imports this keeps theirs.
    with matplotlib.rc_context(_RC):
        canvas = Canvas(figsize=figure.size, layout="constrained")
        FigureCanvasAgg(canvas)
        figure.draw(canvas, out, results)
        buffer = io.BytesIO()
        canvas.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _rows(results: dict, rule: str) -> list[dict]:
    """The rows with the paper's levels and magnitude partition under one exponent rule, most bits first."""
    return [row for row in results["rows"] if row["key"] in [f"{rule}-{bits}" for bits in COLOURS]]


def _panels(canvas: Canvas, results: dict) -> Iterator[tuple[Axes, dict]]:
    """One panel for each bit-width (columns) and exponent rule (lines) that there is a row for, all on one scale."""
    grid = canvas.subplots(2, len(COLOURS), sharex=True, sharey=True)
    for line, rule, name in zip(grid, ("mse", "max"), ("mse", "max (paper)"), strict=True):
        rows = {row["format"]["bits"]: row for row in _rows(results, rule)}
        for ax, bits in zip(line, COLOURS, strict=True):
            if bits in rows:
                ax.set_title(f"{bits} bits, {name}")
                yield ax, rows[bits]
            else:
                ax.set_axis_off()


# --- accuracy along the portions --------------------------------------------------------------------------------------

_ACCURACY_TICKS = (0, 50, 80, 90, 95, 98, 99, 99.5, 100)


def _height(percent: float) -> float:
    """Where an accuracy is on an axis that shows 99.5 and 99.8 apart as well as 10 and 50, 100 included."""
    return -math.log10(100.2 - percent)


def _draw_curves(canvas: Canvas, out: Path, results: dict) -> None:
    float32 = next(row for row in results["rows"] if row["key"] == FLOAT.key)["mean"]
    worst = 100.0
    for ax, row in _panels(canvas, results):
        bits, curves = row["format"]["bits"], row["curves"]
        colour = COLOURS[bits]
        portions = [point["portion"] for point in curves[0]]
        retrained = [[point["retrained"] for point in points] for points in zip(*curves, strict=True)]
        quantized = [[point["quantized"] for point in points] for points in zip(*curves, strict=True)]
        low, high = ([_height(pick(p)) for p in retrained] for pick in (min, max))
        ax.axhline(_height(float32), color="#444", linewidth=1, linestyle="--", label="float32")
        ax.fill_between(portions, low, high, color=colour, alpha=0.2, linewidth=0)
        ax.plot(portions, [_height(fmean(p)) for p in retrained], "o-", color=colour, markersize=4, label="retrained")
        ax.plot(portions, [_height(fmean(p)) for p in quantized], ":", color=colour, label="just quantized")
        worst = min(worst, *map(fmean, quantized), *map(min, retrained))
        # The axes share it. Ticks below would widen it again.
        ticks = [t for t in _ACCURACY_TICKS if t >= max(t for t in _ACCURACY_TICKS if t <= worst)]
        ax.set_yticks([_height(t) for t in ticks], [f"{t:g}" for t in ticks])
        ax.set_ylim(_height(ticks[0]), _height(100) + 0.05)
        if bits == max(COLOURS):
            ax.legend(loc="lower left", frameon=False, fontsize=8)
    canvas.supxlabel("portion of the weights that is quantized", fontsize=10)
    canvas.supylabel("test accuracy, %", fontsize=10)


# --- weights before and after -----------------------------------------------------------------------------------------


def _draw_weights(canvas: Canvas, out: Path, results: dict) -> None:
    seed = results["seeds"][0]
    before = load_file(Places(out, FLOAT.key, seed).model)[f"{LAYER}.weight"]
    top = 0.0
    for ax, row in _panels(canvas, results):
        entries = checkpoint.load(Places(out, row["key"], seed).model)
        after = ops.unpack(entries[f"{LAYER}.weight"])
        top = max(top, _draw_weight_panel(ax, before, after, COLOURS[row["format"]["bits"]]))
        ax.set_ylim(0, 1.25 * top)  # the axes share it
        ax.set_xlim(-_place(1.0), _place(1.0))
        powers = (-2, -8)
        ticks = {f"${sign}2^{{{k}}}$": _place(float(f"{sign}1") * 2.0**k) for sign in "-+" for k in powers}
        ticks["0"] = 0.0
        ax.set_xticks(list(ticks.values()), list(ticks))
    canvas.supxlabel("weight", fontsize=10)
    canvas.supylabel("share of the weights an octave", fontsize=10)


def _place(weight: float) -> float:
    """Where a weight is on the signed logarithmic axis: 0 and what is under 2^LOWEST in the middle."""
    return math.copysign(max(math.log2(abs(weight)) - LOWEST + 1, 0.0), weight) if weight else 0.0


def _draw_weight_panel(ax, before: torch.Tensor, after: torch.Tensor, colour: str) -> float:
    """Returns the largest share among the powers of two and the float weights; zeros may exceed it and are labelled."""
    places = torch.sign(before) * (torch.log2(before.abs()) - LOWEST + 1).clamp(min=0)
    places = places[places != 0]
    per_octave, reach = 4, 2 - LOWEST
    counts = torch.histc(places, 2 * reach * per_octave, -reach, reach) / before.numel() * per_octave
    edges = [-reach + i / per_octave for i in range(2 * reach * per_octave + 1)]
    ax.stairs(counts.tolist(), edges, fill=True, color=GREY, alpha=0.55)
    values, shares = torch.unique(after, return_counts=True)
    shares = (shares / after.numel()).tolist()
    bars = dict(zip(values.tolist(), shares, strict=True))
    ax.bar([_place(v) for v in bars], bars.values(), width=0.7, color=colour, alpha=0.85)
    zeros = bars.pop(0.0, 0.0)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.9}
    middle = {"xycoords": "axes fraction", "ha": "center", "va": "top", "fontsize": 9}
    ax.annotate(f"zeros {zeros:.0%}", (0.5, 0.97), bbox=box, **middle)
    return max(*bars.values(), float(counts.max()))


# --- exponents --------------------------------------------------------------------------------------------------------


def _draw_exponents(canvas: Canvas, out: Path, results: dict) -> None:
    rows = _rows(results, "mse")
    layers = [layer["name"] for layer in rows[0]["layers"]]
    grid = canvas.subplots(len(rows), len(layers), sharex=True, sharey=True, squeeze=False)
    for line, row in zip(grid, rows, strict=True):
        bits = row["format"]["bits"]
        for ax, layer in zip(line, row["layers"], strict=True):
            exponents = {int(k): count / layer["weights"] for k, count in layer["exponents"].items()}
            ax.bar(exponents.keys(), exponents.values(), width=0.8, color=COLOURS[bits])
            zeros = layer["zeros"] / layer["weights"]
            ax.annotate(f"zeros {zeros:.0%}", (0.03, 0.95), xycoords="axes fraction", va="top", fontsize=9)
        line[0].set_ylabel(f"{bits} bits\nshare")
    for ax, name in zip(grid[0], layers, strict=True):
        ax.set_title(name)
    for ax in grid[-1]:
        ax.set_xlabel("exponent k of $2^k$")


FIGURES = (
    Figure(
        "Accuracy along the portions",
        "Solid: mean test accuracy after the retraining that follows each portion; bands: from the worst to the best "
        "seed; dotted: just after quantizing, before retraining. Dashed: float32, where INQ starts. The axis is "
        "stretched towards 100 %.",
        (10, 5),
        _draw_curves,
    ),
    Figure(
        f"The weights of {LAYER} before and after",
        "Grey: the float32 weights before INQ. Coloured: what INQ made of them, one bar a value (first seed, signed "
        "logarithmic axis, the zeros in the middle, where their bar may leave the picture).",
        (10, 4.8),
        _draw_weights,
    ),
    Figure(
        "Exponents of every layer",
        "Share of the weights of a layer with each power of two, exponents by mse, first seed; the zeros are the rest.",
        (10, 6.5),
        _draw_exponents,
    ),
)
