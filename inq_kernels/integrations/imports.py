"""Weights that are powers of two already, from other files into packed ones, exactly: ``import_packed``.

Read are float weights (after INQ with any tool), and compressed-tensors' MXFP4 and FP8. Two passes over the files: the
first finds which format holds the weights, the second writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from .. import files, ops, reference
from ..file_format import (
    CONFIG_FILE,
    INDEX_FILE,
    MODEL_FILE,
    QUANTIZATION_CONFIG,
    TRANSFORMERS_CONFIG,
    VERSION_KEY,
    check_suffix,
    config,
    is_weight,
    json_text,
    model_files,
    module_name,
    open_checkpoint,
    part_names,
    write_file,
)  # fmt: skip
from ..files import CheckpointError, Header, TensorInfo
from ..format import BITS, GRANULARITIES, LEVELS, N1_ZERO_ROW, Format
from ..nn import as_patterns, check_patterns
from ..ops import PackedWeight
from ..transcode import (
    DEFAULT_SKIP,
    Progress,
    _check_apart,
    _check_target,
    _copy_others,
    _read_config,
    _why_float,
    _write_index,
)  # fmt: skip
from . import compressed_tensors, fp8, mxfp4
from .compressed_tensors import Parts
from .exports import _model_dtype

_CHUNK = 1 << 22


@dataclass(frozen=True)
class Imported:
    """One weight: packed in ``format``, or float for ``reason``. ``negative_zeros`` became +0, as codes have no sign of
    zero."""

    name: str
    shape: tuple[int, ...]
    format: Format | None = None
    reason: str = ""
    negative_zeros: int = 0


@dataclass(frozen=True)
class ImportReport:
    """What ``import_packed`` did: ``kind`` of the source's weights ("float", or a layout of compressed-tensors), the
    format of all packed weights, a row for each weight of rank 2 or more, and the files that were not copied."""

    kind: str
    format: Format
    rows: list[Imported] = field(default_factory=list)
    not_copied: list[tuple[str, str]] = field(default_factory=list)

    @property
    def packed(self) -> list[Imported]:
        return [row for row in self.rows if row.format is not None]


# --- what a weight needs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Need:
    """Why a weight cannot be packed exactly, or the magnitudes that it needs by granularity."""

    reason: str = ""
    magnitudes: Mapping[str, int] = field(default_factory=dict)

    def fits(self, fmt: Format) -> bool:
        return not self.reason and self.magnitudes[fmt.granularity] <= fmt.magnitudes


def _row_chunks(w: Tensor) -> Iterator[Tensor]:
    rows = max(1, _CHUNK // max(w[0].numel(), 1))
    return (w[start : start + rows].flatten(1) for start in range(0, w.shape[0], rows))


def _range(w: Tensor) -> tuple[Tensor, Tensor, int]:
    """For each row of ``w`` [N, …] the largest and the least k of its values ±2^k, int64 [N], least 1 more than the
    largest for a row of zeros; and how many values are neither 0 nor a power of two. Finite values."""
    high, low, others = [], [], 0
    for rows in _row_chunks(w):
        m, e = reference._frexp(rows)
        zero, e = m == 0, e.long() - 1
        others += int((~zero & (m != 0.5)).sum())
        high.append(e.masked_fill(zero, _NONE).amax(dim=1))
        low.append(e.masked_fill(zero, -_NONE).amin(dim=1))
    return torch.cat(high), torch.cat(low), others


# Under all exponents of float64.
_NONE = -(1 << 20)


def _need(w: Tensor) -> _Need:
    high, low, others = _range(w)
    if others:
        return _Need(f"{others} of {w.numel()} values are neither 0 nor a power of two")
    live = high > _NONE
    if not bool(live.any()):
        return _Need(magnitudes=dict.fromkeys(GRANULARITIES, 1))
    high, low = high[live], low[live]
    least, largest = reference.exponent_limits(w.dtype)
    if int(low.min()) < least or int(high.max()) > largest:
        return _Need(f"it has exponents {int(low.min())} to {int(high.max())}, outside [{least}, {largest}]")
    magnitudes = {"tensor": int(high.max() - low.min()) + 1, "channel": int((high - low).max()) + 1}
    if magnitudes["channel"] > max(fmt.magnitudes for fmt in _formats()):
        return _Need(f"a row has powers of two {magnitudes['channel'] - 1} octaves apart, more than any format holds")
    return _Need(magnitudes=magnitudes)


def _formats(bits: int | None = None, levels: str | None = None, granularity: str | None = None) -> list[Format]:
    """The formats of those fields (None: any), smallest first, paper before dense, one n1 a tensor before one a row."""
    return [
        Format(b, kind, each)
        for b in (BITS if bits is None else [bits])
        for kind in (LEVELS if levels is None else [levels])
        for each in (GRANULARITIES if granularity is None else [granularity])
    ]


def _pick(needs: Mapping[str, _Need], formats: list[Format]) -> Format:
    """The first format that holds as many weights as any of them does."""
    counts = [sum(need.fits(fmt) for need in needs.values()) for fmt in formats]
    return formats[counts.index(max(counts))]


def _pack(w: Tensor, fmt: Format) -> PackedWeight:
    high, _, _ = _range(w)
    if fmt.granularity == "tensor":
        high = high.max().expand(w.shape[0])
    n1 = torch.where(high > _NONE, high, N1_ZERO_ROW).to(torch.int8).view(-1, 1)
    return ops.pack(w, fmt, n1)


# --- where weights come from ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """A model's files, their headers, its config.json, and its quantized weights under NAME.weight."""

    path: Path
    headers: dict[Path, Header]
    model_config: dict[str, object] | None
    kind: str
    quantized: dict[str, Parts]

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        return {name: info for header in self.headers.values() for name, info in header.tensors.items()}

    @cached_property
    def file_of(self) -> dict[str, Path]:
        return {name: file for file, header in self.headers.items() for name in header.tensors}

    @cached_property
    def names(self) -> dict[str, Path]:
        """Quantized weights as NAME.weight and other tensors, and the file that each goes to."""
        of_value = {parts.values: name for name, parts in self.quantized.items()}
        scales = {parts.scales for parts in self.quantized.values()}
        return {of_value.get(name, name): file for name, file in self.file_of.items() if name not in scales}

    def shape(self, name: str) -> tuple[int, ...]:
        return self.quantized[name].shape if name in self.quantized else self.infos[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Of a weight before it is packed: its own, or of a quantized one config.json's, or of FP8 scales, or
        bfloat16, which is what loaders of MXFP4 compute with."""
        if name not in self.quantized:
            return self.infos[name].dtype
        if (dtype := _model_dtype(self.model_config)) is not None:
            return dtype
        return self.infos[self.quantized[name].scales].dtype if self.kind == compressed_tensors.FP8 else torch.bfloat16


class _Reader:
    """The values of a source's weights, one at a time; files are opened once."""

    def __init__(self, source: _Source, stack: ExitStack) -> None:
        self._source, self._stack, self._open = source, stack, {}

    def _get(self, name: str) -> Tensor:
        file = self._source.file_of[name]
        if file not in self._open:
            self._open[file] = self._stack.enter_context(files.open_tensors(file, self._source.headers[file]))
        return self._open[file](name)

    def __call__(self, name: str) -> Tensor:
        """A tensor; of a quantized weight its values, in its dtype. CheckpointError if that would round one."""
        parts = self._source.quantized.get(name)
        if parts is None:
            return self._get(name)
        codes, scales = self._get(parts.values), self._get(parts.scales)
        codec = mxfp4 if self._source.kind == compressed_tensors.MXFP4 else fp8
        if codec is fp8 and scales.numel() > 1:
            scales = scales.view(parts.shape[0], -1)
        w = torch.empty(parts.shape, dtype=self._source.dtype(name))
        step, rounded = max(1, _CHUNK // parts.shape[1]), 0
        for start in range(0, parts.shape[0], step):
            rows = slice(start, start + step)
            try:
                exact = codec.decode(codes[rows], scales if scales.numel() == 1 else scales[rows])
            except ValueError as error:
                raise CheckpointError(f"{self._source.file_of[parts.values]}: weight {name!r}: {error}") from None
            w[rows] = exact
            rounded += int((w[rows].double() != exact).sum())
        if rounded:
            raise CheckpointError(
                f"{self._source.file_of[parts.values]}: weight {name!r}: expected values that {w.dtype} holds, got "
                f"{rounded} of {w.numel()} that it would round"
            )
        return w


def _open_source(path: Path) -> _Source:
    if path.is_dir():
        shards = model_files(path)
    else:
        check_suffix(path)
        shards = [path]
    headers = {shard: files.read_header(shard) for shard in shards}
    for shard, header in headers.items():
        if VERSION_KEY in header.metadata:
            raise CheckpointError(f"{shard}: expected another library's weights, got an inq file: it is packed already")
    model_config = _read_config(path)
    settings = (model_config or {}).get(QUANTIZATION_CONFIG)
    if settings is None:
        return _Source(path, headers, model_config, "float", {})
    where = f"{path / TRANSFORMERS_CONFIG}: {QUANTIZATION_CONFIG}"
    if not isinstance(settings, dict):
        raise CheckpointError(f"{where}: expected an object, got {type(settings).__name__}")
    scheme = compressed_tensors.read(where, settings)
    infos = {name: info for header in headers.values() for name, info in header.tensors.items()}
    return _Source(path, headers, model_config, scheme.layout, compressed_tensors.parts(str(path), scheme, infos))


# --- the import -------------------------------------------------------------------------------------------------------


def import_packed(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    bits: int | None = None,
    levels: str | None = None,
    granularity: str | None = None,
    skip: str | Iterable[str] = (),
    only: str | Iterable[str] = (),
    default_skip: Iterable[str] = DEFAULT_SKIP,
    progress: Progress | None = None,
) -> ImportReport:
    """Pack weights that are 0 or ±2^k already, bit for bit; never round. Whole or not at all.

    Args:
        source: a .safetensors file of float weights; or a directory with model.safetensors or shards, of float weights
            or, as its config.json says, in compressed-tensors' ``mxfp4-pack-quantized`` or ``float-quantized``.
        target: a new .safetensors file, or a directory as ``inq quantize`` writes it.
        bits, levels, granularity: fields that the format must have; None lets the import take the smallest format
            that holds the most weights (paper levels before dense ones, one exponent a tensor before one a row).
        skip, only, default_skip: as in ``inq quantize``.
        progress: called before each tensor of the second pass.

    Returns:
        The format, and of each weight whether it was packed or stayed float (MXFP4 and FP8 as floats of config.json's
        dtype), and why: values between powers of two, too many octaves, or skipped.

    Raises:
        CheckpointError: a source file is not as it should be, is packed already, or of another quantization.
        ValueError: no weight can be packed, NaN or Inf in one, a pattern without a match, or ``target`` overlaps
            ``source``. OSError. Then nothing is written.
    """
    source, target = Path(source), Path(target)
    skip, only = as_patterns(skip), as_patterns(only)
    formats = _formats(bits, levels, granularity)
    _check_apart(source, target)
    model = _open_source(source)
    _check_target(target, len(model.headers))
    modules = {module_name(name) for name in model.names if is_weight(name)}
    check_patterns("inq import: skip", skip, modules)
    check_patterns("inq import: only", only, modules)
    tied = bool(model.model_config and model.model_config.get("tie_word_embeddings"))

    reasons: dict[str, str] = {}
    needs: dict[str, _Need] = {}
    with ExitStack() as stack:
        read = _Reader(model, stack)
        for name in model.names:
            info = TensorInfo(model.dtype(name), model.shape(name), 0, 0)
            reason = _why_float(name, info, (*skip, *default_skip), only, tied)
            if reason is not None:
                reasons[name] = reason
                continue
            w = read(name)
            ops.check_weight(f"{model.names[name]}: weight {name!r}", w)
            needs[name] = _need(w)
    possible = {name: need for name, need in needs.items() if not need.reason}
    if not possible:
        some = "; ".join(
            f"{n}: {r}" for n, r in [*((n, need.reason) for n, need in needs.items()), *reasons.items()][:4]
        )
        raise ValueError(f"{source}: expected a weight of powers of two, got none ({some})")
    fmt = _pick(possible, formats)
    for name, need in needs.items():
        if not need.fits(fmt):
            of = need.magnitudes.get(fmt.granularity)
            reasons[name] = need.reason or f"needs {of} magnitudes, {fmt} has {fmt.magnitudes}"
    chosen = {name for name in needs if name not in reasons}
    if not chosen:
        some = "; ".join(f"{name}: {reasons[name]}" for name in list(possible)[:4])
        raise ValueError(f"{source}: expected a weight that {fmt} holds, got none ({some})")
    if taken := {part for name in chosen for part in part_names(name)[1:]} & model.names.keys():
        raise CheckpointError(f"{source}: tensor {min(taken)!r}: expected that name to be free for packing")
    return _write(model, target, fmt, chosen, reasons, progress)


def _write(
    model: _Source, target: Path, fmt: Format, chosen: set[str], reasons: Mapping[str, str], progress: Progress | None
) -> ImportReport:
    report = ImportReport(model.kind, fmt)
    ignore = [module_name(n) for n in model.names if n not in chosen and is_weight(n) and len(model.shape(n)) >= 2]
    configuration = config({module_name(name): fmt for name in chosen}, ignore)
    dtypes = {name: model.dtype(name) for name in chosen}
    done = 0

    def write(file: Path, path: Path, own_config: Mapping[str, object] | None) -> None:
        nonlocal done
        entries: dict[str, PackedWeight | Tensor] = {}
        with ExitStack() as stack:
            read = _Reader(model, stack)
            for name in (name for name, of in model.names.items() if of == file):
                if progress is not None:
                    progress(name, done, len(model.names))
                done += 1
                w = read(name)
                entries[name], row = _import_tensor(name, w, fmt if name in chosen else None, reasons.get(name, ""))
                if row is not None:
                    report.rows.append(row)
        write_file(path, entries, dtypes, own_config)

    def fill(directory: Path) -> None:
        used = dict.fromkeys(model.names.values())
        names = {file: file.name if model.path.is_dir() else MODEL_FILE for file in used}
        for file, name in names.items():
            write(file, directory / name, None)
        if (model.path / INDEX_FILE).is_file():
            _write_index(directory, {name: files.read_header(directory / name) for name in names.values()})
        if model.model_config is None:
            files.write_text(directory / CONFIG_FILE, json_text(configuration))
        else:
            merged = {**model.model_config, QUANTIZATION_CONFIG: configuration}
            files.write_text(directory / TRANSFORMERS_CONFIG, json_text(merged))
        if model.path.is_dir():
            report.not_copied.extend(_copy_others(model.path, directory, names.values()))
        open_checkpoint(directory)

    if target.suffix == ".safetensors":
        write(next(iter(model.headers)), target, configuration)
    else:
        files.write_directory(target, fill)
    return report


def _import_tensor(
    name: str, w: Tensor, fmt: Format | None, reason: str
) -> tuple[PackedWeight | Tensor, Imported | None]:
    if fmt is None:
        row = Imported(name, tuple(w.shape), reason=reason) if is_weight(name) and w.dim() >= 2 else None
        return w, row
    packed = _pack(w, fmt)
    negative_zeros = int((torch.signbit(w) & (w == 0)).sum())
    return packed, Imported(name, tuple(w.shape), fmt, "", negative_zeros)
