"""Operands as kernels read them: weights in one of the layouts of slices.py, rows of x with their strides."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .. import slices

# What Triton takes for granted of addresses where it loads whole vectors, bytes.
_ALIGN = 16


def words(weight: Tensor, layout: str) -> Tensor:
    """The words of a weight [N, …] as integers [N, words]. Bytes that begin where no vector may begin (a part of a
    larger buffer) are copied: torch has no view of them as words, and kernels that load them one by one are others."""
    dtype = torch.int8 if layout == slices.E4M3 else torch.int16
    flat = weight.reshape(weight.shape[0], math.prod(weight.shape[1:]))
    return (flat if flat.data_ptr() % _ALIGN == 0 else flat.clone()).view(dtype)


def rows(x: Tensor) -> Tensor:
    """x [..., K] as [M, K] whose last stride is 1: a view where it can be one."""
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] <= 1 else flat.contiguous()


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU. The interpreter has one at a time, but runs the code for many."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def capability(device: torch.device) -> int:
    """90 for sm_90. The interpreter takes everything for Hopper."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
