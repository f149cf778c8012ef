"""Shapes and grids: what is measured when nobody asks for anything else."""

from __future__ import annotations

# (K, N), KERNELS.md. The main one is that of the bars.
MAIN = (14336, 4096)
SHAPES = (MAIN, (4096, 4096), (4096, 6144), (4096, 28672), (8192, 8192), (8192, 10240), (28672, 8192), (8192, 57344))
MS_MAIN = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
MS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096)
MS_FEW = (1, 16, 256)
MS_QUICK = (1, 4, 16, 64, 256)
# A single product beyond this many operations (about half a second of the dense one on two cores with AMX, or on
# 32 bits) is not in a grid; --m asks for it by name.
MAX_FLOPS = {"bfloat16": 5e11, "float32": 1.3e11, "float16": 1.3e11}
# What AVX2 is compared by, up to M = 4096: seconds a call, so few pairs.
MAX_FLOPS_AVX2_MAIN = 5e11

# On a GPU. KERNELS.md states its bars for this one; the others at 4 bits and bfloat16.
MAIN_GPU = (8192, 8192)
SHAPES_GPU = (MAIN_GPU, (4096, 4096), (4096, 6144), (14336, 4096), (8192, 10240), (4096, 28672), (28672, 8192))
SHAPES_GPU += ((8192, 57344),)
MS_GPU_MAIN = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
MS_GPU, MS_GPU_QUICK = (1, 16, 64, 256, 2048), (1, 16, 64, 1024)
# float32 has no tensor cores: a product as its own case is enough.
MS_GPU_FLOAT32 = (16,)

# ResNet-50's convolutions, each once: (in channels, out channels, kernel, stride, input height = width).
RESNET50 = (
    (3, 64, 7, 2, 224),
    *((64, 64, 1, 1, 56), (64, 64, 3, 1, 56), (64, 256, 1, 1, 56), (256, 64, 1, 1, 56)),
    *((256, 128, 1, 1, 56), (128, 128, 3, 2, 56), (128, 512, 1, 1, 28), (256, 512, 1, 2, 56), (512, 128, 1, 1, 28)),
    *((128, 128, 3, 1, 28), (512, 256, 1, 1, 28), (256, 256, 3, 2, 28), (256, 1024, 1, 1, 14), (512, 1024, 1, 2, 28)),
    *((1024, 256, 1, 1, 14), (256, 256, 3, 1, 14), (1024, 512, 1, 1, 14), (512, 512, 3, 2, 14), (512, 2048, 1, 1, 7)),
    *((1024, 2048, 1, 2, 14), (2048, 512, 1, 1, 7), (512, 512, 3, 1, 7)),
)
RESNET50_QUICK = ((64, 64, 3, 1, 56), (256, 1024, 1, 1, 14))
BATCHES, BATCHES_QUICK = (1, 32, 256), (1,)
# On a GPU, where each kind of tile is compiled first: wide images, few channels; one pixel's window; many channels.
RESNET50_GPU = ((64, 64, 3, 1, 56), (256, 1024, 1, 1, 14), (256, 256, 3, 1, 14), (512, 512, 3, 1, 7))
BATCHES_GPU_DX = (32,)

# Weights only, as INQ quantizes them: [N, K].
VGG16 = tuple(
    (n, k)
    for k, n in (
        *((3 * 9, 64), (64 * 9, 64), (64 * 9, 128), (128 * 9, 128), (128 * 9, 256), (256 * 9, 256), (256 * 9, 256)),
        *((256 * 9, 512), *[(512 * 9, 512)] * 5, (25088, 4096), (4096, 4096), (4096, 1000)),
    )
)
# Of ResNet-50 by layer, with repetitions: 25.5 million weights for the optimizers' steps.
_STAGES = ((64, 64, 3), (256, 128, 4), (512, 256, 6), (1024, 512, 3))  # channels in, width, blocks
RESNET50_WEIGHTS = (
    (64, 147),
    (1000, 2048),
    *(
        layer
        for channels, width, blocks in _STAGES
        for block in range(blocks)
        for layer in (
            (width, 4 * width if block else channels),
            (width, 9 * width),
            (4 * width, width),
            *([] if block else [(4 * width, channels)]),
        )
    ),
)
