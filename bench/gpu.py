"""A CUDA device as the benchmarks see it: its caches, what it can do (measured ceilings), its memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from .machine import MAX_COPIES
from .timing import CudaClock, CudaDevice, Runner

# H200: 60 MB. Copies together exceed this many times the cache.
_TIMES_CACHE = 3
_FP8_MAX = 448.0


@cache
def cache_bytes() -> int:
    """Bytes of the second-level cache."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def copies(size: int) -> int:
    """How many copies of ``size`` bytes are, together, more than three times the second-level cache; at most 64."""
    return min(_TIMES_CACHE * cache_bytes() // max(size, 1) + 1, MAX_COPIES)


def describe() -> dict:
    """What numbers of this device depend on. No host name, no serial number."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "capability": 10 * properties.major + properties.minor,
        "processors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cache_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
    }


def slug() -> str:
    """A folder's name for the device."""
    return re.sub(r"[^a-z0-9]+", "-", describe()["gpu"].lower()).strip("-")


def to_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """(values, scale): x as float8_e4m3fn with one float32 scale, x ≈ values · scale."""
    scale = (x.abs().amax().float() / _FP8_MAX).clamp(min=1e-30)
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def ceilings(seconds: float, device: CudaDevice | None = None) -> dict:
    """What the device reaches, by torch: GB/s of a large copy (read + written), GFLOP/s of square products.

    Products of random data: those of zeros are faster. A type that the device cannot multiply has no ceiling.
    """
    clock = CudaClock(device)
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = 2 * source.numel() / _best(clock, partial(target.copy_, source), seconds / 4) / 1e9
    size, product = 8192, {}
    for name in ("float32", "float16", "bfloat16"):
        a, b = (torch.randn(size, size, device="cuda").to(getattr(torch, name)) for _ in range(2))
        product[name] = 2 * size**3 / _best(clock, partial(torch.mm, a, b), seconds / 4) / 1e9
    try:
        (a8, sa), (b8, sb) = to_e4m3(a), to_e4m3(b)
        call = partial(torch._scaled_mm, a8, b8.t(), sa, sb, out_dtype=torch.bfloat16)
        product["float8_e4m3fn"] = 2 * size**3 / _best(clock, call, seconds / 4) / 1e9
    except RuntimeError:  # before sm_89
        pass
    return {"copy_gb_s": copy, "product_gflop_s": product}


def _best(clock: CudaClock, call: Callable[[], object], seconds: float) -> float:
    """The fastest of a few calls: a ceiling is what can be reached."""
    runner = Runner([call], 0)
    first = clock.seconds(runner, 1)
    return min(clock.seconds(runner, 1) for _ in range(min(max(int(seconds / max(first, 1e-6)), 5), 100)))


def peak_extra(call: Callable[[], object]) -> int:
    """Bytes of device memory that ``call`` took at its peak beyond those before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return max(torch.cuda.max_memory_allocated() - before, 0)
