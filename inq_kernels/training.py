"""Training checkpoints: ``save_training`` and ``load_training``, one safetensors file, never pickle.

Tensors are the file's tensors; everything else of the state is one JSON text in its metadata, with a reference where a
tensor stood. Both are checked by SHA-256, and a file is replaced in one step, so that a process killed at any moment
leaves a checkpoint from which the run goes on bit for bit.
"""

from __future__ import annotations

import collections
import hashlib
import json
import math
import os
import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .files import CheckpointError, parse_json, read_header, read_tensors, sha256, write_safetensors
from .inq import INQ

VERSION = "1"

# Keys that stand for what JSON has no word for. A dict of the user's with such a key is written as items.
_TENSOR, _TUPLE, _ITEMS, _COUNTER, _FLOAT = "$tensor", "$tuple", "$items", "$counter", "$float"


def save_training(
    path: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: INQ,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write all that a run needs to go on bit for bit: model, optimizer, INQ with its LR schedulers, and torch's and
    Python's random states. The file is replaced in one step: it is always the old checkpoint or the new one, whole.

    Args:
        path: the file; its directory must exist.
        model, optimizer: anything with a ``state_dict`` of tensors, numbers, strings, lists and dicts.
        run: the ``inq.INQ``, at any moment of its loop.
        extra: the same kinds of values: epoch, step, a GradScaler's state, a data loader's generator state, …

    Raises:
        TypeError: the state holds something else; the message says where. OSError: the file could not be written; the
            old one is still there.
    """
    state = {
        "model": model.state_dict(),
        "optimizer": {"type": type(optimizer).__name__, "state": optimizer.state_dict()},
        "inq": run.state_dict(),
        "rng": _rng_state(),
        "extra": dict(extra or {}),
    }
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encode(state, "state", tensors), allow_nan=False)
    metadata = {
        "format": "pt",
        "inq_training_version": VERSION,
        "inq_training": text,
        "inq_training_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "inq_checksums": json.dumps({name: sha256(tensor) for name, tensor in tensors.items()}),
    }
    write_safetensors(path, tensors, metadata)


def load_training(path: str | os.PathLike, model: nn.Module, optimizer: torch.optim.Optimizer, run: INQ) -> dict:
    """Take over what ``save_training`` wrote, into objects made with the same arguments.

    ``for portion in run:`` then goes on with the portion in progress. torch's and Python's random states are set.

    Returns:
        ``extra``, tensors on the CPU.

    Raises:
        CheckpointError: the file is damaged, no training checkpoint, or of a newer version. ValueError: it belongs to
            another model, optimizer or run. Nothing is changed then. OSError: it cannot be read.
    """
    state = _read(path)
    try:
        _check_model(path, model, state["model"])
        _check_optimizer(path, optimizer, state["optimizer"])
        run.check_state(state["inq"])
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: expected a state as inq.save_training writes it, got {error!r}") from error
    optimizer.load_state_dict(state["optimizer"]["state"])
    model.load_state_dict(state["model"])
    run.load_state_dict(state["inq"])
    _set_rng_state(state["rng"])
    return state["extra"]


def _read(path: str | os.PathLike) -> dict:
    header = read_header(path)
    metadata = header.metadata
    version = metadata.get("inq_training_version")
    if version is None:
        raise CheckpointError(f"{path}: inq_training_version: expected a file of inq.save_training, got one without it")
    if version != VERSION:
        raise CheckpointError(f"{path}: inq_training_version: expected {VERSION!r}, got {version!r}")
    text = metadata.get("inq_training", "")
    if hashlib.sha256(text.encode()).hexdigest() != metadata.get("inq_training_sha256"):
        raise CheckpointError(f"{path}: inq_training: expected the text that its sha256 names, got another")
    checksums = parse_json(metadata.get("inq_checksums", ""), f"{path}: inq_checksums")
    if not isinstance(checksums, dict) or set(checksums) != set(header.tensors):
        raise CheckpointError(f"{path}: inq_checksums: expected one for each of {len(header.tensors)} tensors")
    encoded = parse_json(text, f"{path}: inq_training")
    tensors = read_tensors(path, header, checksums)
    state = _decode(encoded, f"{path}: inq_training", tensors)
    expected = {"model", "optimizer", "inq", "rng", "extra"}
    if not isinstance(state, dict) or set(state) != expected:
        raise CheckpointError(f"{path}: inq_training: expected the parts {sorted(expected)}, got something else")
    return state


def _check_model(path: object, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(f"{path}: model: expected the names of the model, got {unexpected} too and {missing} not")
    for name, value in own.items():
        if isinstance(value, Tensor) and (value.shape != state[name].shape or value.dtype != state[name].dtype):
            raise ValueError(
                f"{path}: model: {name}: expected {value.dtype} {list(value.shape)}, "
                f"got {state[name].dtype} {list(state[name].shape)}"
            )


def _check_optimizer(path: object, optimizer: torch.optim.Optimizer, state: Mapping) -> None:
    if state["type"] != type(optimizer).__name__:
        raise ValueError(f"{path}: optimizer: expected {type(optimizer).__name__}, got {state['type']}")
    expected = [len(group["params"]) for group in optimizer.param_groups]
    got = [len(group["params"]) for group in state["state"]["param_groups"]]
    if expected != got:
        raise ValueError(f"{path}: optimizer: expected parameter groups of {expected} parameters, got {got}")


def _rng_state() -> dict:
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_rng_state(state: Mapping) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


def _encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON; its tensors go into ``tensors``."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if type(value) is int:
        return value if -(1 << 63) <= value < 1 << 63 else {_FLOAT: str(value)}
    if type(value) is float:
        # repr is exact; JSON has no infinities.
        return value if math.isfinite(value) else {_FLOAT: str(value)}
    if isinstance(value, Tensor):
        name = f"t.{len(tensors)}"
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, list):
        return [_encode(v, f"{where}[{i}]", tensors) for i, v in enumerate(value)]
    if isinstance(value, tuple):
        return {_TUPLE: [_encode(v, f"{where}[{i}]", tensors) for i, v in enumerate(value)]}
    if isinstance(value, dict):
        items = [(k, _encode(v, f"{where}[{k!r}]", tensors)) for k, v in value.items()]
        # MultiStepLR counts its milestones.
        kind = _COUNTER if isinstance(value, collections.Counter) else _ITEMS
        if kind == _ITEMS and all(isinstance(k, str) and not k.startswith("$") for k in value):
            return dict(items)
        return {kind: [[_encode(k, f"{where}: key", tensors), v] for k, v in items]}
    raise TypeError(
        f"inq.save_training: {where}: expected tensors, numbers, strings, lists, tuples and dicts, "
        f"got {type(value).__name__}"
    )


def _decode(value: Any, where: str, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of ``_encode``."""
    if isinstance(value, list):
        return [_decode(v, where, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    kind = next((key for key in value if key.startswith("$")), None)
    if kind is None:
        return {k: _decode(v, where, tensors) for k, v in value.items()}
    content = value[kind]
    try:
        if kind == _TENSOR:
            return tensors[content]
        if kind == _TUPLE:
            return tuple(_decode(v, where, tensors) for v in content)
        if kind == _FLOAT:
            return float(content) if content in ("inf", "-inf", "nan") else int(content)
        if kind in (_ITEMS, _COUNTER):
            items = {_decode(k, where, tensors): _decode(v, where, tensors) for k, v in content}
            return collections.Counter(items) if kind == _COUNTER else items
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {kind}: expected what save_training writes, got {error}") from error
    raise CheckpointError(f"{where}: expected what save_training writes, got {kind}")
