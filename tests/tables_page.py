"""The paper's tables: ``python tests/tables_page.py [results.json]`` copies the results of a real ``make tables`` to
docs/tables/, writes the page there and the claims into README.md, and says which bar they miss. test_tables.py checks
that it was written."""

import json
import re
import sys
from pathlib import Path

from bars import report

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # examples is a folder of the repository, not of the package

from examples.tables import jobs, page, tables  # noqa: E402

PAGE = ROOT / "docs" / "tables" / "README.md"
RESULTS = PAGE.with_name("results.json")
README = ROOT / "README.md"
BLOCK = re.compile(r"(?<=<!-- claims: from docs/tables/results.json -->\n).*?(?=<!-- end of claims -->)", re.DOTALL)
HOUR = 3600
# Of T4, what the bar is for: TWN and BWN as they are published, and INQ of as many layers.
LIKE_PUBLISHED = f"T4: {tables.T4_ROWS['inq-2-mse-channel-ends'].title} is "
# Of T5, as published: at 8 and 5 bits it loses nothing, at 4 and 2 more than INQ does.
THEIRS = "Deep Compression, 8/5"
# What the committed run misses, as README says.
MISSED = (
    "T2: largest first is as good as random, 2 bits, language model",
    "T5: DNS + INQ, 3 bits: as good as Deep Compression, 8/5, digits CNN, VGG-like",
)


def claims(results: dict) -> list[tables.Claim]:
    """Those of all tables."""
    return [claim for table in tables.made(results["jobs"]) for claim in table.claims]


def readme(results: dict) -> str:
    """What stands between README's marks."""
    chosen = [claim for claim in claims(results) if not claim.text.startswith("Extension")]
    return f"{page.claims(chosen)}\n"


def complete(results: dict) -> bool:
    """Whether it has every method of every network and seed: a claim without results would be missing, not missed."""
    expected = jobs.jobs({net: tables.methods_of(net) for net in tables.TITLES}, results["seeds"])
    found = {jobs.Job(job["network"], job["method"], job["seed"]) for job in results["jobs"]}
    return found == set(expected) and not results["quick"]


def checks(results: dict) -> list[tuple[str, bool]]:
    """What the issue asks of the results, and whether they have it."""
    software, seeds = results["software"], results["seeds"]
    found = [
        (f"{results['wall_s'] / 60:.0f} minutes, at most 60", results["wall_s"] <= HOUR and not results["taken_over"]),
        (f"{len(seeds)} seeds, at least 5, of a commit", len(seeds) >= 5 and "dirty" not in software["commit"]),
        ("all networks, methods and seeds, not QUICK", complete(results)),
    ]
    for claim in claims(results):
        seen = claim.seen()
        better = claim.text.startswith(LIKE_PUBLISHED) and claim.network == jobs.LANGUAGE_MODEL
        if better or ("ratio" in claim.text and claim.text.endswith(THEIRS)):
            good = seen == "yes"
        elif claim.text.startswith((LIKE_PUBLISHED, "T2")) or claim.text.endswith(THEIRS):
            good = not seen.startswith("no:")
        else:
            continue
        digits = tables.digits_of(claim.network)
        difference = claim.difference.text(digits, signed=True)
        found.append((f"{claim.text}, {tables.TITLES[claim.network]}: {difference}, {seen}", good))
    return found


def main(source: Path) -> int:
    results = json.loads(source.read_text())
    missed = report(checks(results))
    if source != RESULTS:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(source.read_text())
    PAGE.write_text(page.text(results))
    README.write_text(BLOCK.sub(lambda _: readme(results), README.read_text()))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS))
