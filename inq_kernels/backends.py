"""Which implementation runs an operator. Backends are loaded when first needed, and each absence has its reason."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

import torch

from . import library, reference
from .format import Format
from .library import STORAGE

BACKENDS = ("reference", "cpu", "triton", "cuda")
ENVIRONMENT = "INQ_BACKEND"


class BackendError(RuntimeError):
    """A backend was asked for by name and is not there."""


def availability() -> dict[str, str | None]:
    """For each backend, None if it can run here, else the reason why not."""
    return {
        "reference": None,
        "cpu": "this version has no compiled CPU library",
        "triton": "this version has no Triton kernels",
        "cuda": "this version has no CUDA library",
    }


def select(op: str, requested: str, available: Mapping[str, str | None]) -> str:
    """The backend that runs ``op``: a pure function of its arguments.

    Args:
        op: the operator's name, for the message.
        requested: a backend's name, or "" for the best there is. A request by name never falls back.
        available: as from ``availability()``.

    Raises:
        ValueError: no backend has that name. BackendError: it has, but cannot run here.
    """
    if not requested:
        return "reference"
    if requested not in available:
        raise ValueError(f"inq.{op}: backend: expected one of {BACKENDS}, got {requested!r}")
    if available[requested] is not None:
        raise BackendError(f"inq.{op}: backend {requested!r} was asked for and cannot run: {available[requested]}")
    return requested


def _choose(op: str, backend: str = "") -> str:
    return select(op, backend or os.environ.get(ENVIRONMENT, ""), availability())


def _attach(op: str) -> None:
    """Implement ``torch.ops.inq.<op>``: choose a backend, turn ``bits, levels`` into a Format, call it."""
    names = [argument.name for argument in getattr(torch.ops.inq, op).default._schema.arguments]
    function = getattr(reference, op)

    def call(*args):
        given = dict(zip(names, args, strict=True))
        _choose(op, given.pop("backend", ""))
        if (layout := given.pop("layout", STORAGE)) != STORAGE:
            raise ValueError(f"inq.{op}: layout: the reference backend reads {STORAGE!r}, got {layout!r}")
        fields = {name: given.pop(name) for name in _FORMAT_FIELDS if name in given}
        if fields:
            given["fmt"] = Format(**fields)
        return function(**given)

    library.implement(op, call)


_FORMAT_FIELDS = [field.name for field in dataclasses.fields(Format)]
for _op in library.SCHEMAS:
    _attach(_op)
