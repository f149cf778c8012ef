"""Training checkpoints: ``save_training`` and ``load_training``, one safetensors file, never pickle.

Tensors are the file's tensors; everything else of the state is one JSON text in its metadata, with a reference where a
tensor stood. Both are checked by SHA-256, and a file is replaced in one step, so that a process killed at any moment
leaves a checkpoint from which the run goes on bit for bit.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import hashlib
import json
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .distributed import PeerError
from .files import MAX_JSON, CheckpointError, parse_json, read_header, read_tensors, sha256, write_safetensors
from .hooks import Run

VERSION = "1"
# A header holds the text escaped once more, and at most 16 MiB; and nobody's state is nested this deep.
MAX_TEXT = MAX_JSON // 4
_MAX_DEPTH = 64

# Keys that stand for what JSON has no word for. A dict of the user's with such a key is written as items.
_TENSOR, _TUPLE, _ITEMS, _COUNTER, _FLOAT = "$tensor", "$tuple", "$items", "$counter", "$float"


def save_training(
    path: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: Run,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write all that a run needs to go on bit for bit: model, optimizer, INQ with its LR schedulers, and torch's and
    Python's random states. The file is replaced in one step: it is always the old checkpoint or the new one, whole.

    Args:
        path: the file; its directory must exist.
        model, optimizer: anything with a ``state_dict`` of tensors, numbers, strings, lists and dicts.
        run: the ``inq.INQ``, at any moment of its loop, or the ``inq.DNS``, between any two steps.
        extra: the same kinds of values: epoch, step, a GradScaler's state, a data loader's generator state, …

    Raises:
        TypeError, ValueError: the state holds something else, or too much; the message says where. OSError: the file
            could not be written. The old one is still there then.
    """
    values = model.state_dict()
    state = {
        "model": values,
        # The versions of modules' state, which their load_state_dict reads.
        "model_metadata": dict(getattr(values, "_metadata", {})),
        "optimizer": {
            "type": type(optimizer).__name__,
            "parameters": parameter_names(model, optimizer),
            "state": optimizer.state_dict(),
        },
        "inq": run.state_dict(),
        "rng": rng_state(),
        "extra": dict(extra or {}),
    }
    tensors: dict[str, Tensor] = {}
    text = json.dumps(encode(state, "state", collector(tensors, "t")), allow_nan=False)
    if len(text) > MAX_TEXT:
        raise ValueError(
            f"inq.save_training: state: expected at most {MAX_TEXT} bytes of numbers and strings, got {len(text)}: "
            "give large things to extra as tensors"
        )
    metadata = {
        "format": "pt",
        "inq_training_version": VERSION,
        "inq_training": text,
        "inq_training_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "inq_checksums": json.dumps({name: sha256(tensor) for name, tensor in tensors.items()}),
    }
    write_safetensors(path, tensors, metadata)


def load_training(path: str | os.PathLike, model: nn.Module, optimizer: torch.optim.Optimizer, run: Run) -> dict:
    """Take over what ``save_training`` wrote, into objects made with the same arguments.

    ``for portion in run:`` then goes on with the portion in progress. torch's and Python's random states are set.

    Returns:
        ``extra``, tensors on the CPU.

    Raises:
        CheckpointError: the file is damaged, no training checkpoint, or of a newer version. ValueError: it belongs to
            another model, optimizer or run. Nothing is changed then. OSError: it cannot be read.
    """
    state = _read(path)
    with checking(path, "inq.save_training"):
        check_model(path, model, state["model"])
        check_optimizer(path, model, optimizer, state["optimizer"])
        run.check_state(state["inq"])
        check_rng_state(state["rng"])
    with taking_over(path, model, optimizer, run):
        take_over(model, optimizer, run, state)
    return state["extra"]


# What a state of the wrong structure raises while it is checked (RuntimeError: whoever compares a tensor that stands in
# a number's place), and what else while it is taken over.
_MALFORMED = (AttributeError, IndexError, KeyError, TypeError, RuntimeError)
_REFUSED = (*_MALFORMED, ValueError, OverflowError)
# RuntimeErrors that say nothing of the state.
_ELSEWHERE = (torch.OutOfMemoryError, PeerError, *((dist.DistError,) if dist.is_available() else ()))


@contextlib.contextmanager
def checking(path: object, writer: str) -> Iterator[None]:
    """A state's wrong structure as a CheckpointError; ``writer`` is the function that writes right ones."""
    try:
        yield
    except _ELSEWHERE:
        raise
    except _MALFORMED as error:
        raise CheckpointError(f"{path}: expected a state as {writer} writes it, got {error!r}") from error


@contextlib.contextmanager
def taking_over(path: object, model: nn.Module, optimizer: torch.optim.Optimizer, run: Run) -> Iterator[None]:
    """After any error all is as it was; what the checks cannot know (a module's own loading, an optimizer's or a
    scheduler's) is a CheckpointError."""
    before = snapshot(model, optimizer, run)
    try:
        yield
    except BaseException as error:
        take_over(model, optimizer, run, before)
        if isinstance(error, _REFUSED) and not isinstance(error, _ELSEWHERE):
            raise CheckpointError(f"{path}: expected a state that can be loaded, got {error!r}") from error
        raise


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer, run: Run) -> dict:
    """The way back. Loading replaces the optimizer's tensors and writes into the model's, so only these are copied."""
    values = model.state_dict()
    copied = {k: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in values.items()}
    return {
        "model": copied,
        "model_metadata": dict(getattr(values, "_metadata", {})),
        "optimizer": {"state": optimizer.state_dict()},
        "inq": run.state_dict(),
        "rng": rng_state(),
    }


def take_over(model: nn.Module, optimizer: torch.optim.Optimizer, run: Run, state: Mapping) -> None:
    take_over_values(model, optimizer, state)
    take_over_run(run, state)


def take_over_values(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping) -> None:
    """What each rank takes over by itself."""
    optimizer.load_state_dict(state["optimizer"]["state"])
    values = collections.OrderedDict(state["model"])
    values._metadata = collections.OrderedDict(state["model_metadata"])
    model.load_state_dict(values)


def take_over_run(run: Run, state: Mapping) -> None:
    """What ranks that share weights take over together."""
    run.load_state_dict(state["inq"])
    set_rng_state(state["rng"])


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """For each group the model's names of its parameters, "" for a parameter that is not the model's."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]


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
    state = decode(encoded, f"{path}: inq_training", tensors)
    expected = {"model", "model_metadata", "optimizer", "inq", "rng", "extra"}
    if not isinstance(state, dict) or set(state) != expected:
        raise CheckpointError(f"{path}: inq_training: expected the parts {sorted(expected)}, got something else")
    return state


def check_model(path: object, model: nn.Module, state: Mapping[str, Tensor]) -> None:
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


def check_optimizer(path: object, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping) -> None:
    if state["type"] != type(optimizer).__name__:
        raise ValueError(f"{path}: optimizer: expected {type(optimizer).__name__}, got {state['type']}")
    # Optimizers know parameters by position only: in another order they would take over each other's momenta.
    expected, got = parameter_names(model, optimizer), state["parameters"]
    if expected != got:
        raise ValueError(f"{path}: optimizer: expected groups of the parameters {expected}, got {got}")


def rng_state() -> dict:
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def check_rng_state(state: Mapping) -> None:
    """Raise as a malformed state does unless ``set_rng_state`` will take it."""
    generators = [state["torch"], *state.get("cuda", [])]
    if not all(isinstance(g, Tensor) and g.dtype == torch.uint8 and g.dim() == 1 for g in generators):
        raise TypeError("rng: expected uint8 tensors")
    try:
        random.Random().setstate(state["python"])
        torch.Generator().set_state(state["torch"])
    except (ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"rng: {error}") from error


def set_rng_state(state: Mapping) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


def collector(tensors: dict[str, Tensor], prefix: str) -> Callable[[Tensor], str]:
    """For ``encode``: puts tensors into ``tensors`` under "prefix.0", "prefix.1", …"""

    def add(tensor: Tensor) -> str:
        name = f"{prefix}.{len(tensors)}"
        tensors[name] = tensor
        return name

    return add


def encode(value: Any, where: str, add: Callable[[Tensor], str], depth: int = 0) -> Any:
    """``value`` as JSON; ``add`` keeps its tensors and names them. What could not be read again is an error here."""
    if depth > _MAX_DEPTH:
        raise TypeError(f"inq.save_training: {where[:200]}: expected at most {_MAX_DEPTH} levels of nesting, got more")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        if not value.isascii() and value != value.encode("utf-8", "replace").decode():
            raise TypeError(
                f"inq.save_training: {where}: expected text, got a string that UTF-8 cannot hold: {value!r}"
            )
        return value
    if type(value) is int:
        if value.bit_length() > 1024:
            raise TypeError(f"inq.save_training: {where}: expected an int of at most 1024 bits, got a larger one")
        return value if -(1 << 63) <= value < 1 << 63 else {_FLOAT: str(value)}
    if type(value) is float:
        # repr is exact; JSON has no infinities.
        return value if math.isfinite(value) else {_FLOAT: str(value)}
    if isinstance(value, Tensor):
        return {_TENSOR: add(value)}
    if isinstance(value, list):
        return [encode(v, f"{where}[{i}]", add, depth + 1) for i, v in enumerate(value)]
    if isinstance(value, tuple):
        return {_TUPLE: [encode(v, f"{where}[{i}]", add, depth + 1) for i, v in enumerate(value)]}
    if isinstance(value, dict):
        items = [(k, encode(v, f"{where}[{k!r}]", add, depth + 1)) for k, v in value.items()]
        # MultiStepLR counts its milestones.
        kind = _COUNTER if isinstance(value, collections.Counter) else _ITEMS
        if kind == _ITEMS and all(isinstance(k, str) and not k.startswith("$") for k in value):
            return dict(items)
        return {kind: [[encode(k, f"{where}: key", add, depth + 1), v] for k, v in items]}
    raise TypeError(
        f"inq.save_training: {where}: expected tensors, numbers, strings, lists, tuples and dicts, "
        f"got {type(value).__name__}"
    )


def decode(value: Any, where: str, tensors: Mapping[str, Tensor], depth: int = 0) -> Any:
    """The inverse of ``encode``."""
    if depth > _MAX_DEPTH:
        # Before Python's own limit, which would be an error of another kind.
        raise CheckpointError(f"{where}: expected at most {_MAX_DEPTH} levels of nesting, got more")

    def inner(v: Any) -> Any:
        return decode(v, where, tensors, depth + 1)

    if isinstance(value, list):
        return [inner(v) for v in value]
    if not isinstance(value, dict):
        return value
    kind = next((key for key in value if key.startswith("$")), None)
    if kind is None:
        return {k: inner(v) for k, v in value.items()}
    content = value[kind]
    try:
        if kind == _TENSOR:
            return tensors[content]
        if kind == _TUPLE:
            return tuple(inner(v) for v in content)
        if kind == _FLOAT:
            return float(content) if content in ("inf", "-inf", "nan") else int(content)
        if kind in (_ITEMS, _COUNTER):
            items = {inner(k): inner(v) for k, v in content}
            return collections.Counter(items) if kind == _COUNTER else items
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {kind}: expected what save_training writes, got {error}") from error
    raise CheckpointError(f"{where}: expected what save_training writes, got {kind}")
