"""The compiled CUDA library: loading it, its leaf operators ``torch.ops.inq_cuda.*``, and ``torch.ops.inq``'s on them.

Each function here has the name and the arguments of an operator in ``library.SCHEMAS`` and runs on CUDA tensors.
Products read the layouts of fragments.py. What the library has not (convolutions, float32 products) is Triton's.
Sources: csrc/.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import fragments, layouts, reference
from .format import Format
from .layouts import STORAGE
from .library import FAKES

# Of products' activations; training and storage take float32 too.
PRODUCT_DTYPES = (torch.float16, torch.bfloat16)
DTYPES = (*PRODUCT_DTYPES, torch.float32)
LAYOUTS = {torch.float16: fragments.FP16, torch.bfloat16: fragments.BF16}
# From so many rows on decoding once and torch's product are faster (KERNELS.md: 2.7 % of it at 8192 rows, 20 % at 1024).
DENSE_ROWS = 2048
_FOLDER = Path(__file__).resolve().parent
_leaf = torch.ops.inq_cuda


@functools.cache
def unavailable() -> str | None:
    """None if the library is loaded (now, or before) and there is a device for it, else why not."""
    path = _FOLDER / "_cuda.so"
    if not path.exists():
        reason = _FOLDER / "_cuda_build.txt"
        text = reason.read_text() if reason.exists() else ""
        return f"there is no CUDA library: {text or 'this folder was not installed (pip install -e .)'}"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if (found := torch.cuda.get_device_capability()) < (8, 0):
        return f"it needs compute capability 8.0 or more, and the device has {found[0]}.{found[1]}"
    return load(path)


def load(path: Path) -> str | None:
    """Load the library and give its leaf operators their shape functions. None, or why it does not load."""
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the CUDA library does not load: {error.__cause__ or error}"
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"inq_cuda::{name}", fake)
    return None


def _ready(weight: Tensor, n: int, k: int, fmt: Format, layout: str, wanted: str) -> Tensor:
    """``weight`` in the layout that the kernels read. A module has done this once; here it is for this call alone."""
    if layout == wanted:
        return weight
    if layout != STORAGE:
        weight = layouts.unprepack(weight, n, k, fmt, layout)
    return layouts.prepack(weight, k, fmt, wanted)


# --- products ---------------------------------------------------------------------------------------------------------


def linear(x, weight, weight_exp, weight_scale, bias, bits, levels, layout, backend):
    fmt, k = Format(bits, levels), x.shape[-1]
    weight = _ready(weight, weight_exp.shape[0], k, fmt, layout, LAYOUTS[x.dtype])
    factors = (weight_exp.contiguous(), None if weight_scale is None else weight_scale.contiguous())
    if x.numel() >= DENSE_ROWS * k > 0:
        # Sums in float32, so that rounding is the epilogue's alone.
        w = _leaf.decode(weight, weight_exp.shape[0], k, bits, levels == "dense", x.dtype)
        rows = x.reshape(-1, k)
        return _leaf.finish(torch.mm(rows, w.T, out_dtype=torch.float32), *factors, bias, bits, levels == "dense", x.dtype).view(
            *x.shape[:-1], -1
        )
    return _leaf.linear(x, weight, *factors, bias, bits, levels == "dense")


def linear_dx(grad, weight, weight_exp, weight_scale, k, bits, levels, layout, backend):
    fmt = Format(bits, levels)
    weight = _ready(weight, weight_exp.shape[0], k, fmt, layout, LAYOUTS[grad.dtype])
    scale = None if weight_scale is None else weight_scale.contiguous()
    return _leaf.linear_dx(grad, weight, weight_exp.contiguous(), scale, k, bits, levels == "dense")
