"""The language model's page: ``python tests/language_model_page.py [results.json]`` copies the results of a real
``make language-model`` to docs/language_model/ and writes the table into the page there, or says which bar they miss.
test_language_model.py checks that it was written."""

import importlib.util
import json
import re
import sys
from pathlib import Path

from bars import report

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "language_model" / "README.md"
RESULTS = PAGE.with_name("results.json")
BLOCK = re.compile(r"(?<=<!-- table: from results.json -->\n).*?(?=<!-- end of table -->)", re.DOTALL)
# Percent more bits a byte than the float32 network that INQ started from.
BARS = {5: 0.3, 4: 0.6, 3: 2.0, 2: 12.0}
# Of what plain rounding at 4 bits loses, inq.calibrate may lose so much.
CALIBRATED = 0.75
MINUTES = 2 * 45


def load_example(name: str):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def checks(results: dict) -> list[tuple[str, bool]]:
    """What the issue asks of the results, and whether they have it."""
    rows = {row["row"]: row["bits_per_byte"] for row in results["rows"]}

    def loss(name: str) -> float:
        return 100 * (rows[name] / rows["float32"] - 1)

    found = [(f"INQ, {bits} bits: {loss(f'inq-{bits}'):+.2f} %, at most {bar:+} %", loss(f"inq-{bits}") <= bar)
             for bits, bar in BARS.items()]  # fmt: skip
    plain = loss("plain-4")
    for name in ("calibrated-4", "calibrated-scales-4"):
        text = f"{name}: {loss(name):+.2f} %, at most {CALIBRATED} of plain rounding's {plain:+.2f} %"
        found.append((text, loss(name) <= CALIBRATED * plain))
    minutes = results["cpu_s"] / 60
    found.append((f"{minutes:.0f} processor-minutes, at most {MINUTES}", minutes <= MINUTES))
    found.append(("a whole run, of a commit", not results["quick"] and "dirty" not in results["software"]["commit"]))
    return found


def text(results: dict) -> str:
    """What stands between the page's marks."""
    machine, software, data = results["machine"], results["software"], results["data"]
    valid = data["validation"]
    return (
        f"{load_example('language_model').table(results)}\n\n"
        f"`{results['command']}` at commit {software['commit']}: {results['cpu_s'] / 60:.0f} processor-minutes, "
        f"{results['wall_s'] / 60:.0f} minutes, {machine['processes']} processes of one thread on {machine['cores']} "
        f"cores of an {machine['cpu']} ({machine['capability']}), torch {software['torch']}. Trained on "
        f"{data['train']['bytes'] / 1e6:.1f} MB in {data['train']['files']} files of Python {data['python']}, measured "
        f"on {valid['bytes'] / 1e6:.1f} MB in {valid['files']} other files: "
        f"{results['recipe']['validation_windows']} windows of {results['recipe']['context']} bytes.\n"
    )


def main(source: Path) -> int:
    results = json.loads(source.read_text())
    missed = report(checks(results))
    if source != RESULTS:
        RESULTS.write_text(source.read_text())
    PAGE.write_text(BLOCK.sub(lambda _: text(results), PAGE.read_text()))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS))
