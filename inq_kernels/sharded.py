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
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import files, training
from .distributed import Ranks, flat_bits, is_sharded, local_part, reshard, row_bits, unwrapped
from .files import CheckpointError
from .inq import INQ
from .sharded_files import SHARD, VERSION, Saved, check_shards, checked_manifest, file_sha256, open_sharded

_SAVE, _LOAD = "inq.save_sharded", "inq.load_sharded"
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
        path: a directory, whose parent must exist; an older checkpoint of this function there is replaced in one step.
        model, optimizer, run, extra: as for ``save_training``; the model may be in DistributedDataParallel.

    Raises:
        TypeError, ValueError: the state holds something else, or too much, or ranks hold different things, or the run
            is no ``inq.INQ``. OSError: a file could not be written. PeerError: that happened on another rank. The old
            checkpoint is still there then.
    """
    _check_run(_SAVE, run)
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
            files.write_directory(path, fill, training=True)
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
            belongs to another model, optimizer or run. TypeError: the run is no ``inq.INQ``. OSError: it
            cannot be read. PeerError: one of these happened on another rank. Nothing is changed then, on any rank.
    """
    _check_run(_LOAD, run)
    ranks, model = Ranks(), unwrapped(model)
    where = f"{path}: {files.TRAINING_INDEX}"
    with training.checking(path, _SAVE):
        with ranks.together(_LOAD):
            reshard(model)
            saved = open_sharded(Path(path), ranks)
            blank = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in saved.all.items()}
            state = _decoded(saved.state, where, blank)
            training.check_model(path, model, state["model"])
            training.check_optimizer(path, model, optimizer, state["optimizer"])
            targets = _targets(blank, saved, state, model, optimizer, run)
        _read(Path(path), targets, ranks)
        with ranks.together(_LOAD):
            for name, t in targets.items():
                files.check_bool(f"{path}: tensor {name!r}", local_part(t))
            tensors = {name: t if saved.all[name][1] else t.reshape(()) for name, t in targets.items()}
            state = _decoded(saved.state, where, tensors)
            own = training.decode(saved.own, f"{path}: rank's own", tensors)
            for name, layer in state["inq"]["layers"].items():
                _flatten_masks(f"{where}: layer {name!r}", layer, run.rows.get(name) is None)
            run.check_state(state["inq"])
            # On another number of ranks there is none of this rank's own.
            state["rng"] = own["rng"] if saved.world_size == ranks.size else training.rng_state()
            training.check_rng_state(state["rng"])
            extra = own["extra"]
    with training.taking_over(path, model, optimizer, run):
        with ranks.together(_LOAD):
            training.take_over_values(model, optimizer, state)
        # Its collectives need all ranks: none of them may have failed before.
        with ranks.together(_LOAD):
            training.take_over_run(run, state)
    return extra


# --- the state --------------------------------------------------------------------------------------------------------


def _check_run(who: str, run: INQ) -> None:
    if not isinstance(run, INQ):
        raise TypeError(f"{who}: run: expected an inq.INQ, got {type(run).__name__}: save_training is for others")


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


def _flatten_masks(where: str, layer: dict, whole: bool) -> None:
    shape = files.check_shape(where, layer["shape"])
    if not shape:
        raise CheckpointError(f"{where}: shape: expected a dimension at least, got none")
    for key in ("mask", "keep"):
        if whole and (mask := layer[key]) is not None:
            if mask.dtype != torch.uint8 or list(mask.shape) != [shape[0], -(-math.prod(shape[1:]) // 8)]:
                raise ValueError(
                    f"{where}: {key}: expected one for a weight of {list(shape)}, got {mask.dtype} {list(mask.shape)}"
                )
            layer[key] = flat_bits(mask, shape)


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
    saved: Saved,
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
        sums = {shard.name: file_sha256(shard) for shard in mine}
        files.write_text(folder / f"rank-{ranks.rank:05d}.json", json.dumps({**alone, "files": sums}, allow_nan=False))
    if ranks.rank:
        return
    known, described = {}, dict(everything["tensors"])
    for rank in range(ranks.size):
        name = f"rank-{rank:05d}.json"
        content = files.read_json(folder / name)
        known |= {name: file_sha256(folder / name), **content["files"]}
        described |= content["tensors"]
    # What torch wrote is what was asked for: the old checkpoint is still there.
    shards = sorted(name for name in known if SHARD.fullmatch(name))
    check_shards(folder, shards, checked_manifest(str(folder), described))
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
