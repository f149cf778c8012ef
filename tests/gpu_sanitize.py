"""``make gpu-sanitize``: compute-sanitizer over the tests of the CUDA library. Needs a GPU.

memcheck, initcheck and synccheck must report nothing. Of racecheck's hazards those are allowed whose line holds a
pattern of racecheck-allowed.txt (beside this file; ``#`` begins a reason). Exit status 1 if anything else is found, or
if a tool or a test fails.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ALLOWED = HERE / "racecheck-allowed.txt"
TOOLS = ("memcheck", "initcheck", "synccheck", "racecheck")
# The library's own kernels, each kind a few times: under these tools a test takes a hundred times as long.
SELECTED = "integers_are_exact or 100_partitions or masked or portion or two_streams"
# A torch process touches memory that torch itself leaves unwritten: only our kernels are watched.
KERNELS = "regex:inq"


def patterns(text: str) -> list[str]:
    """The allowed patterns, without their reasons."""
    return [line.partition("#")[0].strip() for line in text.splitlines() if line.partition("#")[0].strip()]


def findings(output: str, allowed: list[str]) -> list[str]:
    """The lines of compute-sanitizer that report something, but for those that are allowed."""
    found = []
    for line in output.splitlines():
        text = line.removeprefix("=========").strip()
        if not line.startswith("=========") or not re.match(
            r"(Error:|Warning:|Invalid|Uninitialized|Barrier|Program hit|Leaked)", text
        ):
            continue
        if not any(pattern in text for pattern in allowed):
            found.append(text)
    return found


def main() -> int:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("make gpu-sanitize: expected compute-sanitizer (CUDA's toolkit), found none", file=sys.stderr)
        return 1
    allowed, failed = patterns(ALLOWED.read_text()), False
    for name in TOOLS:
        command = [tool, "--tool", name, "--kernel-name", KERNELS, "--target-processes", "all", sys.executable]
        command += ["-m", "pytest", "-p", "no:cacheprovider", "-q", "-x", "-k", SELECTED, str(HERE / "test_gpu.py")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        output = done.stdout + done.stderr
        found = findings(output, allowed if name == "racecheck" else [])
        print(f"{name}: {len(found)} findings, pytest's exit status {done.returncode}")
        print(*found[:50], sep="\n")
        if found or done.returncode:
            failed = True
            print(output[-3000:])
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
