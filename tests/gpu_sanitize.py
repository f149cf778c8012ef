"""``make gpu-sanitize``: compute-sanitizer over the tests of the CUDA library. Needs a GPU.

memcheck, initcheck and synccheck must report nothing. Of racecheck's hazards those are allowed whose line holds a
pattern of racecheck-allowed.txt (beside this file; ``#`` begins a reason). Exit status 1 if anything else is found, or
if a tool or a test fails.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ALLOWED = HERE / "racecheck-allowed.txt"
TOOLS = ("memcheck", "initcheck", "synccheck", "racecheck")
# Every kernel of the library a few times: under these tools a test takes a hundred times as long. Products of each kind
# and size, layouts, partitions, freezing and steps; nothing that repeats a hundred times, and no CUDA graphs, which
# memory that is not cached does not allow.
SELECTED = (
    "integers_are_exact",
    "as_good_as_dense",
    "gradients",
    "fp8",
    "storage_is_that",
    "storage_does_not_wait",
    "partition_is_that",
    "a_portion_never_waits",
    "frozen_weights_keep",
    "steps_move_what_is_free",
)
# Torch's own kernels may read what nobody wrote: ours alone are watched, by this part of their mangled names.
KERNELS = "3inq4cuda"
# Each tensor gets memory of its own: within a cached block an overrun reaches other tensors, and what a freed one left
# counts as written.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "INQ_GPU_BACKEND": "cuda"}


def patterns(text: str) -> list[str]:
    """The allowed patterns, without their reasons."""
    return [line.partition("#")[0].strip() for line in text.splitlines() if line.partition("#")[0].strip()]


def findings(output: str, allowed: list[str]) -> list[str]:
    """The lines of compute-sanitizer that report something, but for those that are allowed."""
    found = []
    for line in output.splitlines():
        text = line.removeprefix("=========").strip()
        if not line.startswith("=========") or not re.match(
            r"(Error:|Warning:|Internal Sanitizer Error|Invalid|Uninitialized|Barrier|Malloc|Program hit|Leaked)", text
        ):
            continue
        if not any(pattern in text for pattern in allowed):
            found.append(text)
    return found


def command(tool: str, name: str) -> list[str]:
    """One tool over the selected tests."""
    watched = [tool, "--tool", name, "--kernel-name", f"kns={KERNELS}", "--target-processes", "all"]
    tests = ["-p", "no:cacheprovider", "-q", "-x", "-k", " or ".join(SELECTED), str(HERE / "test_gpu.py")]
    return [*watched, sys.executable, "-m", "pytest", *tests]


def main() -> int:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("make gpu-sanitize: expected compute-sanitizer (CUDA's toolkit), found none", file=sys.stderr)
        return 1
    allowed, failed = patterns(ALLOWED.read_text()), False
    for name in TOOLS:
        done = subprocess.run(
            command(tool, name), env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False
        )
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
