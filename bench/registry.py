"""Every operator and its benchmark."""

from __future__ import annotations

from . import conv2d, linear, optim, overhead, partition, storage
from .case import Op

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        linear.LINEAR,
        linear.LINEAR_DX,
        conv2d.CONV2D,
        conv2d.CONV2D_DX,
        *storage.OPS,
        partition.PARTITION,
        *optim.OPS,
        overhead.OVERHEAD,
    )
}
# On a GPU: what its kernels do. linear_fp8 is measured there alone.
GPU_OPS: dict[str, Op] = {
    op.name: op
    for op in (
        linear.LINEAR,
        linear.LINEAR_FP8,
        linear.LINEAR_DX,
        *storage.OPS,
        partition.PARTITION,
        *optim.OPS,
        conv2d.CONV2D,
        conv2d.CONV2D_DX,
    )
}
BY_DEVICE = {"cpu": OPS, "cuda": GPU_OPS}
ALL = OPS | GPU_OPS
# Operators without a benchmark on a CPU, and why.
NOT_MEASURED = {
    "exponents": "its passes over the weights are among those of freeze_portion_",
    "partition_threshold": "its passes over the weights are among those of freeze_portion_",
    "exponents_and_threshold": "a part of freeze_portion_, which inq.INQ and inq.quantize_with_mask call",
    "quantize_with_mask_": "a part of freeze_portion_, which inq.INQ and inq.quantize_with_mask call",
    "linear_fp8": "made for fp8 tensor cores: on a CPU there is the reference alone, which nobody runs for its speed; "
    "--device cuda measures it",
}
