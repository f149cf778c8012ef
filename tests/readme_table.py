"""The demo's table in the README: ``python tests/readme_table.py`` writes it from docs/demo/results.json, where the
results of a real ``make demo`` were copied to. test_readme.py checks that it was written."""

import json
import re
from pathlib import Path

from inq_kernels.demo.report import HEADERS, table_cells
from inq_kernels.table import render

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "demo" / "results.json"
BLOCK = re.compile(r"(?<=<!-- demo: from docs/demo/results.json -->\n).*?(?=<!-- end of demo -->)", re.DOTALL)


def text(results: dict) -> str:
    machine, software = results["machine"], results["software"]
    return (
        f"```text\n{render(HEADERS, table_cells(results))}\n```\n\n"
        f"Mean ± standard deviation over {len(results['seeds'])} seeds, {results['images']['test']} test images; "
        f"`make demo` at commit {software['commit']} on {machine['cores']} cores of an {machine['cpu']} "
        f"({machine['capability']}), torch {software['torch']}: {results['timing']['wall_s']:.0f} s.\n"
    )


def main() -> None:
    readme = ROOT / "README.md"
    block = text(json.loads(RESULTS.read_text()))
    readme.write_text(BLOCK.sub(lambda _: block, readme.read_text()))


if __name__ == "__main__":
    main()
