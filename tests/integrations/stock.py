"""Exports in an environment that has transformers and compressed-tensors and not this package.

    python tests/integrations/stock.py [--env build/envs/stock] [--keep DIR]

makes the environment (once), makes tiny Llamas in it, quantizes and exports them here, and loads the exports there by
AutoModelForCausalLM: every weight must have just the bits of the packed model's, and the logits those of the float one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path

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


def inq(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "inq_kernels.cli", *arguments], check=True, cwd=ROOT)


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
        for number, (dtype, tied, quantize, forms) in enumerate(CASES):
            folder = work / f"{number}-{dtype}"
            folder.mkdir(parents=True)
            subprocess.run([*there, "make", folder / "float", dtype, str(int(tied))], check=True, env=variables)
            inq("quantize", folder / "float", folder / "packed", *quantize)
            inq("export", "--to", "dense", folder / "packed", folder / "dense")
            for form in forms:
                inq("export", "--to", form, folder / "packed", folder / form)
                subprocess.run([*there, "load", folder / form, folder / "dense"], check=True, env=variables)
                inq("import", folder / form, folder / f"{form}-back")
                inq("export", "--to", "dense", folder / f"{form}-back", folder / f"{form}-dense")
                subprocess.run([*there, "same", folder / f"{form}-dense", folder / "dense"], check=True, env=variables)
    print("stock environment: all exports loaded, bit for bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
