"""Model files to model files, one tensor at a time, without the model's code: ``quantize``, ``rewrite`` and
``export_dense``."""

from __future__ import annotations

import itertools
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from . import files, ops
from .file_format import (
    CONFIG_FILE,
    INDEX_FILE,
    MODEL_FILE,
    QUANTIZATION_CONFIG,
    TRANSFORMERS_CONFIG,
    VERSION_KEY,
    Checkpoint,
    check_suffix,
    config,
    folder_root,
    is_weight,
    json_text,
    model_files,
    module_name,
    open_checkpoint,
    part_names,
    row_chunks,
    version_of,
    write_file,
)  # fmt: skip
from .files import CheckpointError, Header, TensorInfo
from .format import Format
from .nn import as_patterns, check_patterns, first_match, fit, sqnr_db
from .ops import PackedWeight

# In a file there are no module types: these names are embeddings in most models, and looking up rows of packed weights
# is not what the kernels do.
DEFAULT_SKIP = ("*[Ee]mbed*", "*emb", "*_emb.*", "*wte", "*wpe", "*shared", "*position*", "*relative_attention*")

# These would still be the old model's.
_OTHER_WEIGHTS = (".safetensors", *files.FOREIGN_WEIGHTS)
_CHUNK = 1 << 22

# Called with a tensor's name, how many tensors are done, and of how many.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Row:
    """One tensor: packed in ``format``, or float for ``reason``. Bytes with exponents; ``zeros`` is a fraction."""

    name: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    format: Format | None = None
    reason: str = ""
    sqnr_db: float = math.inf
    zeros: float = 0.0


@dataclass(frozen=True)
class QuantizeReport:
    """What ``quantize`` did: a row for each tensor, and the files that were not copied, with the reason."""

    rows: list[Row] = field(default_factory=list)
    not_copied: list[tuple[str, str]] = field(default_factory=list)

    @property
    def packed(self) -> list[Row]:
        return [row for row in self.rows if row.format is not None]


# --- where from and where to ------------------------------------------------------------------------------------------


def _check_apart(source: Path, target: Path) -> None:
    real, out = Path(os.path.realpath(source)), Path(os.path.realpath(target))
    if out.is_relative_to(real) or real.is_relative_to(out):
        raise ValueError(f"{target}: expected an output outside of the source {source}, got a path that overlaps it")


def _check_target(target: Path, shards: int) -> None:
    if target.suffix == ".safetensors" and shards > 1:
        raise ValueError(f"{target}: expected a directory for {shards} files, got the name of one file")


def _read_config(source: Path) -> dict[str, object] | None:
    """A model's config.json, if its directory has one."""
    path = source / TRANSFORMERS_CONFIG
    if not source.is_dir() or not os.path.lexists(path):
        return None
    files.check_regular(path, folder_root(source))
    content = files.read_json(path, allow_nan=True)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected an object, got {type(content).__name__}")
    return content


def _copy_others(source: Path, target: Path, written: Iterable[str]) -> list[tuple[str, str]]:
    """Copy tokenizer and other small files; the names that were not copied, with the reason."""
    not_copied, root = [], folder_root(source)
    own = {*written, INDEX_FILE, TRANSFORMERS_CONFIG, CONFIG_FILE}
    for name in sorted(os.listdir(source)):
        path = source / name
        if name in own:
            continue
        if path.suffix.lower() in files.PICKLE_SUFFIXES:
            reason = "may hold a pickle"
        elif path.suffix.lower() in _OTHER_WEIGHTS or name.endswith(".index.json"):
            reason = "other weights"
        elif name.startswith("."):
            reason = "hidden"
        else:
            try:
                files.check_regular(path, root)
            except CheckpointError:
                reason = "no regular file of the directory"
            else:
                # Where it copies by itself, Python does not say which file.
                with files._naming(target / name):
                    shutil.copyfile(path, target / name)
                continue
        not_copied.append((name, reason))
    return not_copied


def _write_index(directory: Path, headers: Mapping[str, Header]) -> None:
    weight_map = {name: file for file, header in headers.items() for name in header.tensors}
    size = sum(info.end - info.begin for header in headers.values() for info in header.tensors.values())
    files.write_text(directory / INDEX_FILE, json_text({"metadata": {"total_size": size}, "weight_map": weight_map}))


# --- quantize ---------------------------------------------------------------------------------------------------------


def quantize(
    source: str | os.PathLike,
    target: str | os.PathLike,
    fmt: Format,
    skip: str | Iterable[str] = (),
    only: str | Iterable[str] = (),
    default_skip: Iterable[str] = DEFAULT_SKIP,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Pack a model's files in one shot: INQ at 100 %, without retraining. Whole or not at all.

    Packed are floating tensors of rank 2 or 4 whose name ends in ".weight", rows = dimension 0: exactly where they lie
    on the grid of ``fmt`` already, else rounded by equation (4). Memory: one source file's packed tensors.

    Args:
        source: a .safetensors file, or a directory with model.safetensors or shards and their index.
        target: a new .safetensors file, or a directory (the same file names; config.json with ``quantization_config``
            or else inq.json; and the source's other files but for weights in other formats).
        fmt: the format of all packed weights.
        skip, only: patterns (fnmatch) of module names, the tensors' without ".weight", that stay float, or that alone
            are packed.
        default_skip: patterns that stay float besides, whether they match anything or not.
        progress: called before each tensor.

    Raises:
        CheckpointError: a source file is not as it should be, or is quantized already. ValueError: NaN or Inf in a
            weight, a pattern without a match, nothing to pack, or ``target`` overlaps ``source``. OSError.
    """
    source, target = Path(source), Path(target)
    skip, only = as_patterns(skip), as_patterns(only)
    _check_apart(source, target)
    if source.is_dir():
        shards = model_files(source)
    else:
        check_suffix(source)
        shards = [source]
    _check_target(target, len(shards))
    headers = {shard: files.read_header(shard) for shard in shards}
    model_config = _read_config(source)
    _check_unquantized(headers, source, model_config)

    infos = {name: info for header in headers.values() for name, info in header.tensors.items()}
    modules = {module_name(name) for name in infos if is_weight(name)}
    check_patterns("inq.quantize: skip", skip, modules)
    check_patterns("inq.quantize: only", only, modules)
    tied = bool(model_config and model_config.get("tie_word_embeddings"))
    reasons = {name: _why_float(name, info, (*skip, *default_skip), only, tied) for name, info in infos.items()}
    chosen = [name for name, reason in reasons.items() if reason is None]
    if not chosen:
        some = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:4])
        raise ValueError(f"{source}: expected a weight to pack, got none ({some})")
    if taken := {part for name in chosen for part in part_names(name)[1:]} & infos.keys():
        raise CheckpointError(f"{source}: tensor {min(taken)!r}: expected that name to be free for packing")
    ignore = [
        module_name(name)
        for name, reason in reasons.items()
        if reason is not None and is_weight(name) and len(infos[name].shape) >= 2
    ]
    configuration = config({module_name(name): fmt for name in chosen}, ignore)

    report = QuantizeReport()
    dtypes = {name: infos[name].dtype for name in chosen}

    def write(shard: Path, path: Path, own_config: Mapping[str, object] | None) -> None:
        entries: dict[str, PackedWeight | Tensor] = {}
        with files.open_tensors(shard, headers[shard]) as get:
            for name, info in headers[shard].tensors.items():
                if progress is not None:
                    progress(name, len(report.rows), len(infos))
                entries[name], row = _quantize_tensor(shard, name, info, get(name), reasons[name], fmt)
                report.rows.append(row)
        write_file(path, entries, dtypes, own_config)

    def fill(directory: Path) -> None:
        names = {shard: shard.name if source.is_dir() else MODEL_FILE for shard in shards}
        for shard, name in names.items():
            write(shard, directory / name, None)
        if (source / INDEX_FILE).is_file():
            _write_index(directory, {name: files.read_header(directory / name) for name in names.values()})
        if model_config is None:
            files.write_text(directory / CONFIG_FILE, json_text(configuration))
        else:
            merged = {**model_config, QUANTIZATION_CONFIG: configuration}
            files.write_text(directory / TRANSFORMERS_CONFIG, json_text(merged))
        if source.is_dir():
            report.not_copied.extend(_copy_others(source, directory, names.values()))
        open_checkpoint(directory)

    if target.suffix == ".safetensors":
        write(shards[0], target, configuration)
    else:
        files.write_directory(target, fill)
    return report


def _check_unquantized(headers: Mapping[Path, Header], source: Path, model_config: Mapping | None) -> None:
    for shard, header in headers.items():
        if VERSION_KEY in header.metadata:
            raise CheckpointError(f"{shard}: expected float weights, got an inq file: it is packed already")
    if model_config and model_config.get(QUANTIZATION_CONFIG) is not None:
        settings = model_config[QUANTIZATION_CONFIG]
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        raise CheckpointError(
            f"{source / TRANSFORMERS_CONFIG}: expected a float model, got one quantized by {method!r}"
        )


def _why_float(name: str, info: TensorInfo, skip: Iterable[str], only: tuple[str, ...], tied: bool) -> str | None:
    """Why a tensor is not packed, or None if it is."""
    module = module_name(name)
    if not is_weight(name):
        return "no .weight"
    if info.dtype not in ops.FLOATS:
        return f"dtype {str(info.dtype).removeprefix('torch.')}"
    if len(info.shape) not in (2, 4):
        return f"rank {len(info.shape)}"
    if 0 in info.shape:
        return "is empty"
    if tied and module == "lm_head":
        return "tied to the embedding (config.json)"
    if pattern := first_match(skip, module):
        return f"skipped by {pattern!r}"
    if only and not first_match(only, module):
        return "not among --only"
    return None


def _quantize_tensor(
    shard: Path, name: str, info: TensorInfo, w: Tensor, reason: str | None, fmt: Format
) -> tuple[PackedWeight | Tensor, Row]:
    if reason is not None:
        return w, Row(name, info.shape, w.nbytes, w.nbytes, reason=reason)
    w_hat, n1 = fit(f"{shard}: tensor {name!r}", w, fmt)
    packed = ops.pack(w_hat, fmt, n1)
    signal = noise = 0.0
    for a, b in zip(w.reshape(-1).split(_CHUNK), w_hat.reshape(-1).split(_CHUNK), strict=True):
        signal += float(a.double().square().sum())
        noise += float((a.double() - b.double()).square().sum())
    zeros = 1 - int(torch.count_nonzero(w_hat)) / w.numel()
    after = packed.weight.nbytes + packed.weight_exp.nbytes
    return packed, Row(name, info.shape, w.nbytes, after, fmt, "", sqnr_db(signal, noise), zeros)


# --- a checkpoint that is written again ------------------------------------------------------------------------------


def _entries_of(
    checkpoint: Checkpoint, progress: Progress | None
) -> Callable[[Path], Iterator[tuple[str, PackedWeight | Tensor]]]:
    """``checkpoint.entries`` of one file after the other, of which ``progress`` hears."""
    done = itertools.count()

    def entries(file: Path) -> Iterator[tuple[str, PackedWeight | Tensor]]:
        for name, value in checkpoint.entries(file):
            if progress is not None:
                progress(name, next(done), len(checkpoint.names))
            yield name, value

    return entries


def _write_files(
    checkpoint: Checkpoint, source: Path, directory: Path, write: Callable[[Path, Path], object]
) -> list[str]:
    """``write(file, path)`` for each file of ``source``, and an index where that has one; their names. Without files of
    nothing but exponents, which go where their weights are."""
    used = dict.fromkeys(checkpoint.file_of[name] for name in checkpoint.names)
    names = {file: file.name if source.is_dir() else MODEL_FILE for file in used}
    for file, name in names.items():
        write(file, directory / name)
    if (source / INDEX_FILE).is_file():
        _write_index(directory, {name: files.read_header(directory / name) for name in names.values()})
    return list(names.values())


# --- rewrite ----------------------------------------------------------------------------------------------------------


def rewrite(
    source: str | os.PathLike, target: str | os.PathLike, compress: bool, progress: Progress | None = None
) -> tuple[int, int]:
    """Write an inq checkpoint again, with entropy-coded codes or plain ones, bit for bit the same model. Whole or not
    at all. Memory: one source file's packed tensors.

    Args:
        source: what ``inq.load`` reads.
        target: a .safetensors file (for a source of one file), or a directory with the source's file names, its
            configuration and its other files.
        compress: as of ``inq.save``.
        progress: called before each tensor.

    Returns:
        The bytes of the source's safetensors files, and of the target's.

    Raises:
        CheckpointError: the source is not as it should be. ValueError: ``target`` overlaps ``source``. OSError.
        ImportError: zstandard is missing.
    """
    source, target = Path(source), Path(target)
    _check_apart(source, target)
    checkpoint = open_checkpoint(source)
    _check_target(target, len(checkpoint.headers))
    configuration = {**checkpoint.config, "format_version": version_of(compress)}
    dtypes = {name: checkpoint.manifest[name].dtype for name in checkpoint.parts}
    entries, after = _entries_of(checkpoint, progress), 0

    def write(file: Path, path: Path, own_config: Mapping[str, object] | None = None) -> None:
        nonlocal after
        write_file(path, dict(entries(file)), dtypes, own_config, compress)
        after += path.stat().st_size

    def fill(directory: Path) -> None:
        names = _write_files(checkpoint, source, directory, write)
        if (model_config := _read_config(source)) is not None and model_config.get(QUANTIZATION_CONFIG) is not None:
            model_config[QUANTIZATION_CONFIG] = configuration
            files.write_text(directory / TRANSFORMERS_CONFIG, json_text(model_config))
        if model_config is None or os.path.lexists(source / CONFIG_FILE):
            files.write_text(directory / CONFIG_FILE, json_text(configuration))
        if source.is_dir():
            _copy_others(source, directory, names)
        open_checkpoint(directory)

    if target.suffix == ".safetensors":
        write(next(iter(checkpoint.headers)), target, configuration)
    else:
        files.write_directory(target, fill)
    return sum(file.stat().st_size for file in checkpoint.headers), after


# --- export -----------------------------------------------------------------------------------------------------------


def export_dense(
    source: str | os.PathLike,
    target: str | os.PathLike,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> int:
    """Unpack an inq checkpoint into ordinary safetensors with float weights, bit-exact. Whole or not at all.

    Args:
        source: what ``inq.load`` reads.
        target: a .safetensors file (for a source of one file), or a directory with the source's file names, config.json
            without its ``quantization_config``, and the other files.
        dtype: of the unpacked weights; None takes what each was before packing.
        progress: called before each tensor.

    Returns:
        How many weights were unpacked.

    Raises:
        CheckpointError: the source is not as it should be. ValueError: ``dtype`` does not hold a weight's values
            exactly, or ``target`` overlaps ``source``. OSError.
    """
    source, target = Path(source), Path(target)
    _check_apart(source, target)
    checkpoint = open_checkpoint(source)
    _check_target(target, len(checkpoint.headers))
    entries = _entries_of(checkpoint, progress)

    def write(file: Path, path: Path) -> None:
        tensors = {}
        for name, value in entries(file):
            if isinstance(value, PackedWeight):
                value = unpack_exactly(f"{file}: tensor {name!r}", value, dtype or checkpoint.manifest[name].dtype)
            tensors[name] = value
        files.write_safetensors(path, tensors, {"format": "pt"})

    def fill(directory: Path) -> None:
        names = _write_files(checkpoint, source, directory, write)
        if (model_config := _read_config(source)) is not None:
            model_config.pop(QUANTIZATION_CONFIG, None)
            files.write_text(directory / TRANSFORMERS_CONFIG, json_text(model_config))
        if source.is_dir():
            _copy_others(source, directory, names)

    if target.suffix == ".safetensors":
        write(next(iter(checkpoint.headers)), target)
    else:
        files.write_directory(target, fill)
    return len(checkpoint.parts)


def unpack_exactly(where: str, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """``ops.unpack``, or a ValueError if ``dtype`` would round some value."""
    out = torch.empty(packed.shape, dtype=dtype)
    rounded = 0
    for rows, piece in _row_pieces(packed):
        exact = ops.unpack(piece, torch.float64)
        out[rows] = exact
        rounded += int((out[rows].double() != exact).sum())
    if rounded:
        raise ValueError(
            f"{where}: expected values that {dtype} holds, got {rounded} of {out.numel()} that it would round: "
            "export with another --dtype"
        )
    return out


def _row_pieces(packed: PackedWeight) -> Iterator[tuple[slice, PackedWeight]]:
    for rows in row_chunks(packed):
        weight, weight_exp = packed.weight[rows], packed.weight_exp[rows]
        scale = None if packed.weight_scale is None else packed.weight_scale[rows]
        yield rows, PackedWeight(weight, weight_exp, scale, packed.format, (weight.shape[0], *packed.shape[1:]))
