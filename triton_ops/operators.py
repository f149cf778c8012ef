"""The operators of ``inq_kernels.library.SCHEMAS`` on Triton's kernels, by name."""

from __future__ import annotations

from collections.abc import Callable

from .conv2d import conv2d, conv2d_dx
from .linear import linear
from .linear_dx import linear_dx
from .linear_fp8 import linear_fp8
from .masked_steps import masked_adamw_, masked_sgd_
from .partition import exponents, exponents_and_threshold, partition_threshold
from .portion import freeze_portion_
from .quantize import quantize_with_mask_
from .storage import pack, prepack, unpack, unpack_, unprepack

OPERATORS: dict[str, Callable] = {
    f.__name__: f
    for f in (
        *(exponents, partition_threshold, exponents_and_threshold, quantize_with_mask_, freeze_portion_),
        *(masked_sgd_, masked_adamw_),
        *(pack, unpack, unpack_, prepack, unprepack),
        *(linear, linear_dx, linear_fp8, conv2d, conv2d_dx),
    )
}
