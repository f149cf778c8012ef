"""The files that transformers is about to read, as far as headers tell: which packed weights there are, and whether
they fit the modules that they are for. Nothing is allocated that a header merely claims."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import torch

from .. import files
from ..file_format import FORMAT_VERSION, VERSION_KEY, _check_is_inq, folder_root, is_weight, part_names, some
from ..files import CheckpointError, TensorInfo
from ..format import Format


class PackedFiles:
    """``paths``: the safetensors files of one model; ``source``: where it is read from, a directory or a name on a hub.

    Raises:
        CheckpointError: a file is not as ``files.read_header`` wants it, or of a newer format, or a name is twice, or
            an index or a link leads out of the directory.
        ValueError: no files.
    """

    def __init__(self, paths: Iterable[str] | None, source: str = "") -> None:
        if not paths:
            raise ValueError("inq: expected the files of a packed model, got none (from_pretrained(state_dict=…)?)")
        self._infos: dict[str, TensorInfo] = {}
        self._file_of: dict[str, Path] = {}
        self._first = Path(next(iter(paths)))
        root = folder_root(Path(source)) if source and Path(source).is_dir() else None
        for path in map(Path, paths):
            files.check_regular(path, root)
            header = files.read_header(path)
            # transformers' own save_pretrained writes no manifest; with one the version is known.
            if VERSION_KEY in header.metadata:
                _check_is_inq(path, header, FORMAT_VERSION)
            if twice := header.tensors.keys() & self._infos.keys():
                raise CheckpointError(f"{path}: expected each tensor in one file, got {some(twice)} in another, too")
            self._infos |= header.tensors
            self._file_of |= dict.fromkeys(header.tensors, path)

    @cached_property
    def packed(self) -> frozenset[str]:
        """The names of all packed weights."""
        codes = (name for name, info in self._infos.items() if info.dtype == torch.uint8 and is_weight(name))
        return frozenset(name for name in codes if f"{name}_exp" in self._infos)

    def claim(self, modules: Iterable[str]) -> str | None:
        """The packed weight of the module that goes by these names; None: there is none."""
        return next((name for m in modules if (name := f"{m}.weight" if m else "weight") in self.packed), None)

    def float_weight(self, modules: Iterable[str]) -> str | None:
        """The weight of that module, if it is in the files and not packed."""
        return next((f"{m}.weight" for m in modules if f"{m}.weight" in self._infos), None)

    def check(self, name: str, fmt: Format, shape: tuple[int, ...]) -> bool:
        """That the parts of a packed weight are as ``fmt`` and the module's ``shape`` ask; whether it has row scales.

        Raises:
            CheckpointError: they are not.
        """
        n, k = shape[0], math.prod(shape[1:])
        expected = dict(
            zip(
                part_names(name),
                ((torch.uint8, (n, fmt.row_bytes(k))), (torch.int8, (n, 1)), (torch.float32, (n, 1))),
                strict=True,
            )
        )
        for part, (dtype, size) in expected.items():
            info = self._infos.get(part)
            if info is not None and (info.dtype, info.shape) != (dtype, size):
                text = f"expected {dtype} {list(size)} for a weight of shape {list(shape)} in {fmt}"
                raise self.error(part, f"{text}, got {info.dtype} {list(info.shape)}")
        return part_names(name)[2] in self._infos

    def error(self, name: str | None, text: str) -> CheckpointError:
        """``text`` with the file, and the tensor if there is one, in front."""
        if name is None:
            return CheckpointError(f"{self._first.parent}: {text}")
        return CheckpointError(f"{self._file_of[name]}: tensor {name!r}: {text}")
