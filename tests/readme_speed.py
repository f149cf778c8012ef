"""The speed tables in the README: ``python tests/readme_speed.py`` writes each block again from the committed results
that it names; after a new run, change the name first. test_readme.py checks that they were written."""

import json
import re
from pathlib import Path

from inq_kernels.bench.shapes import MAIN

from inq_kernels.table import render

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(?<=<!-- bench: from )(\S+)( -->\n).*?(?=<!-- end of bench -->)", re.DOTALL)
_SHAPE = f"{MAIN[0]}x{MAIN[1]}"
_PICTURE = "time-native.png"


def _cell(row: dict, name: str) -> str:
    b = next((b for b in row["baselines"] if b["name"] == name and "ratio" in b), None)
    return "" if b is None else f"{b['ratio']:.2f} [{b['low']:.2f}, {b['high']:.2f}]"


def _us(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _products(section: dict, dtype: str) -> str:
    rows = []
    for row in section["rows"]:
        p = row["params"]
        if row["op"] == "linear" and p["shape"] == _SHAPE and p["dtype"] == dtype and "time" in row:
            cells = [_cell(row, name) for name in (f"dense {dtype}", "int4 g128", "dynamic int8")]
            rows.append((p["bits"], p["m"], _us(row["time"]["median_us"]), *cells))
    return render(("bits", "M", "µs", f"dense {dtype}", "torch int4", "torch dynamic int8"), sorted(rows))


_OTHERS = (
    ("partition", "torch topk", ("shape", "exponent")),
    ("masked_adamw", "torch fused, no mask", ("shape", "call")),
    ("masked_sgd", "torch fused, no mask", ("shape", "call")),
    ("pack", "copy", ("bits", "dtype")),
    ("unpack", "copy", ("bits", "dtype", "out")),
)


def _others(section: dict) -> str:
    rows = []
    for op, baseline, names in _OTHERS:
        for row in section["rows"]:
            if row["op"] == op and "time" in row:
                case = ", ".join(str(row["params"][n]) for n in names if n in row["params"])
                known = next((b for b in row["baselines"] if b["name"].startswith(baseline)), {"name": baseline})
                rows.append((op, case, _us(row["time"]["median_us"]), known["name"], _cell(row, known["name"])))
    return render(("operator", "case", "µs", "beside", "times faster"), rows)


def text(path: str, results: dict) -> str:
    """Everything between the two marks, for results at ``path`` from the root."""
    native = results["sections"][0]
    machine, software = native["machine"], results["software"]
    parts = [
        f"`inq_kernels.linear`, weight {MAIN[1]} × {MAIN[0]}, x bfloat16: times faster than torch [95 % interval]",
        f"\n```text\n{_products(native, 'bfloat16')}\n```\n",
    ]
    for section in results["sections"]:
        if section["isa"] == "avx2" and section.get("rows"):
            parts += [
                "The same with both sides held down to AVX2, x float32",
                f"\n```text\n{_products(section, 'float32')}\n```\n",
            ]
    parts += ["Training and storage", f"\n```text\n{_others(native)}\n```\n"]
    arguments = results["arguments"]
    command = f'make bench BENCH="--seconds-per-case {arguments["seconds_per_case"]}"'
    if arguments["op"]:
        ops, isas = "".join(f" --op {op}" for op in arguments["op"]), ",".join(s["isa"] for s in results["sections"])
        command = f"inq bench{ops} --isa {isas} --seconds-per-case {arguments['seconds_per_case']}"
    picture = Path(path).parent / _PICTURE
    if (ROOT / picture).exists():
        parts.append(f"![time against M]({picture.as_posix()})\n")
    parts.append(
        f"`{command}` at commit {software['commit']} on {machine['cores']} cores of an {machine['cpu']} "
        f"(family {machine['family'][0]}, {machine['isa']}), torch {software['torch']}; all of it, with pictures, is "
        f"in {Path(path).parent.as_posix()}.\n"
    )
    return "\n".join(parts)


def written(readme: str) -> str:
    """``readme`` with every block as its results say."""

    def block(match: re.Match) -> str:
        return f"{match[1]}{match[2]}{text(match[1], json.loads((ROOT / match[1]).read_text()))}"

    return BLOCK.sub(block, readme)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(written(path.read_text()))
