"""The accuracies that the demo must reach: ``python tests/demo_bars.py demo/results.json`` after ``make demo``.

Means over the seeds, in points of test accuracy. Exit 1 if one is missed. Not collected by pytest: the demo takes
minutes.
"""

import json
import sys
from pathlib import Path

from bars import report

# row → the most that it may lose against float32.
MAY_LOSE = {"mse-5": 0.3, "mse-4": 0.3, "mse-3": 0.3, "mse-2": 0.6, "max-5": 0.3, "max-4": 0.3}
MIN_SEEDS = 5


def main(path: Path) -> int:
    results = json.loads(path.read_text())
    mean = {row["key"]: row["mean"] for row in results["rows"]}
    checks = [(f"{key} loses {mean['float32'] - mean[key]:+.2f}, at most {most}", mean["float32"] - mean[key] <= most)
              for key, most in MAY_LOSE.items()]  # fmt: skip
    better = mean["mse-5"] - mean["mse-5-random"]
    checks.append((f"magnitude − random at 5 bits: {better:+.2f}, at least 0", better >= 0))
    checks.append((f"{len(results['seeds'])} seeds, at least {MIN_SEEDS}", len(results["seeds"]) >= MIN_SEEDS))
    checks.append((f"networks wrong in a new process: {results['check']['wrong']}", results["check"]["wrong"] == 0))
    failed = report(checks)
    print(f"{len(checks) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
