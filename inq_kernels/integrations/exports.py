"""Packed checkpoints as other libraries' quantized ones, exactly or not at all: ``export_mxfp4``, ``export_fp8``.

A model in float weights is ``transcode.export_dense``'s, a compiled one ``pt2.save_pt2``'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from .. import files, ops
from ..file_format import (
    CONFIG_FILE,
    QUANTIZATION_CONFIG,
    TRANSFORMERS_CONFIG,
    Checkpoint,
    is_weight,
    json_text,
    module_name,
    open_checkpoint,
    part_names,
)  # fmt: skip
from ..ops import PackedWeight
from ..transcode import (
    Progress,
    _check_apart,
    _copy_others,
    _entries_of,
    _read_config,
    _row_pieces,
    _write_files,
    unpack_exactly,
)  # fmt: skip
from . import compressed_tensors, fp8, mxfp4

_CODECS: dict[str, ModuleType] = {compressed_tensors.MXFP4: mxfp4, compressed_tensors.FP8: fp8}


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote: ``quantized`` weights by name with their shapes, packed weights written as floats and why,
    names of files that were not copied and why, the quantized weights' bits with their scales, and their dtypes before
    packing."""

    quantized: dict[str, tuple[int, ...]] = field(default_factory=dict)
    as_float: list[tuple[str, str]] = field(default_factory=list)
    not_copied: list[tuple[str, str]] = field(default_factory=list)
    bits: list[int] = field(default_factory=list)
    dtypes: set[torch.dtype] = field(default_factory=set)

    @property
    def bits_a_weight(self) -> float:
        """Stored bits a quantized weight, with scales."""
        return sum(self.bits) / sum(shape[0] * shape[1] for shape in self.quantized.values())


def export_mxfp4(
    source: str | os.PathLike, target: str | os.PathLike, progress: Progress | None = None
) -> ExportReport:
    """Write a packed checkpoint in MXFP4, in compressed-tensors' layout ``mxfp4-pack-quantized``: 4.25 bits a weight.

    The weights' values are the same, bit for bit: transformers with compressed-tensors loads it without this package.
    Formats of at most four magnitudes fit: 2, 3 and 4 bits with paper levels, 2 and 3 with dense ones. As
    compressed-tensors computes MXFP4 with bfloat16 weights, a model of another dtype is for
    ``from_pretrained(…, quantization_config=CompressedTensorsConfig(dequantize=True))``.

    Args:
        source: what ``inq.load`` reads, best a directory of a transformers model.
        target: a directory: the source's file names, its other files, and config.json with ``quantization_config``.
            Packed weights of rank 2, which should be torch.nn.Linear's, are written in MXFP4; those of another rank
            as floats, and the report says so.
        progress: called before each tensor.

    Returns:
        What was written in which form.

    Raises:
        CheckpointError: the source is not as it should be. ValueError: a weight does not fit, with its name and the
            reason (levels, row scales, groups of 32, exponents that its dtype or the model's has not), or ``target`` is
            no directory's name or overlaps ``source``. OSError. Then nothing is written.
    """
    return _export(Path(source), Path(target), compressed_tensors.MXFP4, progress)


def export_fp8(source: str | os.PathLike, target: str | os.PathLike, progress: Progress | None = None) -> ExportReport:
    """Write a packed checkpoint in FP8 e4m3 with a scale a row, in compressed-tensors' layout ``float-quantized``.

    The weights' values are the same, bit for bit, and activations are not quantized. Every format fits, with row scales
    where the weight's dtype holds all products.

    Args, Returns, Raises: as ``export_mxfp4``.
    """
    return _export(Path(source), Path(target), compressed_tensors.FP8, progress)


def _export(source: Path, target: Path, layout: str, progress: Progress | None) -> ExportReport:
    _check_apart(source, target)
    if target.suffix == ".safetensors":
        raise ValueError(f"{target}: expected the name of a directory, for {TRANSFORMERS_CONFIG}, got that of a file")
    checkpoint = open_checkpoint(source)
    model_config = _read_config(source)
    report = ExportReport()
    chosen = _choose(checkpoint, layout, report)
    dtype = _model_dtype(model_config)
    entries = _entries_of(checkpoint, progress)

    def write(file: Path, path: Path) -> None:
        tensors: dict[str, Tensor] = {}
        for name, value in entries(file):
            where, own = f"{file}: tensor {name!r}", checkpoint.manifest[name].dtype
            if name in chosen:
                new = _encode(where, name, value, layout, own, dtype)
                report.quantized[name] = value.shape
                report.dtypes.add(own)
                report.bits.append(8 * sum(tensor.nbytes for tensor in new.values()))
            else:
                new = {name: unpack_exactly(where, value, own) if isinstance(value, PackedWeight) else value}
            tensors |= new
        files.write_safetensors(path, tensors, {"format": "pt"})

    def fill(directory: Path) -> None:
        names = _write_files(checkpoint, source, directory, write)
        merged = {**(model_config or {}), QUANTIZATION_CONFIG: _configuration(checkpoint, chosen, layout)}
        files.write_text(directory / TRANSFORMERS_CONFIG, json_text(merged))
        if source.is_dir():
            report.not_copied.extend(_copy_others(source, directory, [*names, CONFIG_FILE]))

    files.write_directory(target, fill)
    return report


def _choose(checkpoint: Checkpoint, layout: str, report: ExportReport) -> set[str]:
    """The packed weights to quantize: those of rank 2. All that can be refused without data is refused here."""
    chosen, codec = set(), _CODECS[layout]
    new_names = set()
    for name in checkpoint.parts:
        entry = checkpoint.manifest[name]
        if len(entry.shape) != 2:
            report.as_float.append((name, f"rank {len(entry.shape)}: {layout} is for Linear weights"))
            continue
        if reason := codec.why_not(entry.format, entry.shape, part_names(name)[2] in checkpoint.manifest):
            raise ValueError(
                f"{checkpoint.file_of[name]}: tensor {name!r}: expected a weight that {layout} holds exactly, got one "
                f"that it does not: {reason}"
            )
        chosen.add(name)
        new_names |= {f"{name}_scale"} | ({f"{name}_packed"} if codec is mxfp4 else set())
    if not chosen:
        raise ValueError(f"{checkpoint.path}: expected a packed weight of rank 2, as Linear modules have, got none")
    kept = {name for name in checkpoint.names if name not in chosen}
    if taken := kept & new_names:
        raise ValueError(f"{checkpoint.path}: tensor {min(taken)!r}: expected that name to be free for {layout}")
    return chosen


def _model_dtype(model_config: Mapping[str, object] | None) -> torch.dtype | None:
    """The dtype of a config.json, which loaders use, if it names a float one."""
    for content in (model_config or {}, (model_config or {}).get("text_config")):
        if isinstance(content, dict):
            name = content.get("dtype") or content.get("torch_dtype")
            dtype = _NAMED.get(name.removeprefix("torch.")) if isinstance(name, str) else None
            if dtype is not None:
                return dtype
    return None


_NAMED = {str(dtype).removeprefix("torch."): dtype for dtype in ops.FLOATS}


def _encode(
    where: str, name: str, packed: PackedWeight, layout: str, own: torch.dtype, models: torch.dtype | None
) -> dict[str, Tensor]:
    """The tensors of one quantized weight by name; a ValueError unless they decode to just its values.

    ``own``: of the weight before packing; ``models``: that of config.json. Both must hold all values; scales are of
    the narrower one of both.
    """
    codec = _CODECS[layout]
    dtypes = [own] if models in (None, own) else [own, models]
    narrow = torch.float16 if torch.float16 in dtypes else models or own
    pieces: list[tuple[Tensor, Tensor]] = []
    for _, piece in _row_pieces(packed):
        exact = ops.unpack(piece, torch.float64)
        for dtype in dtypes:
            if bad := int((exact.to(dtype).double() != exact).sum()):
                low, high = int(piece.weight_exp.min()), int(piece.weight_exp.max())
                raise ValueError(
                    f"{where}: expected values that {dtype} holds, got {bad} that it would round (exponents {low} to "
                    f"{high}{', and row scales' if piece.weight_scale is not None else ''})"
                )
        try:
            values, scales = codec.encode(piece, narrow)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        # The last word, whatever the reasons above foresaw.
        if not torch.equal(codec.decode(values, scales), exact):
            raise ValueError(f"{where}: expected values that {layout} holds exactly, got others")
        pieces.append((values, scales))
    values, scales = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    stem = name.removesuffix("weight")
    ending = compressed_tensors.PACKED if layout == compressed_tensors.MXFP4 else "weight"
    return {f"{stem}{ending}": values, f"{stem}{compressed_tensors.SCALE}": scales}


def _configuration(checkpoint: Checkpoint, chosen: set[str], layout: str) -> dict[str, object]:
    others = [
        module_name(name)
        for name in checkpoint.names
        if name not in chosen and is_weight(name) and len(checkpoint.manifest[name].shape) == 2
    ]
    return compressed_tensors.config(layout, map(module_name, chosen), others)


EXPORTS: dict[str, Callable[..., ExportReport]] = {"mxfp4": export_mxfp4, "fp8": export_fp8}
