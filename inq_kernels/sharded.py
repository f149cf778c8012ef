"""Training checkpoints of several processes: ``save_sharded`` and ``load_sharded``, a directory of safetensors files.

Every rank writes the parts of DTensors that it holds, by torch.distributed.checkpoint's safetensors writer, and rank 0
what all ranks hold alike. Only tensors go there: given anything else, that writer leaves files that nothing opens.
Numbers and strings are JSON: ``inq_training.json``, and a ``rank-….json`` for what each rank has of its own. There is
no pickle in the files. A checkpoint is replaced in one step, by rank 0, when all of the new one is on the disk.

The files do not depend on how the run is spread: a run of FSDP2 on 8 ranks goes on with 2, under
DistributedDataParallel, or in one process without torch.distributed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import files, training
from .distributed import Ranks, flat_bits, is_sharded, local_part, reshard, row_bits, unwrapped
from .files import CheckpointError
from .inq import INQ

VERSION = 1
_SAVE, _LOAD = "inq.save_sharded", "inq.load_sharded"
_SHARD = re.compile(r"shard-\d{5}-model-00001-of-00001\.safetensors")
_RANK = re.compile(r"rank-\d{5}\.json")
_DTYPE_NAMES = {dtype: name for name, dtype in files.DTYPES.items()}


def save_sharded(
    path: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: INQ,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """``save_training`` of a run on several ranks, with DTensors in parts: all that it needs to go on bit for bit.

    All ranks call it together, on a file system that they share. Values that all ranks hold (buffers, and parameters
    under DistributedDataParallel) are rank 0's; random states and ``extra`` are each rank's own.

    Args:
        path: a directory, whose parent must exist; an older checkpoint there is replaced in one step.
        model, optimizer, run, extra: as for ``save_training``; the model may be in DistributedDataParallel.

    Raises:
        TypeError, ValueError: the state holds something else, or too much, or ranks hold different things. OSError: a
            file could not be written. PeerError: that happened on another rank. The old checkpoint is still there then.
    """
    ranks, model = Ranks(), unwrapped(model)
    with ranks.together(_SAVE):
        reshard(model)
        tensors: dict[str, Tensor] = {}
        text = training.encode(_state_of(model, optimizer, run), "state", training.collector(tensors, "t"))
        own: dict[str, Tensor] = {}
        mine = {"rng": training.rng_state(), "extra": dict(extra or {})}
        own_text = training.encode(mine, "state", training.collector(own, f"rank.{ranks.rank}"))
        for encoded in (text, own_text):
            if (size := len(json.dumps(encoded))) > training.MAX_TEXT:
                raise ValueError(
                    f"{_SAVE}: state: expected at most {training.MAX_TEXT} bytes of numbers and strings, got {size}: "
                    "give large things to extra as tensors"
                )
        described = _describe(tensors)
    # Names are positions: they must mean the same on all ranks.
    what = hashlib.sha256(json.dumps(described).encode()).hexdigest()
    with ranks.together(_SAVE):
        if ranks.broadcast(what) != what:
            raise ValueError(f"{_SAVE}: state: expected tensors as rank 0's, got others on rank {ranks.rank}")
    everything = {"world_size": ranks.size, "state": text, "tensors": described}
    alone = {"state": own_text, "tensors": _describe(own)}

    def write(folder: Path) -> None:
        _write(folder, ranks, _writable({**tensors, **own}), everything, alone)

    with ranks.together(_SAVE):
        if ranks.rank:
            if not (name := ranks.broadcast("")):
                raise CheckpointError(f"{path}: expected rank 0 to make a directory, got an error there")
            write(Path(os.path.realpath(path)).with_name(name))
            return
        begun = False

        def fill(folder: Path) -> None:
            nonlocal begun
            begun = True
            ranks.broadcast(folder.name)
            write(folder)

        try:
            files.write_directory(path, fill)
        finally:
            if not begun:
                ranks.broadcast("")


def load_sharded(path: str | os.PathLike, model: nn.Module, optimizer: torch.optim.Optimizer, run: INQ) -> dict:
    """Take over what ``save_sharded`` wrote, into objects made with the same arguments, on any number of ranks.

    All ranks call it together. On as many ranks as saved it, the run goes on bit for bit; on another number, random
    states are left as they are, and every rank gets rank 0's ``extra``.

    Returns:
        This rank's ``extra``, tensors on the CPU.

    Raises:
        CheckpointError: a file is damaged, missing, not of such a checkpoint, or of a newer version. ValueError: it
            belongs to another model, optimizer or run. OSError: it cannot be read. PeerError: one of these happened on
            another rank. Nothing is changed then, on any rank.
    """
    ranks, model = Ranks(), unwrapped(model)
    where = f"{path}: {files.TRAINING_INDEX}"
    try:
        with ranks.together(_LOAD):
            reshard(model)
            saved = _open(Path(path), ranks)
            blank = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in saved.all.items()}
            state = _decoded(saved.state, where, blank)
            training.check_model(path, model, state["model"])
            training.check_optimizer(path, model, optimizer, state["optimizer"])
            targets = _targets(blank, saved, state, model, optimizer, run)
        _read(Path(path), targets, ranks)
        with ranks.together(_LOAD):
            tensors = {name: t if saved.all[name][1] else t.reshape(()) for name, t in targets.items()}
            state = _decoded(saved.state, where, tensors)
            own = training.decode(saved.own, f"{path}: rank's own", tensors)
            for name, layer in state["inq"]["layers"].items():
                _flatten_masks(layer, run.rows.get(name) is None)
            run.check_state(state["inq"])
            # On another number of ranks there is none of this rank's own.
            state["rng"] = own["rng"] if saved.world_size == ranks.size else training.rng_state()
            training.check_rng_state(state["rng"])
            extra = own["extra"]
    except training.MALFORMED as error:
        raise CheckpointError(f"{path}: expected a state as {_SAVE} writes it, got {error!r}") from error
    before = training.snapshot(model, optimizer, run)
    try:
        with ranks.together(_LOAD):
            training.take_over(model, optimizer, run, state)
    except BaseException as error:
        training.take_over(model, optimizer, run, before)
        if isinstance(error, training.MALFORMED):
            raise CheckpointError(f"{path}: expected a state that can be loaded, got {error!r}") from error
        raise
    return extra


# --- the state --------------------------------------------------------------------------------------------------------


def _state_of(model: nn.Module, optimizer: torch.optim.Optimizer, run: INQ) -> dict:
    """As ``save_training`` has it, but for what is each rank's own; masks by rows, however the weights are split."""
    values, inq = model.state_dict(), run.state_dict()
    for layer in inq["layers"].values():
        for key in ("mask", "keep"):
            if layer[key] is not None and not is_sharded(layer[key]):
                layer[key] = row_bits(layer[key], layer["shape"])
    return {
        "model": dict(values),
        "model_metadata": dict(getattr(values, "_metadata", {})),
        "optimizer": {
            "type": type(optimizer).__name__,
            "parameters": training.parameter_names(model, optimizer),
            "state": optimizer.state_dict(),
        },
        "inq": inq,
    }


def _flatten_masks(layer: dict, whole: bool) -> None:
    for key in ("mask", "keep"):
        if whole and (mask := layer[key]) is not None:
            n, *others = layer["shape"]
            if mask.dtype != torch.uint8 or list(mask.shape) != [n, -(-math.prod(others) // 8)]:
                raise ValueError(
                    f"{_LOAD}: {key}: expected one for a weight of {layer['shape']}, got {mask.dtype} {list(mask.shape)}"
                )
            layer[key] = flat_bits(mask, layer["shape"])


def _decoded(encoded: Any, where: str, tensors: Mapping[str, Tensor]) -> dict:
    state = training.decode(encoded, where, tensors)
    expected = {"model", "model_metadata", "optimizer", "inq"}
    if not isinstance(state, dict) or set(state) != expected:
        raise CheckpointError(f"{where}: state: expected the parts {sorted(expected)}, got something else")
    return state


def _describe(tensors: Mapping[str, Tensor]) -> dict[str, list]:
    """Name → [dtype, shape] of the whole tensor, for the manifest."""
    for tensor in tensors.values():
        part = local_part(tensor)
        if part.dtype not in _DTYPE_NAMES or part.layout != torch.strided or part.device.type == "meta":
            raise TypeError(
                f"{_SAVE}: expected dense tensors with values, of dtypes that files hold ({', '.join(files.DTYPES)}), "
                f"got {part.dtype} {list(part.shape)}, {part.layout} on {part.device}"
            )
    return {name: [_DTYPE_NAMES[tensor.dtype], list(tensor.shape)] for name, tensor in tensors.items()}


def _writable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As torch's writer takes them: contiguous, each in memory of its own, and with a dimension at least."""
    result, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        tensor = tensor.reshape(1) if tensor.dim() == 0 else tensor.contiguous()
        memory = local_part(tensor).untyped_storage().data_ptr()
        result[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return result


def _targets(
    blank: Mapping[str, Tensor],
    saved: _Saved,
    state: Mapping,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: INQ,
) -> dict[str, Tensor]:
    """Memory for what this rank reads: DTensors where its objects have them, else whole tensors on the CPU."""
    likes = {id(state["model"][name]): like for name, like in model.state_dict().items()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entry in state["optimizer"]["state"]["state"].items():
        for value in entry.values():
            if isinstance(value, Tensor) and value.shape == parameters[index].shape:
                likes[id(value)] = parameters[index]
    rows = {}
    for name, layer in state["inq"]["layers"].items():
        if (split := run.rows.get(name)) is not None:
            tensors = [layer[key] for key in ("mask", "keep", "codes", "n1") if isinstance(layer[key], Tensor)]
            rows |= {id(t): split for t in tensors if t.dim() == 2 and t.shape[0] == split.shape[0]}
    targets = {}
    for name in saved.wanted:
        value = blank[name]
        like, split = likes.get(id(value)), rows.get(id(value))
        if split is not None:
            targets[name] = split.wrap(torch.empty(split.count, value.shape[1], dtype=value.dtype))
        elif isinstance(like, Tensor) and is_sharded(like):
            targets[name] = torch.empty_like(like.detach(), dtype=value.dtype)
        else:
            targets[name] = torch.empty(value.shape or (1,), dtype=value.dtype)
    return targets


# --- the files --------------------------------------------------------------------------------------------------------


def _write(folder: Path, ranks: Ranks, tensors: dict[str, Tensor], everything: dict, alone: dict) -> None:
    """This rank's files in ``folder``, then, on rank 0, the index of all."""
    import torch.distributed.checkpoint as dcp

    with _torch_errors(folder, ranks):
        dcp.save(
            tensors,
            storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True),
            # What all ranks hold is rank 0's: batch norm's statistics differ between them.
            planner=dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True),
            no_dist=not ranks.joined,
        )
    with ranks.together(_SAVE):
        # None where this rank holds nothing of its own.
        mine = sorted(folder.glob(f"shard-{ranks.rank + 1:05d}-*.safetensors"))
        sums = {shard.name: _file_sha256(shard) for shard in mine}
        files.write_text(folder / f"rank-{ranks.rank:05d}.json", json.dumps({**alone, "files": sums}, allow_nan=False))
    if ranks.rank:
        return
    known, described = {}, dict(everything["tensors"])
    for rank in range(ranks.size):
        name = f"rank-{rank:05d}.json"
        content = files.read_json(folder / name)
        known |= {name: _file_sha256(folder / name), **content["files"]}
        described |= content["tensors"]
    # What torch wrote is what was asked for: the old checkpoint is still there.
    shards = sorted(name for name in known if _SHARD.fullmatch(name))
    _check_shards(folder, shards, _checked_manifest(str(folder), described))
    text = json.dumps({**everything, "tensors": described, "files": known}, allow_nan=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    index = json.dumps({"inq_sharded_version": VERSION, "sha256": digest, "content": text})
    if len(index) > files.MAX_JSON:
        raise ValueError(f"{_SAVE}: state: expected an index of at most {files.MAX_JSON} bytes, got {len(index)}")
    files.write_text(folder / files.TRAINING_INDEX, index)


def _read(path: Path, targets: dict[str, Tensor], ranks: Ranks) -> None:
    import torch.distributed.checkpoint as dcp

    with _torch_errors(path, ranks):
        dcp.load(targets, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=not ranks.joined)


@contextlib.contextmanager
def _torch_errors(path: Path, ranks: Ranks) -> Iterator[None]:
    """torch's CheckpointException, no Exception and raised on every rank, as OSError or CheckpointError."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            # One process alone is what was asked for.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0] != ranks.rank)
        if isinstance(cause, OSError):
            raise OSError(cause.errno, f"rank {rank}: {cause.strerror}", cause.filename or str(path)) from error
        raise CheckpointError(f"{path}: expected all ranks to succeed, got on rank {rank}: {cause!r}") from error


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Saved:
    """A checkpoint whose files are as they should be: whose tensors, and what is encoded of them."""

    world_size: int
    all: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    wanted: list[str]  # those that this rank reads
    state: Any
    own: Any


def _open(path: Path, ranks: Ranks) -> _Saved:
    """The checkpoint, after every check of its files that needs no tensor; each rank hashes its share of them."""
    where = f"{path}: {files.TRAINING_INDEX}"
    index = files.read_json(path / files.TRAINING_INDEX)
    if not isinstance(index, dict) or not files.is_int(index.get("inq_sharded_version"), 0, 1 << 31):
        raise CheckpointError(f"{where}: expected the index of a checkpoint of {_SAVE}, got another file")
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
    tensors = _checked_manifest(where, content["tensors"])
    known = content["files"]
    if not isinstance(known, dict) or not all(isinstance(v, str) for v in known.values()):
        raise CheckpointError(f"{where}: files: expected names and checksums, got something else")
    if bad := [name for name in known if not (_SHARD.fullmatch(name) or _RANK.fullmatch(name))]:
        raise CheckpointError(f"{where}: files: expected names as {_SAVE} gives them, got {bad[0]!r}")
    shards = sorted(name for name in known if _SHARD.fullmatch(name))
    # torch's reader takes whatever safetensors file it finds.
    if (found := sorted(file.name for file in path.glob("*.safetensors"))) != shards:
        raise CheckpointError(f"{path}: expected the files {shards}, got {found}")
    _check_shards(path, shards, tensors)
    rank = ranks.rank if size == ranks.size else 0
    own_file = f"rank-{rank:05d}.json"
    if own_file not in known:
        raise CheckpointError(f"{where}: files: expected {own_file} among them, got none")
    for name in {own_file, *shards[ranks.rank :: ranks.size]}:
        files.check_regular(path / name, root=path)
        if (got := _file_sha256(path / name)) != known[name]:
            raise CheckpointError(f"{path / name}: expected sha256 {known[name]}, got {got}: damaged data")
    own = files.read_json(path / own_file)
    wanted = [name for name in tensors if name.startswith(("t.", f"rank.{rank}."))]
    return _Saved(size, tensors, wanted, content["state"], own["state"])


def _checked_manifest(where: str, manifest: Any) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{where}: tensors: expected an object, got {type(manifest).__name__}")
    result = {}
    for name, entry in manifest.items():
        files.check_name(where, name)
        if not isinstance(entry, list) or len(entry) != 2 or entry[0] not in files.DTYPES:
            raise CheckpointError(f"{where}: tensors: {name}: expected a dtype and a shape, got {entry!r}")
        result[name] = (files.DTYPES[entry[0]], files.check_shape(f"{where}: tensors: {name}", entry[1]))
    return result


def _check_shards(path: Path, shards: Sequence[str], tensors: Mapping[str, tuple]) -> None:
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
