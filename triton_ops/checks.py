"""What launchers check before a kernel runs: a kernel takes addresses and sizes as they are, and would read and write
beyond tensors that do not belong together. Public functions have checked already; ``torch.ops.inq`` may be called bare.

No check asks the device for a value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import layouts
from ..format import Format

# Kernels count rows in 32 bits, and products what they sum over, too: up to the end of a tile, or of the last slice.
MOST = 2**31 - 2**12


def tensor(name: str, t: Tensor, dtype: torch.dtype, shape: Sequence[int], like: Tensor | None = None) -> None:
    """TypeError or ValueError unless ``t`` has this dtype and shape, and lies on the device of ``like``."""
    if t.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {t.dtype}")
    if list(t.shape) != list(shape):
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(t.shape)}")
    if t.shape[0] > MOST:
        raise ValueError(f"{name}: expected at most {MOST} rows, got {t.shape[0]}")
    if like is not None and t.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {t.device}")


def size(name: str, value: int, least: int = 0, most: float = math.inf) -> None:
    """ValueError unless ``value`` is from ``least`` to ``most``."""
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    if value > most:
        raise ValueError(f"{name}: expected at most {most}, got {value}")


def packed(
    op: str, weight: Tensor, weight_exp: Tensor, weight_scale: Tensor | None, k: int, fmt: Format, layout: str
) -> int:
    """N, the rows of a packed weight of ``k`` columns whose parts belong together."""
    size(f"inq.{op}: k", k, most=math.inf if op == "unpack" else MOST)
    if weight_exp.dim() != 2:
        raise ValueError(f"inq.{op}: weight_exp: expected shape [N, 1], got {list(weight_exp.shape)}")
    n = weight_exp.shape[0]
    tensor(f"inq.{op}: weight_exp", weight_exp, torch.int8, (n, 1), weight)
    tensor(f"inq.{op}: weight", weight, torch.uint8, layouts.shape(layout, n, k, fmt))
    if weight_scale is not None:
        tensor(f"inq.{op}: weight_scale", weight_scale, torch.float32, (n, 1), weight)
    return n


def bias(op: str, t: Tensor | None, n: int, like: Tensor) -> None:
    """ValueError unless ``t`` is None or has an element for each of ``n`` outputs."""
    if t is not None and (list(t.shape) != [n] or t.device != like.device):
        raise ValueError(f"inq.{op}: bias: expected shape [{n}] on {like.device}, got {list(t.shape)} on {t.device}")


def rows(op: str, name: str, t: Tensor, length: int, dtypes: Sequence[torch.dtype], like: Tensor) -> None:
    """An error unless ``t`` is [..., length] of one of ``dtypes`` on the device of ``like``."""
    if t.dtype not in dtypes:
        raise TypeError(f"inq.{op}: {name}: expected one of {tuple(dtypes)}, got {t.dtype}")
    if t.dim() == 0 or t.shape[-1] != length:
        raise ValueError(f"inq.{op}: {name}: expected shape [..., {length}], got {list(t.shape)}")
    size(f"inq.{op}: rows of {name}", math.prod(t.shape[:-1]), most=MOST)
    if t.device != like.device:
        raise ValueError(f"inq.{op}: {name}: expected device {like.device}, got {t.device}")


def convolution(
    op: str,
    channels: int,
    n: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    """ValueError unless the numbers of a convolution of ``channels`` to ``n`` fit each other."""
    for name, values, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        for value in values:
            size(f"inq.{op}: {name}", value, least)
    if groups < 1 or channels % groups or n % groups:
        raise ValueError(f"inq.{op}: groups: expected a divisor of {channels} and of {n}, got {groups}")
