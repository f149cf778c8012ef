"""What ``inq demo`` shows: one table, on the terminal and in a self-contained HTML page."""

from __future__ import annotations

import base64
import dataclasses
import importlib.util
import shutil
import statistics
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .. import files
from ..table import render
from .figures import FIGURES, figure_svg
from .train import BY_KEY, FLOAT

HEADERS = ("weights", "bits", "levels", "accuracy %", "− float32", "bits/weight", "file bytes", "ratio")
# rich would cut cells off in a narrower terminal.
_RICH_WIDTH = 112

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #666; } tr.float { background: #f2f4f6; }
img { width: 100%; height: auto; } .warning { background: #fff1c9; padding: .6rem 1rem; }
figure { margin: 1rem 0; } figcaption, small { color: #555; font-size: .9rem; } .wide { overflow-x: auto; }
"""


def summarize(outcomes: Sequence[dict]) -> list[dict]:
    """One entry a row: its numbers, the mean and sample standard deviation over seeds, and the differences to float32
    of the same seed. Layers are the first seed's."""
    by_row: dict[str, list[dict]] = {}
    for outcome in outcomes:
        by_row.setdefault(outcome["row"], []).append(outcome)
    float32 = by_row[FLOAT.key]
    summary = []
    for key, group in by_row.items():
        row = BY_KEY[key]
        accuracies = [o["accuracy"] for o in group]
        differences = [a - o["accuracy"] for a, o in zip(accuracies, float32, strict=True)]
        size = statistics.fmean(o["file_bytes"] for o in group)
        summary.append(
            {
                "key": key,
                "title": row.title,
                "format": None if row.format is None else dataclasses.asdict(row.format),
                "partition": None if row.format is None else row.partition,
                "portions": list(row.portions),
                "levels": None if row.format is None else 2 * row.format.magnitudes + 1,
                "accuracy": accuracies,
                "mean": statistics.fmean(accuracies),
                "std": statistics.stdev(accuracies) if len(group) > 1 else None,
                "difference": statistics.fmean(differences),
                "difference_std": statistics.stdev(differences) if len(group) > 1 else None,
                "weights": group[0]["weights"],
                "weight_bytes": group[0]["weight_bytes"],
                "bits_per_weight": 8 * group[0]["weight_bytes"] / group[0]["weights"],
                "file_bytes": round(size),
                "ratio": statistics.fmean(o["file_bytes"] for o in float32) / size,
                "curves": [o["curve"] for o in group] if row.format else None,
                "layers": group[0].get("layers"),
            }
        )
    return summary


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _spread(std: float | None) -> str:
    return "" if std is None else f" ± {std:.2f}"


def table_cells(results: dict) -> list[tuple[str, ...]]:
    """The table's cells, as text, under ``HEADERS``."""
    cells = []
    for row in results["rows"]:
        fmt = row["format"]
        difference = "" if row["key"] == "float32" else _signed(row["difference"]) + _spread(row["difference_std"])
        cells.append(
            (
                row["title"],
                str(fmt["bits"]) if fmt else "32",
                str(row["levels"] or ""),
                f"{row['mean']:.2f}{_spread(row['std'])}",
                difference,
                f"{row['bits_per_weight']:.2f}",
                str(row["file_bytes"]),
                f"{row['ratio']:.2f}",
            )
        )
    return cells


def caption(results: dict) -> str:
    """One sentence on what the table's numbers are."""
    seeds, images = results["seeds"], results["images"]
    spread = f"mean ± standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    quick = "; QUICK: trained too short for the accuracies to mean anything" if results["quick"] else ""
    return f"Test accuracy on {images['test']} images, {spread}; differences within a seed{quick}"


def print_table(results: dict) -> None:
    """The table on stdout: by rich, where that is installed, on a terminal that is wide enough; else as plain text."""
    cells, title = table_cells(results), caption(results)
    narrow = shutil.get_terminal_size().columns < _RICH_WIDTH
    if not sys.stdout.isatty() or narrow or importlib.util.find_spec("rich") is None:
        print(f"{title}\n\n{render(HEADERS, cells)}")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for i, header in enumerate(HEADERS):
        table.add_column(header, justify="right" if i else "left", no_wrap=True)
    for row in cells:
        table.add_row(*row)
    Console().print(table)


# --- the page ---------------------------------------------------------------------------------------------------------


def write_html(out: Path, results: dict) -> None:
    """``out``/report.html, which loads nothing from anywhere."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><title>INQ on handwritten digits</title>',
        f"<style>{_STYLE}</style></head><body>",
        "<h1>Incremental Network Quantization on handwritten digits</h1>",
        _warning(results),
        f"<p>{_introduction(results)}</p>",
        _html_table(HEADERS, table_cells(results)),
        f"<p><small>{escape(caption(results))}.</small></p>",
    ]
    for figure in FIGURES:
        svg = base64.b64encode(figure_svg(figure, out, results)).decode()
        parts += [
            f"<h2>{escape(figure.title)}</h2><figure>",
            f'<img alt="{escape(figure.title)}" src="data:image/svg+xml;base64,{svg}">',
            f"<figcaption>{escape(figure.caption)}</figcaption></figure>",
        ]
    parts += ["<h2>Layer by layer</h2>", _layers(results), "<h2>Notes</h2>", _notes(results), "</body></html>"]
    files.write_text(out / "report.html", "\n".join(filter(None, parts)) + "\n")


def _warning(results: dict) -> str:
    if not results["quick"]:
        return ""
    return '<p class="warning">A quick run: trained too short for the accuracies to mean anything.</p>'


def _introduction(results: dict) -> str:
    rows = {row["key"]: row for row in results["rows"]}
    said = [
        f"{row['format']['bits']} bits {row['mean']:.2f} % in a file {row['ratio']:.1f} times smaller"
        for key in ("mse-5", "mse-4", "mse-3", "mse-2")
        if (row := rows.get(key))
    ]
    return (
        "A small convolutional network was trained in float32 on the 8×8 images of handwritten digits that "
        f"scikit-learn carries: {rows['float32']['mean']:.2f} % of the test images are read correctly. From those "
        "weights, INQ turned every weight of every layer, first and last included, into 0 or ± a power of two, portion "
        f"by portion, retraining what was not yet frozen: {'; '.join(said)}. Each was packed, saved, and "
        f"loaded in a new process ({results['check']['networks']} files): its outputs equalled those before saving bit "
        "for bit, and those of the float network with the same weights within the rounding of float32 sums."
    )


def _html_table(headers: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in headers)
    body = ""
    for row in rows:
        kind = ' class="float"' if row[0].startswith("float32") else ""
        body += f"<tr{kind}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _layers(results: dict) -> str:
    """n1, zeros and SQNR of each layer, for each row of the default partition."""
    rows = [row for row in results["rows"] if row["layers"]]
    names = [f"{layer['name']} ({layer['weights']})" for layer in rows[0]["layers"]]
    cells = []
    for row in rows:
        cell = [
            f"2^{x['n1'][0]}, {100 * x['zeros'] / x['weights']:.0f} %, {x['sqnr_db']:.1f} dB" for x in row["layers"]
        ]
        cells.append((row["title"], *(text.replace("-", "−") for text in cell)))
    text = (
        "First seed: the largest power of two, the share of zeros, and the signal to quantization noise ratio of the "
        "weights at the moments when they were frozen."
    )
    return f"<p>{text}</p>" + _html_table(("weights", *names), cells)


def _notes(results: dict) -> str:
    images, seeds, recipe = results["images"], results["seeds"], results["recipe"]
    rows = {row["key"]: row for row in results["rows"]}
    machine, software, timing = results["machine"], results["software"], results["timing"]
    step = 100 / images["test"]
    items = [
        f"Data: {images['train'] + images['test']} images, split once (seed {images['split_seed']}, the same share of "
        f"each digit) into {images['train']} for training and {images['test']} for testing; all seeds use this split. "
        f"One test image is {step:.2f} points, so differences under that are less than one image. How hard the test "
        "images are depends on the split, for float32 as for the others: read differences, not levels.",
        f"Seeds {seeds[0]} to {seeds[-1]}: initial weights, order of the images, random partition. Within a seed all "
        "rows start from the same float32 weights.",
        f"Recipe, the same for every row: SGD, momentum {recipe['momentum']}, weight decay {recipe['weight_decay']}, "
        f"batches of {recipe['batch']}, label smoothing {recipe['label_smoothing']}; float32 {recipe['epochs']} epochs "
        f"from learning rate {recipe['lr']}, retraining {recipe['retrain_epochs']} epochs from {recipe['retrain_lr']} "
        "after each portion, each along a cosine to 0. All this was chosen once, with validation images taken from the "
        "training ones. Accuracy is that after the last epoch, never the best one. The portions are the paper's for "
        "ResNet-18. After the last portion only biases and batch norm still train.",
        "“trained as long” repeats the schedule in float32 as often as 2 bits has portions: whatever it gains is due "
        "to more training, not to quantization.",
        "“mse” takes the largest power of two that gives the least squared error (larger weights saturate), “max” is "
        "the paper's rule, from the largest weight. With few levels one large weight sends most of a layer to 0: the "
        "table shows what that costs at 3 and 2 bits. “dense” uses all codes of 4 bits (15 values instead of 9).",
        "Rounding a bell-shaped layer to powers of two alone cannot exceed about 15 dB, whatever the number of bits: "
        "it is retraining that makes this lossless, not the number format.",
        f"Bits per weight: codes and exponents of the packed weights, {rows['float32']['weights']:,} of them. The "
        "ratio is of whole files: header, checksums, biases and batch norm, which stay float32, are a large part of "
        f"files as small as these ({_overhead(results)}). The weights alone shrink by 32 / bits per weight.",
        f"Made with inq_kernels {software['inq_kernels']} (commit {software['commit'] or 'unknown'}), torch "
        f"{software['torch']}, Python {software['python']}, on {machine['cpu'] or machine['architecture']}, "
        f"{machine['cores']} cores, in {timing['wall_s']:.0f} s. The same seeds on the same machine and versions give "
        "the same table; another processor may round sums differently.",
    ]
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def _overhead(results: dict) -> str:
    smallest = min((row for row in results["rows"] if row["format"]), key=lambda row: row["file_bytes"])
    other = smallest["file_bytes"] - smallest["weight_bytes"]
    return f"{other:,} of {smallest['file_bytes']:,} bytes at {smallest['format']['bits']} bits"
