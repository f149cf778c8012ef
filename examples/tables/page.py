"""The tables as Markdown, from results.json alone."""

from __future__ import annotations

import re
from collections.abc import Sequence

from inq_kernels import DNS_PORTIONS

from . import tables
from .jobs import LANGUAGE_MODEL
from .tables import Claim, Table

# A number as the tables write them, or nothing.
_NUMBER = re.compile(r"([+−]?\d[\d.]*( ± \d[\d.]*)?×?)?")
MARKS = {
    **dict.fromkeys(("yes", "yes: better"), "✓"),
    "not told apart": "≈",
    **dict.fromkeys(("no: worse", "no: the other way round"), "✗"),
    "no interval": "",
}
QUICK_NOTICE = (
    "> **QUICK**: far too few steps, and two seeds unless more were asked for. This shows that everything runs. No "
    "number below says anything about a method, so nothing is concluded."
)
LEGEND = (
    "For each claim the paired difference over the seeds with its 95 % interval, of errors in percent (language model: "
    "bits a byte; T5's ratios: ratios): ✓ the whole interval is on the side that is claimed, for *as good as* on the "
    "better side; ≈ 0 is in it, so that the two cannot be told apart here, which proves no equality; ✗ all "
    "of it is on the other side. There are many: one in twenty intervals misses the truth by chance."
)
PAPER_NOTICE = (
    "The paper's own numbers stand beside ours: they are **of ImageNet**, another data set, with networks more than "
    "a hundred times larger, top-1 / top-5 in percent. Compare the order, not the values."
)


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; columns of numbers to the right."""
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"tables: expected {len(headers)} cells, got {list(row)}")
    numbers = [bool(rows) and all(_NUMBER.fullmatch(row[i]) for row in rows) for i in range(len(headers))]
    lines = [headers, ["---:" if number else "---" for number in numbers], *rows]
    # A bar would end the cell.
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _without_blank_columns(made: Table) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The paper's columns, where a run has none of the networks that they stand beside."""
    used = [i for i in range(len(made.headers)) if any(row[i] for row in made.rows)]
    return tuple(made.headers[i] for i in used), [tuple(row[i] for i in used) for row in made.rows]


def claims(made: Sequence[Claim]) -> str:
    """What the intervals say of each claim: a row each, a column for each network."""
    networks = [network for network in tables.TITLES if any(claim.network == network for claim in made)]
    rows = {claim.text: dict.fromkeys(networks, "") for claim in made}
    for claim in made:
        difference = claim.difference.text(tables.digits_of(claim.network), signed=True)
        rows[claim.text][claim.network] = f"{difference} {MARKS[claim.seen()]}".rstrip()
    titles = [tables.TITLES[network] for network in networks]
    return markdown(("claim", *titles), [(text, *cells.values()) for text, cells in rows.items()])


def text(results: dict) -> str:
    """The page."""
    seeds, quick, made = results["seeds"], results["quick"], tables.made(results["jobs"])
    parts = ["# The paper's tables in small"]
    parts += [QUICK_NOTICE] if quick else []
    parts += [_provenance(results), PAPER_NOTICE, budgets(results["recipes"], len(seeds))]
    for table in made:
        parts += [f"## {table.title}", table.note, markdown(*_without_blank_columns(table))]
    if not quick:
        parts += [
            "## What can be seen at this scale",
            LEGEND,
            claims([claim for table in made for claim in table.claims]),
        ]
    return "\n\n".join(parts) + "\n"


def budgets(recipes: dict, seeds: int) -> str:
    """What each method gets."""
    spread = (
        f"Each number is the mean over {seeds} seeds ± half of its 95 % interval (Student's t); differences are taken "
        "within a seed. A seed gives the first weights, the order of the images and the random partition. The split of "
        "the data is the same for all, so the intervals know nothing of other splits."
    )
    digits = recipes["digits"]
    further, portions = digits["further"], len(DNS_PORTIONS)
    parts = [
        spread if seeds > 1 else "One seed, so there are no intervals.",
        f"Digits: 1197 images to train with, 600 to test with; error in percent. float32 is trained for "
        f"{digits['steps']} steps of {digits['batch']} images. **Every method begins with the float32 network of its "
        f"seed and takes {further} further steps** on the same batches: float32 trained as long, TWN and BWN in one "
        f"phase, INQ in as many phases as it has portions, {further} steps in all. A phase is a cosine from "
        f"{digits['further_lr']} to 0; for TWN, BWN, ternary INQ by `mse` and in T5 from {digits['coarse_lr']}. SGD "
        f"with momentum {digits['momentum']}, weight decay {digits['weight_decay']}, "
        f"label smoothing {digits['label_smoothing']}. In T5 all methods take {further} steps to prune, then {further} "
        f"to quantize: DNS, then INQ in {portions} portions; Deep Compression's pruning, then its centroids, whose "
        f"learning rate is {digits['centroid_lr']}, without weight decay.",
    ]
    if language := recipes.get(LANGUAGE_MODEL):
        parts.append(
            f"Language model (examples/language_model.py): bits per byte of files that it was not trained on. "
            f"{language['layers']} layers of width {language['width']}, whose Linear weights are quantized and whose "
            f"embeddings stay float in every method; {language['steps']} steps in float32, then "
            f"{language['further']} for every method, in phases as above, with AdamW, from {language['further_lr']} "
            f"(float32 trained as long) or {language['coarse_lr']} (ternary) to a tenth of it."
        )
    return "\n\n".join(parts)


def _provenance(results: dict) -> str:
    machine, software = results["machine"], results["software"]
    versions = ", ".join(f"{name} {value}" for name, value in software.items() if name not in ("commit", "inq_kernels"))
    again = f" ({results['taken_over']} of them taken over from earlier runs)" if results["taken_over"] else ""
    return (
        f"`{results['command']}` at commit {software['commit']}: {results['wall_s']:.0f} s, and "
        f"{results['cpu_s']:.0f} s of processors in all {len(results['jobs'])} trainings{again}; processes of one "
        f"thread: {results['processes']}, on {machine['cores']} cores of an {machine['cpu']} "
        f"({machine['capability']}); {versions}."
    )
