"""What every launcher here needs: whether kernels are interpreted, shapes of grids, the device to launch on, and a
description of launches for a compiler without a device."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

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


# What launchers leave to Triton, which asks for this many; loops here say their own.
_STAGES = 3
# A thread's registers in products: all it can have. Unless told, ptxas spills a few bytes of some of them, so that one
# block more fits a processor's registers.
REGISTERS = 255


class Configuration(NamedTuple):
    """A kernel and what Triton makes one compiled kernel of.

    ``signature``: the type of every argument by name, "constexpr" for constants; ``registers``: the most of a thread,
    where launches say so (``maxnreg``).
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    registers: int | None = None


def configuration(
    name: str,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    warps: int = 4,
    stages: int = _STAGES,
    others: str = "",
    registers: int | None = None,
) -> Configuration:
    """With the signature in the kernel's order. ValueError if an argument has no type and no value, or is unknown.

    Launches make a constant of a number that is 1: such an argument is among ``constants`` instead. ``others`` is the
    type of what is in neither; ``types`` may then be those of several kernels.
    """
    if others:
        types = {argument: types.get(argument, others) for argument in kernel.arg_names}
    types = {argument: kind for argument, kind in types.items() if argument not in constants}
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument, "") for argument in kernel.arg_names
    }
    unknown = {*types, *constants} - set(kernel.arg_names)
    missing = [argument for argument, kind in signature.items() if not kind]
    if unknown or missing:
        raise ValueError(f"{name}: arguments without a type {missing}, and unknown ones {sorted(unknown)}")
    return Configuration(name, kernel, signature, constants, warps, stages, registers)
