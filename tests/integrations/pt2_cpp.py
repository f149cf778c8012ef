"""docs/export.md's .pt2, by its own command, and its C++ loader, compiled and run: python tests/integrations/pt2_cpp.py

The loader's sums must be those of the model in Python. Needs g++ and takes two minutes, most in torch's headers.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from inq_kernels.integrations import pt2

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import snippets  # noqa: E402

SHAPE = (64,)


def main() -> int:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        scope = {"__name__": "__main__"}
        snippets.run(snippets.ROOT / "docs" / "export.md", work, ["aotinductor"], scope)
        model = scope["model"]
        subprocess.run(
            [
                os.environ.get("CXX", "g++"), "-std=c++20", "-O1", HERE / "pt2_loader.cpp", "-o", work / "pt2_loader",
                f"-I{folder / 'include'}", f"-I{folder / 'include' / 'torch' / 'csrc' / 'api' / 'include'}",
                f"-L{folder / 'lib'}", f"-Wl,-rpath,{folder / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu",
                "-lc10", "-ldl",
            ],
            check=True,
        )  # fmt: skip
        result = subprocess.run(
            [work / "pt2_loader", pt2.library_path(), work / "net.pt2", *map(str, SHAPE)],
            check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    sums = {int(batch): float(total) for batch, total in re.findall(r"^(\d+): (.+)$", result.stdout, re.MULTILINE)}
    for batch in (1, 2, 7):
        with torch.no_grad():
            expected = float(model(torch.ones(batch, *SHAPE)).sum())
        if abs(sums[batch] - expected) > 1e-5 * abs(expected):
            sys.exit(f"batch {batch}: expected {expected}, got {sums[batch]}")
    print(f"C++ loader: {len(sums)} batches, the sums of Python")
    return 0


if __name__ == "__main__":
    sys.exit(main())
