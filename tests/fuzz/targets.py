"""What is fuzzed: every reader of files, the errors that it may raise, and what must hold after it has said yes or no.

Anything that is not listed as expected is a crash, and so is a warning, a message that does not say which file or which
of our functions it is about, a model that a refused file has changed, and a conversion that changes values. A reader
joins with an entry in ``TARGETS``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import inq_kernels as inq
from fuzz import checks, seeds, structure
from fuzz.checks import Violation
from inq_kernels.checkpoint import inspect, verify
from inq_kernels.integrations import compressed_tensors, exports, imports
from inq_kernels.transcode import export_dense, quantize


@dataclass(frozen=True)
class Target:
    """A reader of files.

    ``call`` gets the path and returns after its own checks of what came. ``kind`` says which seeds are its, and so
    whether the path is a directory. ``expected`` are the exact types of errors that it may raise: a subclass, say
    UnicodeDecodeError where ValueError is expected, is not among them.
    """

    name: str
    call: Callable[[Path], object]
    kind: str = "file"
    expected: tuple[type[Exception], ...] = (inq.CheckpointError,)


# --- the readers ------------------------------------------------------------------------------------------------------


def _load(path: Path) -> None:
    checks.check_entries(inq.load(path))


def _describe(path: Path) -> None:
    summary = inspect(path)
    if verify(path) != summary.tensors:
        raise Violation("inspect and verify count different tensors")


def _model_tensors(model: torch.nn.Module) -> list[Tensor]:
    modules = (model.fc, model.conv, model.norm, model.again)
    return [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]


def _run_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer, run: inq.INQ) -> list[Tensor]:
    momenta = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return [*model[0]._parameters.values(), *momenta]


def _run_others(model: torch.nn.Module, optimizer: torch.optim.Optimizer, run: inq.INQ) -> object:
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return groups, run.portion, run.lr_schedulers[0].state_dict()


_into = checks.Objects(lambda: (seeds.model(),), _model_tensors, lambda model: [*map(type, model.children())])
_resumed = checks.Objects(seeds.training, _run_tensors, _run_others)


def _load_into(path: Path) -> None:
    _into.load(lambda model: inq.load(path, model))


def _load_training(path: Path) -> None:
    _resumed.load(lambda *objects: inq.load_training(path, *objects))


def _load_sharded(path: Path) -> None:
    def check(model: torch.nn.Module, optimizer: torch.optim.Optimizer, run: inq.INQ) -> None:
        checks.check_sharded(path, model, run)

    _resumed.load(lambda *objects: inq.load_sharded(path, *objects), check)


def _quantize(path: Path) -> None:
    checks.written(
        path,
        "out.safetensors",
        lambda target: quantize(path, target, inq.Format(4)),
        lambda report, target: checks.loaded(target),
    )


def _import(path: Path) -> None:
    name = "out" if path.is_dir() else "out.safetensors"
    checks.written(path, name, partial(imports.import_packed, path), partial(checks.check_import, path))


def _export(function: Callable[[Path, Path], object], kind: str, path: Path) -> None:
    checks.written(path, "out", partial(function, path), partial(checks.check_export, path, kind))


# An input begins with its target's number: add at the end.
TARGETS = (
    Target("load", _load),
    Target("load into a model", _load_into, "model"),
    Target("inspect and verify", _describe),
    Target("load a directory", _load, "directory"),
    # ValueError: a checkpoint of another run.
    Target("load_training", _load_training, "training", (inq.CheckpointError, ValueError)),
    # ValueError: nothing to pack, NaN or Inf.
    Target("quantize", _quantize, "float", (inq.CheckpointError, ValueError)),
    Target("load_sharded", _load_sharded, "sharded", (inq.CheckpointError, ValueError)),
    # ValueError: no powers of two, NaN or Inf.
    Target("import a file", _import, "powers", (inq.CheckpointError, ValueError)),
    Target("import a directory", _import, "quantized", (inq.CheckpointError, ValueError)),
    # ValueError: a weight that the other format does not hold.
    Target(
        "export to MXFP4",
        partial(_export, exports.export_mxfp4, compressed_tensors.MXFP4),
        "packed",
        (inq.CheckpointError, ValueError),
    ),
    Target(
        "export to FP8",
        partial(_export, exports.export_fp8, compressed_tensors.FP8),
        "packed",
        (inq.CheckpointError, ValueError),
    ),
    Target("export to floats", partial(_export, export_dense, "float"), "packed", (inq.CheckpointError, ValueError)),
)
DIRECTORIES = {number for number, target in enumerate(TARGETS) if target.kind in seeds.DIRECTORIES}


# --- one execution ----------------------------------------------------------------------------------------------------


class Place:
    """Where inputs become files: in memory, where the system has a file system there."""

    def __init__(self) -> None:
        memory = Path("/dev/shm")
        usable = memory.is_dir() and os.access(memory, os.W_OK)
        self.root = Path(tempfile.mkdtemp(prefix="inq-fuzz-", dir=memory if usable else None))
        self._file = str(self.root / "x.safetensors")
        self._directory = self.root / "model"
        self._directory.mkdir()

    def close(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)

    def file(self, content: bytes) -> Path:
        _write(self._file, content)
        return Path(self._file)

    def directory(self, content: bytes) -> Path:
        files = structure.read_files(content)
        for name in os.listdir(self._directory):
            if name not in files:
                os.unlink(self._directory / name)
        for name, data in files.items():
            _write(str(self._directory / name), data)
        return self._directory


def _write(path: str, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(descriptor, content)
    finally:
        os.close(descriptor)


def execute(data: bytes, place: Place) -> tuple[int, Exception | None]:
    """Run one input; the target's number and the expected error, or None where it was accepted. Raises any other."""
    number = data[0] % len(TARGETS) if data else 0
    target = TARGETS[number]
    path = place.directory(data[1:]) if number in DIRECTORIES else place.file(data[1:])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            target.call(path)
    except Exception as error:
        if type(error) not in target.expected:
            raise
        if not str(error).startswith((str(place.root), "inq.")):
            raise Violation(f"a message that does not say where: {error}") from error
        return number, error
    return number, None


def inputs(folder: Path) -> list[bytes]:
    """The seeds as inputs, of all targets."""
    made = seeds.seeds(folder)
    return [bytes([number]) + content for number, target in enumerate(TARGETS) for content in made[target.kind]]
