"""The file format: what is in the files of a packed model, and every check of it. Safetensors, never pickle.

A packed weight NAME.weight is stored as NAME.weight, uint8 [N, ceil(K/8)·bits]; NAME.weight_exp, int8 [N, 1]; and where
there is one NAME.weight_scale, float32 [N, 1]. All else is stored as it is, under its own name; tensors that share
memory are stored once for each name. The header's ``__metadata__`` holds

- ``inq_format_version``: "1", or "2" where codes may be entropy-coded;
- ``inq_manifest``: JSON, for each tensor of the file ``sha256``, ``dtype`` and ``shape``; for packed weights dtype and
  shape are those of the unpacked weight, and beside them are the format (``bits``, ``levels``,
  ``exponent_granularity``, ``exponent_rule``) and ``exponent_range``, the least and the largest value of weight_exp;
  In version 2 a packed weight may have ``coding`` beside them; then NAME.weight is uint8 [bytes], what compression.py
  makes of the codes, ``sha256`` is of those bytes, and ``coding`` says how to decode them and to what;
- ``inq_manifest_sha256``: of that text, since a changed shape would leave every tensor's checksum as it is.

The configuration (``quant_method``, the most common format, ``overrides``, ``ignore``) is ``inq.json`` in a directory,
or ``quantization_config`` in its config.json; in a single file it is ``inq_config`` in ``__metadata__``. Its
``format_version`` is that of the files: what reads a configuration alone must know from it what it cannot read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from . import compression, cpu, files, ops, reference
from .compression import Coding
from .files import CheckpointError, Header
from .format import N1_MAX, N1_MIN, Format
from .layouts import STORAGE
from .ops import PackedWeight, prepack

FORMAT_VERSION = 1
# Of files with entropy-coded codes, and the newest that this version reads. Others stay as they were, byte for byte.
COMPRESSED_VERSION = 2
CONFIG_FILE = "inq.json"
MODEL_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TRANSFORMERS_CONFIG = "config.json"
QUANTIZATION_CONFIG = "quantization_config"

_PRODUCER = "inq_kernels"
VERSION_KEY, _MANIFEST_KEY, _DIGEST_KEY = "inq_format_version", "inq_manifest", "inq_manifest_sha256"
_CONFIG_KEY = "inq_config"
_FORMAT_KEYS = {"bits": "bits", "levels": "levels", "granularity": "exponent_granularity", "exponent": "exponent_rule"}
_PLAIN_ENTRY = {"sha256", "dtype", "shape"}
_PACKED_ENTRY = {*_PLAIN_ENTRY, *_FORMAT_KEYS.values(), "exponent_range"}
_DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in files.DTYPES.values()}
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,250}\.safetensors")
# A weight is checked and counted in pieces of about this many codes, a multiple of 8: each takes many bytes meanwhile.
_CHUNK = 1 << 22

# What load without a model returns: name → value.
Entries = dict[str, "PackedWeight | Tensor"]


@dataclass(frozen=True)
class Entry:
    """What the manifest says of one tensor. ``format`` and ``exponents`` (least, largest) only for packed weights,
    whose ``shape`` and ``dtype`` are those of the weight before packing; ``coding`` where codes are entropy-coded."""

    sha256: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    format: Format | None = None
    exponents: tuple[int, int] | None = None
    coding: Coding | None = None


def module_name(weight: str) -> str:
    """The module that a tensor ``NAME.weight`` belongs to: NAME, or "" for the model itself."""
    return weight.removesuffix("weight").removesuffix(".")


def is_weight(name: str) -> bool:
    # ".weight" would be of the same module as "weight".
    return name == "weight" or (name.endswith(".weight") and name != ".weight")


def part_names(weight: str) -> tuple[str, str, str]:
    """The names of a packed weight's tensors; the last is optional."""
    return weight, f"{weight}_exp", f"{weight}_scale"


def some(names: Iterable[str], limit: int = 8) -> str:
    """A few of ``names``, for a message."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more


# --- packed weights: what is checked before they are written and after they are read ----------------------------------


def row_chunks(packed: PackedWeight) -> Iterator[slice]:
    rows = max(1, _CHUNK // max(packed.k, 1))
    for start in range(0, packed.shape[0], rows):
        yield slice(start, start + rows)


def code_pieces(packed: PackedWeight) -> Iterator[PackedWeight]:
    """Some rows at a time, without their scales, or a part of one."""
    fmt, columns = packed.format, min(packed.k, _CHUNK)
    for rows in row_chunks(packed):
        for first in range(0, packed.k, columns):
            k = min(columns, packed.k - first)
            weight = packed.weight[rows, first // 8 * fmt.bits :][:, : fmt.row_bytes(k)]
            yield PackedWeight(weight, packed.weight_exp[rows], None, fmt, (weight.shape[0], k))


def _invalid_codes(packed: PackedWeight) -> int:
    """How many codes are not canonical. The compiled library decodes and encodes them first, many times faster than
    they are looked at one by one: what comes back the same is canonical."""
    weight, n1, fmt = packed.weight, packed.weight_exp, packed.format
    # Of rows whose smallest levels do not exist, the definition alone is asked.
    if cpu.unavailable() is None and weight.device.type == "cpu" and fmt.n2(int(n1.min())) >= N1_MIN:
        values = torch.ops.inq.unpack(weight, n1, None, packed.k, fmt.bits, fmt.levels, torch.float32)
        if torch.equal(torch.ops.inq.pack(values, n1, fmt.bits, fmt.levels), weight):
            return 0
    return reference.invalid_codes(weight, n1, packed.k, fmt)


def check_packed(path: Path, name: str, packed: PackedWeight, dtype: torch.dtype = torch.float32) -> None:
    """A CheckpointError unless exponents are those of ``dtype``, all codes canonical and all row scales finite."""
    weight, weight_exp, weight_scale = (f"{path}: tensor {part!r}" for part in part_names(name))
    if 0 in packed.shape:
        raise CheckpointError(f"{weight}: expected a weight with elements, got shape {list(packed.shape)}")
    low, high = int(packed.weight_exp.min()), int(packed.weight_exp.max())
    least, largest = reference.exponent_limits(dtype)
    if low < least or high > largest:
        raise CheckpointError(f"{weight_exp}: expected exponents in [{least}, {largest}], got [{low}, {high}]")
    bad = sum(map(_invalid_codes, code_pieces(packed)))
    if bad:
        raise CheckpointError(
            f"{weight}: expected canonical codes of {packed.format} and zero padding, got {bad} that are not"
        )
    scale = packed.weight_scale
    if scale is not None and (bad := scale.numel() - int(torch.isfinite(scale).sum())):
        raise CheckpointError(f"{weight_scale}: expected finite row scales, got {bad} of {scale.numel()} that are not")


# --- writing ----------------------------------------------------------------------------------------------------------


def format_json(fmt: Format) -> dict[str, object]:
    return {key: getattr(fmt, field) for field, key in _FORMAT_KEYS.items()}


def version_of(compress: bool) -> int:
    """The format version of files that are written so."""
    return COMPRESSED_VERSION if compress else FORMAT_VERSION


def config(formats: Mapping[str, Format], ignore: Iterable[str], compress: bool = False) -> dict[str, object]:
    """The configuration as JSON: ``formats`` of the packed modules by name (at least one), and ``ignore``, the names of
    those that stayed float; ``compress`` as in ``write_file``."""
    from . import __version__

    default = Counter(formats.values()).most_common(1)[0][0]
    return {
        "quant_method": "inq",
        "format_version": version_of(compress),
        **format_json(default),
        "ignore": sorted(ignore),
        "overrides": {name: format_json(fmt) for name, fmt in sorted(formats.items()) if fmt != default},
        # Of two parts: vLLM reads the name of whoever made a configuration, whatever its method.
        "producer": {"name": _PRODUCER, "version": __version__},
    }


def _pieces(path: Path, name: str, packed: PackedWeight) -> dict[str, Tensor]:
    if not is_weight(name):
        raise CheckpointError(f"{path}: tensor {name!r}: expected a packed weight's name to end in 'weight'")
    pieces = {name: prepack(packed, STORAGE).weight, f"{name}_exp": packed.weight_exp}
    if packed.weight_scale is not None:
        pieces[f"{name}_scale"] = packed.weight_scale
    return pieces


def write_file(
    path: Path,
    entries: Mapping[str, PackedWeight | Tensor],
    dtypes: Mapping[str, torch.dtype],
    configuration: Mapping[str, object] | None = None,
    compress: bool = False,
) -> None:
    """Write one file of the format: ``entries`` by name, packed weights with their dtype before packing in ``dtypes``
    (else float32), and in a file that stands alone its configuration. ``compress``: with entropy-coded codes, where
    that is smaller.

    Raises:
        CheckpointError: a name that files cannot have, or codes that are not canonical. And ``write_safetensors``'s.
        ImportError: to compress needs zstandard.
    """
    if compress:
        compression.check_available(str(path))
    tensors: dict[str, Tensor] = {}
    manifest: dict[str, dict[str, object]] = {}
    for name, value in entries.items():
        files.check_name(str(path), name)
        pieces = {name: value}
        if isinstance(value, PackedWeight):
            pieces = _pieces(path, name, value)
        elif _looks_packed(name, {part: getattr(entries.get(part), "dtype", None) for part in part_names(name)}):
            raise CheckpointError(
                f"{path}: tensor {name!r}: expected a packed weight, since {name + '_exp'!r} is there, got a plain one"
            )
        if taken := pieces.keys() & tensors.keys():
            raise CheckpointError(f"{path}: expected each tensor once, got {some(taken)} twice")
        pieces = {key: files.plain(f"{path}: tensor {key!r}", piece) for key, piece in pieces.items()}
        for key, piece in pieces.items():
            tensors[key] = piece
            manifest[key] = {
                "sha256": files.sha256(piece),
                "dtype": _dtype_name(piece.dtype),
                "shape": list(piece.shape),
            }
        if isinstance(value, PackedWeight):
            exponents = pieces[f"{name}_exp"]
            dtype = dtypes.get(name, torch.float32)
            stored = PackedWeight(pieces[name], exponents, pieces.get(f"{name}_scale"), value.format, value.shape)
            check_packed(path, name, stored, dtype)
            manifest[name] |= {
                "dtype": _dtype_name(dtype),
                "shape": list(value.shape),
                **format_json(value.format),
                "exponent_range": [int(exponents.min()), int(exponents.max())],
            }
            if compress and (
                coded := compression.encode(f"{path}: tensor {name!r}", pieces[name], value.shape, value.format)
            ):
                tensors[name], coding = coded
                manifest[name] |= {"sha256": files.sha256(tensors[name]), "coding": coding.to_json()}
    text = json.dumps(manifest, separators=(",", ":"))
    metadata = {
        "format": "pt",
        VERSION_KEY: str(version_of(compress)),
        _MANIFEST_KEY: text,
        _DIGEST_KEY: hashlib.sha256(text.encode()).hexdigest(),
    }
    if configuration is not None:
        metadata[_CONFIG_KEY] = json.dumps(configuration)
    files.write_safetensors(path, tensors, metadata)


def _looks_packed(name: str, dtypes: Mapping[str, torch.dtype | None]) -> bool:
    """Whether a tensor that the manifest calls plain would be a packed weight without it."""
    return is_weight(name) and dtypes[name] == torch.uint8 and dtypes.get(f"{name}_exp") == torch.int8


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def json_text(value: object) -> str:
    """``value`` as people and diffs like it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def stays_float(name: str, value: PackedWeight | Tensor) -> bool:
    """Whether a tensor of a file looks like the weight of a Linear or a convolution that was not packed."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() in (2, 3, 4, 5) and is_weight(name)


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers, manifests and configuration have been checked, and whose tensors are still on disk.

    ``headers`` by file; ``manifest`` by tensor; ``config`` as in inq.json.
    """

    path: Path
    headers: dict[Path, Header]
    manifest: dict[str, Entry]
    config: dict[str, object]

    @cached_property
    def file_of(self) -> dict[str, Path]:
        """The file of each tensor."""
        return {name: file for file, header in self.headers.items() for name in header.tensors}

    @cached_property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """For each packed weight the names of its tensors: weight, weight_exp and perhaps weight_scale."""
        return {
            name: tuple(n for n in part_names(name) if n in self.manifest)
            for name, entry in self.manifest.items()
            if entry.format is not None
        }

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Packed weights and other tensors, without the exponents and scales that belong to packed weights."""
        absorbed = {part for parts in self.parts.values() for part in parts[1:]}
        return tuple(name for name in self.manifest if name not in absorbed)

    def entries(self, file: Path | None = None) -> Iterator[tuple[str, PackedWeight | Tensor]]:
        """Read and check one value at a time, of one file or of all; checksums, exponents, codes and scales."""
        checksums = {name: entry.sha256 for name, entry in self.manifest.items()}
        for path in self.headers if file is None else [file]:
            with files.open_tensors(path, self.headers[path], checksums) as get:
                for name in self.names:
                    if self.file_of[name] == path:
                        yield name, self._value(name, path, get, checksums)

    def _value(
        self, name: str, path: Path, get: Callable[[str], Tensor], checksums: Mapping[str, str]
    ) -> PackedWeight | Tensor:
        entry = self.manifest[name]
        if entry.format is None:
            return get(name)
        tensors: list[Tensor | None] = []
        for part in self.parts[name]:
            other = self.file_of[part]
            if other == path:
                tensors.append(get(part))
            else:  # other programs split shards by size alone
                tensors.append(files.read_tensors(other, self.headers[other], checksums, [part])[part])
        weight, weight_exp, weight_scale = [*tensors, None][:3]
        where = f"{path}: tensor {name!r}"
        if entry.coding is not None:
            weight = compression.decode(where, weight, entry.coding, entry.shape, entry.format)
        found = (int(weight_exp.min()), int(weight_exp.max()))
        packed = PackedWeight(weight, weight_exp, weight_scale, entry.format, entry.shape)
        check_packed(path, name, packed, entry.dtype)
        if found != entry.exponents:
            raise CheckpointError(
                f"{where}: exponent_range: expected {list(entry.exponents)} of the manifest, got {list(found)}"
            )
        return packed


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Check all of a checkpoint that can be checked without its tensors. Raises CheckpointError, OSError."""
    path = Path(path)
    if path.is_dir() and path.suffix != ".safetensors":
        headers = {file: files.read_header(file) for file in model_files(path)}
        where, configuration = _directory_config(path)
    else:
        check_suffix(path)
        header = files.read_header(path)
        headers = {path: header}
        where = f"{path}: {_CONFIG_KEY}"
        _check_is_inq(path, header)
        if _CONFIG_KEY not in header.metadata:
            raise CheckpointError(f"{where}: expected in the header's metadata, got none: load the directory instead")
        configuration = files.parse_json(header.metadata[_CONFIG_KEY], where)
    # The version first: of a newer format nothing else needs to make sense.
    check_version(where, configuration)
    manifest: dict[str, Entry] = {}
    for file, header in headers.items():
        version = _check_is_inq(file, header)
        if version != configuration["format_version"]:
            raise CheckpointError(
                f"{file}: {VERSION_KEY}: expected format version {configuration['format_version']} of {where}, "
                f"got {version}"
            )
        manifest |= _manifest(file, header)
    checkpoint = Checkpoint(path, headers, manifest, configuration)
    for name, entry in manifest.items():
        _check_parts(checkpoint, name, entry)
    _check_config(where, configuration, checkpoint)
    if any(entry.coding is not None for entry in manifest.values()):
        compression.check_available(str(path))
    return checkpoint


def check_suffix(path: Path) -> None:
    """A CheckpointError unless ``path`` ends in .safetensors: a file is never opened to find out what it might be."""
    if path.suffix == ".safetensors":
        return
    if path.suffix.lower() in files.PICKLE_SUFFIXES:
        files.read_header(path)  # has the message
    files.check_regular(path)
    raise CheckpointError(f"{path}: expected a name ending in .safetensors or a directory, got {path.suffix!r}")


def folder_root(directory: Path) -> Path:
    """What links in ``directory`` may lead to: itself, or the model's own folder of the Hugging Face cache, where
    snapshots/REVISION holds links into blobs."""
    real = Path(os.path.realpath(directory))
    return real.parent.parent if real.parent.name == "snapshots" else real


def model_files(directory: Path) -> list[Path]:
    """The safetensors files of a model's directory: model.safetensors, or those that its index names, in its order.

    Raises:
        CheckpointError: there are none or both, or the index and the files do not agree, or a link leads out.
    """
    single, index = directory / MODEL_FILE, directory / INDEX_FILE
    if os.path.lexists(single) and os.path.lexists(index):
        raise CheckpointError(f"{directory}: expected {MODEL_FILE} or {INDEX_FILE}, got both")
    root = folder_root(directory)
    if os.path.lexists(single):
        files.check_regular(single, root)
        return [single]
    if not os.path.lexists(index):
        others = [name for name in os.listdir(directory) if Path(name).suffix.lower() in files.PICKLE_SUFFIXES]
        hint = f" (pickles are never opened: {some(others)})" if others else ""
        raise CheckpointError(f"{directory}: expected {MODEL_FILE} or {INDEX_FILE}, got neither{hint}")
    files.check_regular(index, root)
    return _index_files(index, root)


def _index_files(index: Path, root: Path) -> list[Path]:
    content = files.read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map: expected an object from tensor to file, got {type(weight_map)}")
    by_file: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _SHARD.fullmatch(file):
            raise CheckpointError(
                f"{index}: tensor {name!r}: expected the base name of a .safetensors file, got {str(file)[:80]!r}"
            )
        by_file.setdefault(file, set()).add(name)
    for file, names in by_file.items():
        path = index.with_name(file)
        files.check_regular(path, root)
        found = set(files.read_header(path).tensors)
        if found != names:
            raise CheckpointError(
                f"{path}: expected the tensors that {index.name} names, "
                f"missing {some(names - found) or 'none'}; got besides {some(found - names) or 'none'}"
            )
    return [index.with_name(file) for file in by_file]


def _directory_config(directory: Path) -> tuple[str, object]:
    root = folder_root(directory)
    found = []
    own, theirs = directory / CONFIG_FILE, directory / TRANSFORMERS_CONFIG
    if os.path.lexists(own):
        files.check_regular(own, root)
        found.append((str(own), files.read_json(own)))
    if os.path.lexists(theirs):
        files.check_regular(theirs, root)
        content = files.read_json(theirs, allow_nan=True)
        if isinstance(content, dict) and content.get(QUANTIZATION_CONFIG) is not None:
            found.append((f"{theirs}: {QUANTIZATION_CONFIG}", content[QUANTIZATION_CONFIG]))
    if not found:
        raise CheckpointError(
            f"{directory}: expected {CONFIG_FILE}, or {QUANTIZATION_CONFIG} in {TRANSFORMERS_CONFIG}, got neither: "
            "not an inq checkpoint"
        )
    if len(found) == 2 and found[0][1] != found[1][1]:
        raise CheckpointError(f"{found[0][0]}: expected the same as {found[1][0]}, got another configuration")
    return found[0]


def _check_is_inq(path: Path, header: Header, newest: int = COMPRESSED_VERSION) -> int:
    """The format version of a file of ours, which is ``newest`` at most."""
    version = header.metadata.get(VERSION_KEY)
    if version is None:
        raise CheckpointError(
            f"{path}: expected an inq file, got plain safetensors without {VERSION_KEY} (`inq quantize` makes one)"
        )
    number = int(version) if re.fullmatch(r"[0-9]{1,9}", version) else version
    return _check_version_number(f"{path}: {VERSION_KEY}", number, newest)


def _check_version_number(where: str, version: object, newest: int) -> int:
    from . import __version__

    if not files.is_int(version, 1, 10**9):
        raise CheckpointError(f"{where}: expected an integer ≥ 1, got {version!r}")
    if version > COMPRESSED_VERSION:
        raise CheckpointError(
            f"{where}: expected format version {COMPRESSED_VERSION} at most, which inq_kernels {__version__} reads, "
            f"got {version}: a newer inq_kernels is needed"
        )
    if version > newest:
        raise CheckpointError(
            f"{where}: expected format version {newest} at most, got {version}, whose codes may be entropy-coded: "
            "`inq save SRC OUT` writes them plain again"
        )
    return version


def check_version(where: str, configuration: object, newest: int = COMPRESSED_VERSION) -> None:
    """That a configuration is of this method, and of a format version of ``newest`` at most."""
    if not isinstance(configuration, dict):
        raise CheckpointError(f"{where}: expected an object, got {type(configuration).__name__}")
    if (method := configuration.get("quant_method")) != "inq":
        raise CheckpointError(f"{where}: quant_method: expected 'inq', got {method!r}")
    _check_version_number(f"{where}: format_version", configuration.get("format_version"), newest)


def read_format(where: str, values: Mapping[str, object]) -> Format:
    try:
        return Format(**{field: values.get(key) for field, key in _FORMAT_KEYS.items()})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from None


def _manifest(path: Path, header: Header) -> dict[str, Entry]:
    """The manifest of one file, compared with its header."""
    where = f"{path}: {_MANIFEST_KEY}"
    text = header.metadata.get(_MANIFEST_KEY, "")
    if (got := hashlib.sha256(text.encode()).hexdigest()) != header.metadata.get(_DIGEST_KEY):
        raise CheckpointError(f"{where}: expected sha256 {header.metadata.get(_DIGEST_KEY)!r}, got {got!r}")
    content = files.parse_json(text, where)
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: expected an object, got {type(content).__name__}")
    if set(content) != set(header.tensors):
        missing, more = set(header.tensors) - set(content), set(content) - set(header.tensors)
        raise CheckpointError(
            f"{where}: expected one entry a tensor, missing {some(missing) or 'none'}; "
            f"got besides {some(more) or 'none'}"
        )
    manifest = {}
    version = header.metadata[VERSION_KEY]
    for name, value in content.items():
        manifest[name] = entry = _entry(f"{where}: tensor {name!r}", value)
        if entry.coding is not None and int(version) < COMPRESSED_VERSION:
            raise CheckpointError(f"{where}: tensor {name!r}: expected no coding in format version {version}, got one")
        info = header.tensors[name]
        if entry.format is None and (entry.dtype, entry.shape) != (info.dtype, info.shape):
            raise CheckpointError(
                f"{path}: tensor {name!r}: expected {entry.dtype} {list(entry.shape)} of the manifest, "
                f"got {info.dtype} {list(info.shape)}"
            )
    return manifest


def _entry(where: str, value: object) -> Entry:
    if not isinstance(value, dict) or set(value) not in (_PLAIN_ENTRY, _PACKED_ENTRY, {*_PACKED_ENTRY, "coding"}):
        keys = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise CheckpointError(f"{where}: expected the keys of a plain or of a packed tensor, got {keys}")
    checksum, dtype_name = files.check_sha256(where, value["sha256"]), value["dtype"]
    dtype = _DTYPE_NAMES.get(dtype_name) if isinstance(dtype_name, str) else None
    packed = len(value) > len(_PLAIN_ENTRY)
    if dtype is None or (packed and dtype not in ops.FLOATS):
        raise CheckpointError(f"{where}: dtype: expected a known {'float ' * packed}dtype, got {dtype_name!r}")
    shape = files.check_shape(where, value["shape"])
    if not packed:
        return Entry(checksum, dtype, shape)
    if not shape or 0 in shape:
        raise CheckpointError(f"{where}: shape: expected rank ≥ 1 and no 0, got {list(shape)}")
    bounds = value["exponent_range"]
    if (
        not isinstance(bounds, list)
        or len(bounds) != 2
        or not all(files.is_int(b, N1_MIN, N1_MAX) for b in bounds)
        or bounds[0] > bounds[1]
    ):
        raise CheckpointError(
            f"{where}: exponent_range: expected [least, largest] within [{N1_MIN}, {N1_MAX}], got {bounds!r}"
        )
    fmt = read_format(where, value)
    coding = compression.read_coding(where, value["coding"], fmt.bits) if "coding" in value else None
    return Entry(checksum, dtype, shape, fmt, (bounds[0], bounds[1]), coding)


def _check_parts(checkpoint: Checkpoint, name: str, entry: Entry) -> None:
    """That a packed weight has its parts, in the dtypes and shapes that follow from its logical shape."""
    stored = {n: checkpoint.headers[file].tensors[n] for n in part_names(name) if (file := checkpoint.file_of.get(n))}
    where = f"{checkpoint.file_of[name]}: tensor {name!r}"
    if entry.format is None:
        if _looks_packed(name, {part: info.dtype for part, info in stored.items()}):
            raise CheckpointError(f"{where}: expected its format in the manifest, since weight_exp is there, got none")
        return
    if not is_weight(name):
        raise CheckpointError(f"{where}: expected a packed weight's name to end in 'weight'")
    n, k = entry.shape[0], math.prod(entry.shape[1:])
    codes = (n, entry.format.row_bytes(k))
    if entry.coding is not None:
        codes = (compression.stored_bytes(entry.coding, entry.shape, entry.format),)
    expected = {
        name: (torch.uint8, codes),
        f"{name}_exp": (torch.int8, (n, 1)),
        f"{name}_scale": (torch.float32, (n, 1)),
    }
    if f"{name}_exp" not in stored:
        raise CheckpointError(f"{where}: expected its exponents {name + '_exp'!r} in the checkpoint, got none")
    coded = "" if entry.coding is None else f", in streams of {list(entry.coding.streams)} bytes"
    for part, info in stored.items():
        dtype, shape = expected[part]
        if (info.dtype, info.shape) != (dtype, shape) or (
            part != name and checkpoint.manifest[part].format is not None
        ):
            raise CheckpointError(
                f"{checkpoint.file_of[part]}: tensor {part!r}: expected {dtype} {list(shape)} for a weight of shape "
                f"{list(entry.shape)} in {entry.format}{coded}, got {info.dtype} {list(info.shape)}"
            )


def _check_config(where: str, configuration: Mapping[str, object], checkpoint: Checkpoint) -> None:
    """That the configuration says of every packed weight what the manifest says."""
    default = read_format(where, configuration)
    overrides, ignore = configuration.get("overrides", {}), configuration.get("ignore", [])
    if not isinstance(overrides, dict) or not all(isinstance(value, dict) for value in overrides.values()):
        raise CheckpointError(f"{where}: overrides: expected an object of objects, got {str(overrides)[:80]}")
    if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
        raise CheckpointError(f"{where}: ignore: expected a list of names, got {str(ignore)[:80]}")
    if not checkpoint.parts:
        raise CheckpointError(f"{checkpoint.path}: expected at least one packed weight, got none")
    packed = {module_name(name): name for name in checkpoint.parts}
    if strange := set(overrides) - set(packed):
        raise CheckpointError(f"{where}: overrides: expected names of packed modules, got {some(strange)}")
    if both := set(ignore) & set(packed):
        raise CheckpointError(f"{where}: ignore: expected names of modules that are not packed, got {some(both)}")
    for module, name in packed.items():
        expected = read_format(f"{where}: overrides: {module!r}", overrides[module]) if module in overrides else default
        got = checkpoint.manifest[name].format
        if got != expected:
            raise CheckpointError(
                f"{checkpoint.file_of[name]}: tensor {name!r}: expected {expected} of the configuration, got {got}"
            )
