"""Which implementation runs an operator. Backends are loaded when first needed, and each absence has its reason."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from . import cpu, layouts, library, reference
from .format import Format
from .layouts import CPU16, STORAGE

BACKENDS = ("reference", "cpu", "triton", "cuda")
ENVIRONMENT = "INQ_BACKEND"


class BackendError(RuntimeError):
    """A backend was asked for by name and is not there."""


@functools.cache
def _availability() -> dict[str, str | None]:
    return {
        "reference": None,
        "cpu": cpu.unavailable(),
        "triton": "this version has no Triton kernels",
        "cuda": "this version has no CUDA library",
    }


def availability() -> dict[str, str | None]:
    """For each backend, None if it can run here, else the reason why not."""
    return dict(_availability())


def select(
    op: str,
    requested: str,
    available: Mapping[str, str | None],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> str:
    """The backend that runs ``op``: a pure function of its arguments.

    Args:
        op: the operator's name.
        requested: a backend's name, or "" for the best there is. A request by name never falls back.
        available: as from ``availability()``.
        device: the type of the tensors' device.
        dtype: of the activations, or of the weights where there are none.

    Raises:
        ValueError: no backend has that name. BackendError: it has, but cannot run here.
    """
    if requested and requested not in available:
        raise ValueError(f"inq.{op}: backend: expected one of {BACKENDS}, got {requested!r}")
    why_not = dict(available)
    if why_not["cpu"] is None and device != "cpu":
        why_not["cpu"] = f"it computes on the CPU, got tensors on {device}"
    if why_not["cpu"] is None and dtype not in cpu.DTYPES:
        why_not["cpu"] = f"it computes in float32 and bfloat16, got {dtype}"
    if not requested:
        return "cpu" if why_not["cpu"] is None else "reference"
    if why_not[requested] is not None:
        raise BackendError(f"inq.{op}: backend {requested!r} was asked for and cannot run: {why_not[requested]}")
    return requested


@functools.lru_cache(maxsize=1024)
def _select_here(op: str, requested: str, device: str, dtype: torch.dtype) -> str:
    # A reference that is asked for loads nothing.
    available = dict.fromkeys(BACKENDS) if requested == "reference" else _availability()
    return select(op, requested, available, device, dtype)


def choose(op: str, like: Tensor, dtype: torch.dtype, backend: str = "") -> str:
    """``select`` for this machine, for tensors on the device of ``like``; ``INQ_BACKEND`` counts as a request."""
    return _select_here(op, backend or os.environ.get(ENVIRONMENT, ""), like.device.type, dtype)


def preferred_layout(device: str) -> str:
    """The layout that products on ``device`` (a type: "cpu", "cuda") are fastest from."""
    requested = os.environ.get(ENVIRONMENT, "")
    on_cpu = device == "cpu" and requested in ("", "cpu") and _availability()["cpu"] is None
    return CPU16 if on_cpu else STORAGE


# --- torch.ops.inq.* --------------------------------------------------------------------------------------------------

# Where products find their weight's layout, and the arguments that turn it back into the storage layout.
_FORMAT_FIELDS = {field.name for field in dataclasses.fields(Format)}
_TO_REFERENCE: dict[str, Callable] = {
    "prepack": lambda weight, k, fmt, layout: layouts.prepack(weight, k, fmt, layout),
    "unprepack": lambda weight, n, k, fmt, layout: layouts.unprepack(weight, n, k, fmt, layout),
}


def _row_length(given: Mapping) -> int:
    """K of a product's weight, from its other arguments."""
    if "k" in given:
        return given["k"]
    if "kernel_size" not in given:
        return given["x"].shape[-1]
    channels = (given["input_size"] if "input_size" in given else given["x"].shape)[1]
    return channels // given["groups"] * given["kernel_size"][0] * given["kernel_size"][1]


def _reference(op: str) -> Callable:
    """``reference.<op>`` with the operator's arguments: ``bits, levels, …`` as a Format, weights in any layout."""
    names = [argument.name for argument in getattr(torch.ops.inq, op).default._schema.arguments]
    function = _TO_REFERENCE.get(op) or getattr(reference, op)

    def call(*args):
        given = dict(zip(names, args, strict=True))
        given.pop("backend", None)
        fields = {name: given.pop(name) for name in _FORMAT_FIELDS & given.keys()}
        if fields:
            given["fmt"] = fmt = Format(**fields)
        if op not in _TO_REFERENCE and (layout := given.pop("layout", STORAGE)) != STORAGE:
            n, k = given["weight_exp"].shape[0], _row_length(given)
            given["weight"] = layouts.unprepack(given["weight"], n, k, fmt, layout)
        return function(**given)

    return call


def _attach(op: str) -> None:
    """Implement ``torch.ops.inq.<op>``: choose a backend and call it."""
    on_cpu, plain = getattr(cpu, op, None), _reference(op)
    arguments = getattr(torch.ops.inq, op).default._schema.arguments
    forced = arguments[-1].name == "backend"
    # unpack has no float tensor among its arguments; codes alone are moved in no dtype.
    dtype_at = next((i for i, argument in enumerate(arguments) if argument.name == "dtype"), None)
    bytes_only = op in ("prepack", "unprepack")
    written = [i for i, argument in enumerate(arguments) if argument.alias_info is not None]

    def call(*args):
        like = args[0]
        if isinstance(like, list):
            if not like:
                return None
            like = next((t for t in like if t.dtype not in cpu.DTYPES), like[0])
        dtype = torch.float32 if bytes_only else like.dtype if dtype_at is None else args[dtype_at]
        if choose(op, like, dtype, args[-1] if forced else "") != "cpu":
            return plain(*args)
        result = on_cpu(*args)
        for i in written:
            _count_as_written(args[i])
        return result

    library.implement(op, call)


def _count_as_written(tensors: Tensor | list[Tensor]) -> None:
    """What a torch operator does to the tensors that it changes: autograd notices if it needed their old values."""
    tensors = [t for t in (tensors if isinstance(tensors, list) else [tensors]) if not t.is_inference()]
    torch.autograd.graph.increment_version(tensors)


for _op in library.SCHEMAS:
    _attach(_op)
