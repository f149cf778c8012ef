"""The files of a sharded training checkpoint, checked: that a directory holds exactly what its index says, before any
tensor of it is read. ``sharded.py`` writes them and takes over what they hold.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import files
from .distributed import Ranks
from .files import CheckpointError

VERSION = 1
SHARD = re.compile(r"shard-\d{5}-model-00001-of-00001\.safetensors")
RANK = re.compile(r"rank-\d{5}\.json")


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class Saved:
    """A checkpoint whose files are as they should be: whose tensors, and what is encoded of them."""

    world_size: int
    all: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    wanted: list[str]  # those that this rank reads
    state: Any
    own: Any


def open_sharded(path: Path, ranks: Ranks) -> Saved:
    """The checkpoint, after every check of its files that needs no tensor; each rank hashes its share of them."""
    where = f"{path}: {files.TRAINING_INDEX}"
    index = files.read_json(path / files.TRAINING_INDEX)
    if not isinstance(index, dict) or not files.is_int(index.get("inq_sharded_version"), 0, 1 << 31):
        raise CheckpointError(f"{where}: expected the index of a checkpoint of inq.save_sharded, got another file")
    if (version := index["inq_sharded_version"]) != VERSION:
        raise CheckpointError(f"{where}: inq_sharded_version: expected {VERSION}, got {version}")
    text = index.get("content")
    if not isinstance(text, str) or hashlib.sha256(text.encode()).hexdigest() != index.get("sha256"):
        raise CheckpointError(f"{where}: content: expected the text that its sha256 names, got another")
    content = files.parse_json(text, where)
    if not isinstance(content, dict) or set(content) != {"world_size", "state", "tensors", "files"}:
        raise CheckpointError(f"{where}: content: expected world_size, state, tensors and files, got something else")
    size = content["world_size"]
    if not files.is_int(size, 1, 1 << 17):
        raise CheckpointError(f"{where}: world_size: expected an int of at least 1, got {size!r}")
    tensors = checked_manifest(where, content["tensors"])
    known = content["files"]
    if not isinstance(known, dict) or not all(isinstance(v, str) for v in known.values()):
        raise CheckpointError(f"{where}: files: expected names and checksums, got something else")
    if bad := [name for name in known if not (SHARD.fullmatch(name) or RANK.fullmatch(name))]:
        raise CheckpointError(f"{where}: files: expected names as inq.save_sharded gives them, got {bad[0]!r}")
    shards = sorted(name for name in known if SHARD.fullmatch(name))
    # torch's reader takes whatever safetensors file it finds.
    if (found := sorted(file.name for file in path.glob("*.safetensors"))) != shards:
        raise CheckpointError(f"{path}: expected the files {shards}, got {found}")
    check_shards(path, shards, tensors)
    rank = ranks.rank if size == ranks.size else 0
    own_file = f"rank-{rank:05d}.json"
    if own_file not in known:
        raise CheckpointError(f"{where}: files: expected {own_file} among them, got none")
    for name in {own_file, *shards[ranks.rank :: ranks.size]}:
        files.check_regular(path / name, root=path)
        if (got := file_sha256(path / name)) != known[name]:
            raise CheckpointError(f"{path / name}: expected sha256 {known[name]}, got {got}: damaged data")
    own = files.read_json(path / own_file)
    wanted = [name for name in tensors if name.startswith(("t.", f"rank.{rank}."))]
    return Saved(size, tensors, wanted, content["state"], own["state"])


def checked_manifest(where: str, manifest: Any) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{where}: tensors: expected an object, got {type(manifest).__name__}")
    result = {}
    for name, entry in manifest.items():
        files.check_name(where, name)
        if not isinstance(entry, list) or len(entry) != 2 or entry[0] not in files.DTYPES:
            raise CheckpointError(f"{where}: tensors: {name}: expected a dtype and a shape, got {entry!r}")
        result[name] = (files.DTYPES[entry[0]], files.check_shape(f"{where}: tensors: {name}", entry[1]))
    return result


def check_shards(path: Path, shards: Sequence[str], tensors: Mapping[str, tuple]) -> None:
    """The parts in all files make up the tensors of the manifest: exactly, without a hole or an overlap."""
    parts: dict[str, list[tuple[tuple, tuple]]] = {name: [] for name in tensors}
    for shard in shards:
        files.check_regular(path / shard, root=path)
        header = files.read_header(path / shard)
        where = f"{path / shard}: DCP_SHARDING_INFO"
        places = files.parse_json(header.metadata.get("DCP_SHARDING_INFO", ""), where)
        if not isinstance(places, dict) or set(places) != set(header.tensors):
            raise CheckpointError(f"{where}: expected an entry for each of {len(header.tensors)} tensors")
        for name, info in header.tensors.items():
            dtype, shape = tensors.get(name, (None, ()))
            rank = max(len(shape), 1)
            begin = places[name].get("saved_offsets") if isinstance(places[name], dict) else None
            if dtype != info.dtype or len(info.shape) != rank:
                raise CheckpointError(f"{path / shard}: tensor {name!r}: expected {dtype} of {list(shape)}, "
                                      f"got {info.dtype} of {list(info.shape)}")  # fmt: skip
            if not isinstance(begin, list) or len(begin) != rank:
                raise CheckpointError(f"{where}: {name}: expected {rank} saved_offsets, got {begin!r}")
            inside = zip(begin, info.shape, shape or (1,), strict=True)
            if not all(files.is_int(b, 0, size) and b + length <= size for b, length, size in inside):
                raise CheckpointError(f"{where}: {name}: expected a part of {list(shape)}, got {begin}")
            parts[name].append((tuple(begin), info.shape))
    for name, (_, shape) in tensors.items():
        _check_cover(f"{path}: tensor {name!r}", shape or (1,), parts[name])


def _check_cover(where: str, shape: Sequence[int], parts: Sequence[tuple[tuple, tuple]]) -> None:
    parts = sorted(part for part in parts if math.prod(part[1]))
    if (held := sum(math.prod(length) for _, length in parts)) != math.prod(shape):
        raise CheckpointError(f"{where}: expected {math.prod(shape)} values in all files, got {held}")
    cut = {d for _, length in parts for d in range(len(shape)) if length[d] != shape[d]}
    # Parts along one dimension, which FSDP2 makes, can only overlap their neighbours.
    pairs = itertools.pairwise(parts) if len(cut) <= 1 else itertools.combinations(parts, 2)
    for (a, a_length), (b, b_length) in pairs:
        if all(x < y + m and y < x + n for x, n, y, m in zip(a, a_length, b, b_length, strict=True)):
            raise CheckpointError(f"{where}: expected parts that do not overlap, got {a} and {b}")
