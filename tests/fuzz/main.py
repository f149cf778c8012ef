"""The process that atheris runs: ``python tests/fuzz/main.py COUNTS CORPUS … [libFuzzer's options]``. run.py starts it.

COUNTS is a file of 64-bit numbers, two for each target: inputs accepted, inputs refused.
"""

import mmap
import struct
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(ROOT / "tests")

import atheris  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
# Coverage of what reads files. Of the others it would cost time, and say nothing about files.
READERS = {
    "files", "compression", "file_format", "checkpoint", "training", "transcode", "inq", "sharded", "sharded_files",
    *(f"integrations.{name}" for name in ("imports", "exports", "compressed_tensors", "mxfp4", "fp8")),
}  # fmt: skip
modules = [path.relative_to(ROOT).with_suffix("").parts for path in (ROOT / "inq_kernels").rglob("*.py")]
others = [".".join(parts) for parts in modules if ".".join(parts[1:]) not in READERS]
with atheris.instrument_imports(include=["inq_kernels"], exclude=others):
    import inq_kernels.integrations.exports
    import inq_kernels.integrations.imports
    import inq_kernels.transcode  # noqa: F401
# A second that no input shall have to wait for.
import torch.distributed.checkpoint  # noqa: E402

from fuzz import structure, targets  # noqa: E402


def main() -> None:
    counts_path = Path(sys.argv.pop(1))
    with counts_path.open("r+b") as file:
        counts = mmap.mmap(file.fileno(), 16 * len(targets.TARGETS))
    place = targets.Place()
    count = struct.Struct("<Q")

    def one(data: bytes) -> None:
        number, error = targets.execute(data, place)
        at = 16 * number + (0 if error is None else 8)
        count.pack_into(counts, at, count.unpack_from(counts, at)[0] + 1)

    def mutate(data: bytes, limit: int, seed: int) -> bytes:
        return structure.mutate(data, limit, seed, atheris.Mutate, targets.DIRECTORIES)

    # run.py removes the place, since the fuzzer ends the process in its own way.
    (counts_path.parent / "place").write_text(str(place.root))
    atheris.Setup(sys.argv, one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
