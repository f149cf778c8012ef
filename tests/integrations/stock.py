"""Exports in an environment that has transformers and compressed-tensors and not this package.

    python tests/integrations/stock.py [--env build/envs/stock] [--keep DIR]

makes the environment (once), makes tiny Llamas in it, quantizes and exports them here, and loads the exports there by
AutoModelForCausalLM: every weight must have just the bits of the packed model's, and the logits those of the float one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# torch is linked from the environment that runs this: it is large, and every index has another build of it.
PINS = [
    ["-c", str(ROOT / "constraints.txt"), "torch==2.13.0", "numpy"],
    ["-c", str(ROOT / "constraints.txt"), "transformers==5.23.0", "loguru", "psutil", "pydantic"],
    ["--no-deps", "compressed-tensors==0.20.0"],
]
# dtype, tied, arguments of `inq quantize`, and the forms to export to.
CASES = [
    ("bfloat16", False, ["--bits", "4"], ["mxfp4", "fp8"]),
    ("bfloat16", True, ["--bits", "3", "--levels", "dense", "--granularity", "channel"], ["mxfp4"]),
    ("bfloat16", True, ["--bits", "5", "--granularity", "channel"], ["fp8"]),
    ("float16", False, ["--bits", "4"], ["mxfp4", "fp8"]),
    ("float32", False, ["--bits", "4", "--granularity", "channel"], ["mxfp4", "fp8"]),
    ("bfloat16", False, ["--bits", "5", "--levels", "dense"], ["fp8"]),
]


def environment(folder: Path) -> Path:
    """The Python of an environment with the pins, made if it is not there or not whole."""
    python, ready = folder / "bin" / "python", folder / ".ready"
    pins = "\n".join(" ".join(arguments) for arguments in PINS)
    if not ready.exists() or ready.read_text() != pins:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        link_torch(folder)
        for arguments in PINS:
            subprocess.run(
                [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments], check=True
            )
        ready.write_text(pins)
    return python


def link_torch(folder: Path) -> None:
    """Links to torch's packages and metadata, so that pip finds it installed; its dependencies come from the index."""
    (there,) = folder.glob("lib/python*/site-packages")
    here = distribution("torch").locate_file("")
    tops = {Path(file).parts[0] for file in distribution("torch").files}
    for name in sorted(tops - {"..", "bin", "__pycache__"}):
        (there / name).symlink_to(Path(here, name).resolve())


def inq(*arguments: object) -> None:
    from inq_kernels.cli import main as command

    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = command([str(argument) for argument in arguments])
    if status:
        raise SystemExit(f"inq {' '.join(map(str, arguments))}: status {status}: {out.getvalue()}")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def check_same(one: Path, other: Path) -> None:
    """That two models of floats have the same names, and under each the same bytes."""
    a, b = tensors(one), tensors(other)
    if a.keys() != b.keys():
        raise SystemExit(f"{one}: expected the names of {other}, got others: {sorted(a.keys() ^ b.keys())}")
    for name in a:
        if a[name].dtype != b[name].dtype or not torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)):
            raise SystemExit(f"{one}: {name}: expected the values of {other}, got others")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", type=Path, default=ROOT / "build" / "envs" / "stock")
    parser.add_argument("--keep", type=Path, help="write the models here instead of a temporary directory")
    args = parser.parse_args()
    python = environment(args.env)
    # Isolated: neither this folder nor PYTHONPATH brings the package in.
    there = [python, "-I", HERE / "stock_load.py"]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as temporary:
        work = args.keep or Path(temporary)
        folders = [work / f"{number}-{case[0]}" for number, case in enumerate(CASES)]
        for folder in folders:
            folder.mkdir(parents=True)
        models = [
            f"{folder / 'float'}:{dtype}:{int(tied)}" for folder, (dtype, tied, *_) in zip(folders, CASES, strict=True)
        ]
        subprocess.run([*there, "make", *models], check=True, env=variables)
        pairs = []
        for folder, (_, _, quantize, forms) in zip(folders, CASES, strict=True):
            inq("quantize", folder / "float", folder / "packed", *quantize)
            inq("export", "--to", "dense", folder / "packed", folder / "dense")
            for form in forms:
                inq("export", "--to", form, folder / "packed", folder / form)
                pairs += [folder / form, folder / "dense"]
                inq("import", folder / form, folder / f"{form}-back")
                inq("export", "--to", "dense", folder / f"{form}-back", folder / f"{form}-dense")
                check_same(folder / f"{form}-dense", folder / "dense")
        subprocess.run([*there, "load", *pairs], check=True, env=variables)
    print(f"stock environment: {len(pairs) // 2} exports loaded, bit for bit, and imported again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
