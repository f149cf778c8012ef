"""What ``make gpu`` needs, told before anything is built: ``python tests/gpu_ready.py`` says what is missing and ends
with status 1; with ``processes`` it prints pytest's arguments for several processes, where pytest-xdist is there.

A machine with a GPU may reach no registry. What is missing there travels as wheels: ``pip download`` them elsewhere,
``pip install --no-index --target FOLDER *.whl`` there, and name FOLDER in PYTHONPATH.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable

# By the names of distributions, and why. Only torch, numpy and safetensors are what the package itself needs.
NEEDED = {
    "torch": "2.11",
    "numpy": "",
    "safetensors": "",
    "triton": "3.6",
    "setuptools": "77",
    "ninja": "",
    "pytest": "",
    "hypothesis": "",
    "matplotlib": "",
}
# Most of the tests' time is compiling, a second or two for each kind of Triton kernel.
PROCESSES = 8


def version(name: str) -> str | None:
    """Of a distribution that is installed, else None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing(versions: Callable[[str], str | None] = version) -> list[str]:
    """What is not there, or too old, in words."""
    found = []
    for name, least in NEEDED.items():
        got = versions(name)
        if got is None:
            found.append(f"{name}{f' ≥ {least}' if least else ''}: not installed")
        elif least and _numbers(got) < _numbers(least):
            found.append(f"{name} ≥ {least}: got {got}")
    return found


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.partition("+")[0].split(".") if part.isdigit()]


def processes(versions: Callable[[str], str | None] = version) -> str:
    """pytest's arguments: one process, which gets through fewer tests in its time, where there is no pytest-xdist."""
    return f"-n {PROCESSES}" if versions("pytest-xdist") is not None else ""


def main(words: list[str]) -> int:
    if words == ["processes"]:
        print(processes())
        return 0
    found = missing()
    for each in found:
        print(f"make gpu: {each}", file=sys.stderr)
    if found:
        print("make gpu: pip install them, or see tests/gpu_ready.py for a machine without a registry", file=sys.stderr)
        return 1
    if not processes():
        print("make gpu: pytest-xdist is not installed: one process, more tests are left out", file=sys.stderr)
    import torch

    if not torch.cuda.is_available():
        print("make gpu: expected a CUDA device, and torch finds none", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
