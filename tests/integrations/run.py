"""Tests against the libraries themselves, each in an environment of its own: ``make test-integrations``.

    python tests/integrations/run.py [ENVIRONMENT …] [-- PYTEST ARGUMENTS …]

An environment is a venv in .integrations/ that sees the packages of the one that runs this (torch, this package) behind
its own. It is made once, and again when what belongs into it changes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "integrations"
PLACE = ROOT / ".integrations"


@dataclass(frozen=True)
class Environment:
    """``packages`` from the index; ``bare``: of these the Python alone, without dependencies and compiled parts.
    ``own_torch``: with another torch than this repository's, which ``packages`` names."""

    packages: tuple[str, ...]
    tests: tuple[str, ...]
    bare: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    own_torch: bool = False


ENVIRONMENTS = {
    "transformers-oldest": Environment(("transformers==5.0.0",), ("test_transformers.py",)),
    "transformers-newest": Environment(
        ("transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0", "compressed-tensors==0.20.0"),
        ("test_transformers.py", "test_tensor_parallel.py", "test_peft.py", "test_trainer.py", "../test_docs.py"),
        variables=(("INQ_DOCS_HAVE", "transformers peft compressed-tensors"),),
    ),
    "vllm": Environment(
        ("--no-deps", "-r", "tests/integrations/vllm-requirements.txt"),
        ("test_vllm.py",),
        ("vllm==0.33.0",),
        (("VLLM_TARGET_DEVICE", "cpu"), ("VLLM_LOGGING_LEVEL", "WARNING"), ("VLLM_NO_USAGE_STATS", "1")),
    ),
    # torchvision is compiled for one torch, and there is none on the index for a CPU build.
    "torchvision": Environment(
        ("torch==2.14.1", "torchvision==0.29.1"), ("test_torchvision.py",), own_torch=True
    ),
}  # fmt: skip
# Programs of their own: what loads an export there must not see this package.
SCRIPTS = {"stock": "stock.py", "pt2-cpp": "pt2_cpp.py"}


def run(*command: object, **kwargs) -> int:
    return subprocess.run(list(map(str, command)), check=False, **kwargs).returncode


def pip(python: Path, *arguments: object, own_torch: bool = False) -> None:
    # Errors alone: where there are several indexes, pip warns of each package that one of them lacks.
    quiet = ("-qq", "--disable-pip-version-check")
    if not own_torch:
        # torch is pinned: a looser requirement would fetch gigabytes of CUDA libraries.
        quiet += ("-c", ROOT / "constraints.txt")
    if run(python, "-m", "pip", arguments[0], *quiet, *arguments[1:], cwd=ROOT):
        raise SystemExit(f"pip {' '.join(map(str, arguments))}: failed")


def make(name: str, environment: Environment) -> Path:
    """The environment's Python; made if it is not there as it should be."""
    folder = PLACE / name
    python, stamp = folder / "bin" / "python", folder / ".made"
    parent = sysconfig.get_paths()["purelib"]
    lists = [ROOT / name for name in ("constraints.txt", *environment.packages) if name.endswith(".txt")]
    wanted = repr((environment, parent, [file.read_text() for file in lists]))
    wanted = hashlib.sha256(wanted.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"{name}: installing {' '.join((*environment.packages, *environment.bare))}", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    own = next(folder.glob("lib/python*/site-packages"))
    # addsitedir, not a plain path: an editable installation is a .pth file in there.
    (own / "parent.pth").write_text(f"import site; site.addsitedir({parent!r})\n")
    pip(python, "install", *environment.packages, own_torch=environment.own_torch)
    for package in environment.bare:
        wheels = folder / "wheels"
        pip(python, "download", "--no-deps", "--only-binary=:all:", "-d", wheels, package)
        for wheel in wheels.iterdir():
            with zipfile.ZipFile(wheel) as content:
                content.extractall(own, [member for member in content.namelist() if not member.endswith(".so")])
            wheel.unlink()
    stamp.write_text(wanted)
    return python


def main() -> int:
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    known = [*ENVIRONMENTS, *SCRIPTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="*", metavar="ENVIRONMENT", help=f"some of {', '.join(known)}")
    chosen = parser.parse_args(arguments[:split]).environments or known
    if unknown := set(chosen) - set(known):
        parser.error(f"expected some of {', '.join(known)}, got {', '.join(unknown)}")
    failed = []
    for name in chosen:
        if name in SCRIPTS:
            print(f"{name}:", flush=True)
            if run(sys.executable, HERE / SCRIPTS[name], cwd=ROOT):
                failed.append(name)
            continue
        environment = ENVIRONMENTS[name]
        python = make(name, environment)
        files = [HERE / test for test in environment.tests]
        print(f"{name}:", flush=True)
        # What other libraries warn of is no error of ours.
        command = (python, "-m", "pytest", "-p", "no:cacheprovider", "-W", "default", *files, *arguments[split + 1 :])
        offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        if run(*command, cwd=ROOT, env={**os.environ, **offline, **dict(environment.variables)}):
            failed.append(name)
    print("failed: " + ", ".join(failed) if failed else "all passed", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
