"""The machine: what it is, what it can do (measured ceilings), how much memory a call takes. No host name, no path."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from .. import cpu

_PACKAGE = Path(__file__).resolve().parent
_FALLBACK_CACHE = 64 << 20
MAX_COPIES = 64
_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_vnni", "avx512_fp16")
_FLAGS += ("avx_vnni", "amx_tile", "amx_bf16", "amx_int8")
# What holds our kernels and torch's (ATen, oneDNN, MKL, FBGEMM) down to one set of instructions, on both sides alike.
ISA_ENVIRONMENT = {
    "native": {},
    "avx512": {"INQ_CPU_ISA": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "avx2": {
        "INQ_CPU_ISA": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    },
}


def _cpuinfo(field: str) -> str | None:
    with suppress(OSError):  # not Linux
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(field):
                return line.split(":", 1)[1].strip()
    return None


@cache
def last_level_cache() -> int:
    """Bytes of the largest cache, as the system says; 64 MiB where it does not."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with suppress(OSError, ValueError):
            text = file.read_text().strip()
            sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0))
    return max(sizes, default=_FALLBACK_CACHE)


def memory_bytes() -> int:
    """Bytes of memory; 0 where the system does not say."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def copies(size: int) -> int:
    """How many copies of ``size`` bytes are, together, more than four times the largest cache; at most 64.

    Twice, where four times is over a sixteenth of the memory: every baseline has copies of its own, and where servers
    share a cache of 480 MB with 24 GB of memory a run was killed.
    """
    times = 4 if 4 * last_level_cache() <= memory_bytes() // 16 else 2
    return min(times * last_level_cache() // max(size, 1) + 1, MAX_COPIES)


def isa() -> str:
    """The best set of instructions that our CPU library, or else the machine, may use here: amx, avx512, avx2, …"""
    if cpu.unavailable() is None:
        return torch.ops.inq_cpu.isa()
    flags = (_cpuinfo("flags") or "").split()
    best = "amx" if "amx_bf16" in flags else "avx512" if "avx512_bf16" in flags else "avx2" if "avx2" in flags else ""
    return os.environ.get(cpu.ISA_ENVIRONMENT) or best or platform.machine()


def lacks(isa: str) -> str | None:
    """Why this machine cannot be held down to ``isa``: it has less. None if it can."""
    flags = (_cpuinfo("flags") or "").split()
    needed = {"native": (), "avx512": ("avx512f", "avx512bw", "avx512_bf16"), "avx2": ("avx2", "fma")}[isa]
    missing = [flag for flag in needed if flag not in flags]
    return f"{isa}: this machine has no {', '.join(missing)}" if missing else None


def describe() -> dict:
    """What numbers of this machine depend on."""
    flags = (_cpuinfo("flags") or "").split()
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu": _cpuinfo("model name") or platform.processor() or "unknown CPU",
        "family": [_cpuinfo("cpu family"), _cpuinfo("model\t"), _cpuinfo("stepping")],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "isa": isa(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "cache_bytes": last_level_cache(),
        "memory_bytes": memory_bytes(),
    }


def software() -> dict:
    """Versions, and the commit, "-dirty" if files were changed since, where this is a git checkout."""
    from .. import __version__

    versions = {}
    for name in ("torch", "numpy", "safetensors", "matplotlib"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    commit = None
    if (_PACKAGE.parent / ".git").exists():
        words = ["git", "--no-optional-locks", "-C", str(_PACKAGE.parent)]
        words += ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        with suppress(OSError):  # no git
            commit = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip() or None
    return {
        "inq_kernels": __version__,
        "commit": commit,
        "python": platform.python_version(),
        **versions,
        **_torch_built_with(torch.__config__.show()),
    }


def _torch_built_with(text: str) -> dict[str, str | None]:
    """The lines of ``torch.__config__.show()`` that name torch's compiler, MKL and oneDNN with their versions."""
    lines = {"torch_compiler": "(?:GCC|clang|MSVC)", "mkl": ".*Math Kernel Library", "onednn": ".*(?:MKL-DNN|oneDNN)"}
    found = {name: re.search(rf"^ *- ({begin}\b.*)$", text, re.MULTILINE) for name, begin in lines.items()}
    return {name: match and match[1] for name, match in found.items()}


def slug(description: dict) -> str:
    """A folder's name for the machine: its CPU, best instructions and cores."""
    cpu = re.sub(r"\(r\)|\(tm\)|@.*", "", description["cpu"], flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", f"{cpu} {description['isa']} {description['cores']} cores".lower()).strip("-")


# --- ceilings ---------------------------------------------------------------------------------------------------------


def _best(call: Callable[[], object], seconds: float) -> float:
    """The fastest of the calls that fit into about ``seconds``, at least five: a ceiling is what can be reached."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 200):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def ceilings(seconds: float = 1.0) -> dict:
    """What this machine reaches, by torch: GB/s of a large copy (bytes read + bytes written), GFLOP/s of products."""
    source = torch.zeros(max(4 * last_level_cache(), 64 << 20), dtype=torch.uint8).fill_(1)
    target = torch.empty_like(source).fill_(0)
    copy = 2 * source.numel() / _best(lambda: target.copy_(source), seconds) / 1e9
    product = {}
    for name in ("float32", "bfloat16"):
        size, most = 128, 2048 if seconds >= 0.5 else 1024
        while True:
            a, b = (torch.randn(size, size).to(getattr(torch, name)) for _ in range(2))
            took = _best(lambda a=a, b=b: torch.mm(a, b), seconds / 2 if size == most else 0)
            # bfloat16 without instructions for it is a thousand times slower: no larger one then.
            if size == most or took > 0.01:
                break
            size *= 2
        product[name] = 2 * size**3 / took / 1e9
    return {"copy_gb_s": copy, "product_gflop_s": product}


def better(a: dict, b: dict) -> dict:
    """The higher of two measurements of each ceiling."""
    products = {name: max(value, b["product_gflop_s"][name]) for name, value in a["product_gflop_s"].items()}
    return {"copy_gb_s": max(a["copy_gb_s"], b["copy_gb_s"]), "product_gflop_s": products}


# --- memory -----------------------------------------------------------------------------------------------------------


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)[1]) << 10


def peak_extra(call: Callable[[], object]) -> int | str:
    """Resident bytes that ``call`` took at its peak beyond those before it; or why that cannot be measured.

    Linux resets a process's high-water mark on request, and a process may ask for its own. Memory that malloc had kept
    would hide what ``call`` takes from it, so it is given back first.
    """
    try:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        if _status("VmHWM") > before + (1 << 20):
            return "the high-water mark of memory was not reset"
        call()
        return max(_status("VmHWM") - before, 0)
    except (OSError, TypeError) as error:
        return f"the high-water mark of memory cannot be reset here: {error}"
