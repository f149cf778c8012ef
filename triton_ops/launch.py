"""What every launcher here needs: whether kernels are interpreted, the shapes of grids, and the device to launch on."""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

# Triton reads TRITON_INTERPRET when a kernel is defined; kernels here are defined right after this.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    """The smallest multiple of b that is at least a."""
    return cdiv(a, b) * b


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device and stream: this device's, for the with block."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def on_device_of(t: Tensor) -> contextlib.AbstractContextManager:
    """``on_device`` of the tensor's device."""
    return on_device(t.device)
