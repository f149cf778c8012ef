"""What must hold after a reader has said yes or no to a file: a reader can be wrong without an exception.

What files mean is read here by the words of the formats, and by the safetensors library alone.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import torch
from torch import Tensor

import inq_kernels as inq
from fuzz import structure
from inq_kernels import training
from inq_kernels.file_format import model_files
from inq_kernels.files import DTYPES
from inq_kernels.integrations import compressed_tensors
from inq_kernels.integrations.exports import ExportReport
from inq_kernels.integrations.imports import ImportReport

Result = TypeVar("Result")


class Violation(AssertionError):
    """A reader said yes to something, or changed something, that it must not."""


def check_entries(entries: Mapping) -> None:
    """What was let in is what the format promises."""
    for name, value in entries.items():
        if isinstance(value, inq.PackedWeight):
            plain = inq.PackedWeight(value.weight, value.weight_exp, None, value.format, value.shape)
            # Every value has one code, so that what is packed again is the same.
            if not torch.equal(inq.pack(inq.unpack(plain), value.format, value.weight_exp).weight, value.weight):
                raise Violation(f"{name}: accepted, and packs to other codes")
        elif not isinstance(value, Tensor):
            raise Violation(f"{name}: accepted as {type(value)}")


# --- what files are loaded into ---------------------------------------------------------------------------------------


class Objects:
    """What files are loaded into, made anew after each that was taken over."""

    def __init__(self, make: Callable[[], tuple], tensors: Callable[..., list], others: Callable[..., object]):
        self._make, self._tensors, self._others = make, tensors, others
        self.fresh()

    def fresh(self) -> None:
        self.made = self._make()
        self._before = [t.clone() for t in self._tensors(*self.made)]
        self._marks, self._rest = self._marked(), self._others(*self.made)

    def _marked(self) -> list:
        """What says at once that nothing was written: memory and versions of all tensors."""
        return [(t.data_ptr(), t._version) for t in self._tensors(*self.made)]

    def _changed(self) -> bool:
        if self._others(*self.made) != self._rest:
            return True
        if (marks := self._marked()) == self._marks:
            return False
        # Something was written: the way back, perhaps.
        self._marks, now = marks, self._tensors(*self.made)
        return len(now) != len(self._before) or not all(map(torch.equal, now, self._before))

    def load(self, function: Callable, check: Callable[..., object] | None = None) -> None:
        """``function`` with the objects; after an error nothing may have changed, else ``check`` gets them, too."""
        python, generator = random.getstate(), torch.get_rng_state()
        try:
            function(*self.made)
        except Exception as error:
            drawn = random.getstate() != python or not torch.equal(torch.get_rng_state(), generator)
            if drawn or self._changed():
                raise Violation(f"refused, and something has changed: {error}") from error
            raise
        if check is not None:
            check(*self.made)
        self.fresh()


def check_sharded(path: Path, model: torch.nn.Module, run: inq.INQ) -> None:
    """That the model has the values of the files' parts, but for frozen weights, which are codes and so finite."""
    content = json.loads(json.loads((path / structure.TRAINING_INDEX).read_text())["content"])
    shapes = {name: tuple(shape) for name, (_, shape) in content["tensors"].items()}
    whole = {n: torch.zeros(shapes[n] or (1,), dtype=DTYPES[dtype]) for n, (dtype, _) in content["tensors"].items()}
    for shard in path.glob("*.safetensors"):
        data = shard.read_bytes()
        places = structure.take_apart(data).nested[structure.PLACES]
        for name, part in safetensors.torch.load(data).items():
            begin = places[name]["saved_offsets"]
            whole[name][tuple(slice(b, b + size) for b, size in zip(begin, part.shape, strict=True))] = part
    tensors = {name: t.reshape(shapes[name]) for name, t in whole.items()}
    saved = training.decode(content["state"], str(path), tensors)["model"]
    for name, value in model.state_dict().items():
        if (value.dtype, value.shape) != (saved[name].dtype, saved[name].shape):
            raise Violation(f"{name}: accepted as {value.dtype} {list(value.shape)}")
        frozen = run.frozen(name.removesuffix(".weight")) if name.endswith(".weight") else torch.zeros(value.shape) > 0
        if not _same_bits(value[~frozen], saved[name][~frozen]) or not bool(value[frozen].isfinite().all()):
            raise Violation(f"{name}: accepted, with other values than the file's")


# --- what is written from files ---------------------------------------------------------------------------------------


def written(path: Path, name: str, write: Callable[[Path], Result], check: Callable[[Result, Path], object]) -> None:
    """``write`` makes a new target beside ``path``: after an error there is nothing of it, else ``check`` gets it."""
    before, target = set(os.listdir(path.parent)), path.with_name(name)
    try:
        result = write(target)
    except Exception as error:
        if left := set(os.listdir(path.parent)) - before:
            raise Violation(f"refused, and left {sorted(left)}: {error}") from error
        raise
    try:
        check(result, target)
    finally:
        shutil.rmtree(target) if target.is_dir() else target.unlink()


def loaded(target: Path) -> dict:
    """A packed checkpoint that this package has just written."""
    try:
        entries = inq.load(target)
    except inq.CheckpointError as error:
        raise Violation(f"accepted, and what was written of it is refused: {error}") from error
    check_entries(entries)
    return entries


def check_import(path: Path, report: ImportReport, target: Path) -> None:
    """That all that was imported has the values of the source."""
    before = _values(_tensors(path), report.kind)
    _compare(loaded(target), before)


def check_export(path: Path, kind: str, report: ExportReport | int, target: Path) -> None:
    """That all that was exported has the values of the source."""
    quantized = report.quantized if isinstance(report, ExportReport) else ()
    _compare(inq.load(path), _values(_tensors(target), kind, quantized))


def _compare(packed: Mapping, others: Mapping[str, Tensor]) -> None:
    if packed.keys() != others.keys():
        raise Violation(f"accepted, with other names: {sorted(packed.keys() ^ others.keys())}")
    for name, value in packed.items():
        other = others[name]
        if isinstance(value, inq.PackedWeight):
            same = torch.equal(inq.unpack(value, torch.float64), other.double())
        elif value.dtype == other.dtype:
            same = _same_bits(value, other)
        else:  # a quantized weight that stayed float
            same = torch.equal(value.double(), other)
        if not same:
            raise Violation(f"{name}: accepted, with other values than the file's")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


def _tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a model's files."""
    files = model_files(path) if path.is_dir() else [path]
    return {name: t for file in files for name, t in safetensors.torch.load(file.read_bytes()).items()}


# E2M1 by its code, as the OCP Microscaling specification lists it.
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


def _values(tensors: Mapping[str, Tensor], kind: str, names: object = None) -> dict[str, Tensor]:
    """Tensors by name, quantized weights (all, or those among ``names``) as float64, by compressed-tensors' layouts."""
    result = dict(tensors)
    for name, tensor in tensors.items():
        last, weight = name.rpartition(".")[2], name.removesuffix("_packed")
        if names is not None and weight not in names:
            continue
        if kind == compressed_tensors.MXFP4 and last == compressed_tensors.PACKED and tensor.dtype == torch.uint8:
            codes, scales = result.pop(name), result.pop(f"{weight}_scale").double()
            values = _E2M1[torch.stack((codes & 15, codes >> 4), dim=2).flatten(1).long()]
            result[weight] = values * torch.exp2(scales - 127).repeat_interleave(32, dim=1)
        elif kind == compressed_tensors.FP8 and last == "weight" and tensor.dtype == torch.float8_e4m3fn:
            scales = result.pop(f"{name}_scale").double()
            scales = scales.view(1, 1) if scales.numel() == 1 else scales.view(len(tensor), -1)
            each = tensor.shape[1] // scales.shape[1]
            result[name] = tensor.double() * scales.repeat_interleave(each, dim=1)
    return result
