"""Compiles csrc/cuda/<family>.cu for the CPU, with the emulator and tests/emulator/bind_<family>.cpp, into a module.

Objects and modules are kept by a hash of all that they are made of, in build/emulator (git ignores it), or in the
folder INQ_EMULATOR_CACHE, which copies of the repository may share.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CUDA = ROOT / "csrc" / "cuda"
CACHE = Path(os.environ.get("INQ_EMULATOR_CACHE") or ROOT / "build" / "emulator")
ENGINE = sorted(p.name for p in HERE.glob("*.cpp") if not p.name.startswith("bind_"))
# No contraction, as in kernels; no slots on the stack that two arrays share, since wgmma's registers are
# compared later; variables begin as 0xFE bytes, which mma knows for unwritten.
FLAGS = (
    "-std=c++20 -g1 -fPIC -fvisibility=hidden -ffp-contract=off -fstack-reuse=none "
    "-ftrivial-auto-var-init=pattern -DINQ_EMULATOR -Wall -Wextra "
    "-Wno-unknown-pragmas -Wno-unused-parameter -Wno-unused-function"
)

# As setup.py compiles csrc/register_cuda*.cpp: the C function of the current stream is declared with USE_CUDA alone.
TORCH_FLAGS = "-DTORCH_TARGET_VERSION=0x020b000000000000 -DUSE_CUDA"


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not found:
        raise RuntimeError("the emulator needs a C++ compiler: g++ and c++ were not found (CXX names one)")
    return found


def _flags(source: Path) -> list[str]:
    # Kernels spend their time in the engine; half the time to compile them is worth more.
    flags = f"{FLAGS} {'-O1' if source.suffix == '.cu' else '-O2'}".split()
    if _knows_torch(source):
        flags += TORCH_FLAGS.split()
    if platform.machine() in ("x86_64", "AMD64") and " avx2 " in _cpu_flags() and " fma " in _cpu_flags():
        flags += ["-mavx2", "-mfma"]
    return flags


def _knows_torch(source: Path) -> bool:
    return source.stem == "bind_operators" or source.stem.startswith("register_cuda")


def _torch() -> Path:
    return Path(importlib.util.find_spec("torch").origin).parent


@functools.cache
def _cpu_flags() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def _closure(source: Path, seen: dict[Path, bytes]) -> dict[Path, bytes]:
    """A file and all of ours that it includes."""
    if source in seen:
        return seen
    seen[source] = source.read_bytes()
    for name in _INCLUDE.findall(seen[source].decode()):
        for folder in (source.parent, HERE, CUDA, ROOT / "csrc"):
            if (folder / name).exists():
                _closure((folder / name).resolve(), seen)
                break
    return seen


def _hash(*parts: bytes | str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:24]


def _object(source: Path, extra: tuple[str, ...]) -> Path:
    flags = [*_flags(source), *extra]
    files = _closure(source.resolve(), {})
    if _knows_torch(source):
        files[_torch() / "version.py"] = (_torch() / "version.py").read_bytes()
    # By what is in the files, wherever they are.
    key = _hash(compiler(), " ".join(flags), *(data for path, data in sorted(files.items())))
    flags += [f"-I{folder}" for folder in (HERE, CUDA, ROOT / "csrc")]
    if _knows_torch(source):
        flags += ["-isystem", str(_torch() / "include"), f"-I{HERE / 'cuda'}"]
    out = CACHE / f"{source.stem}-{key}.o"
    if not out.exists():
        _run([compiler(), *flags, "-x", "c++", "-c", str(source), "-o", f"{out}.{os.getpid()}"])
        os.replace(f"{out}.{os.getpid()}", out)
    return out


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")
    if done.stdout.strip():
        print(done.stdout)


def module_path(name: str, sources: list[Path]) -> Path:
    """The module ``name`` of ``sources`` and the emulator, built if need be."""
    import pybind11

    CACHE.mkdir(parents=True, exist_ok=True)
    python = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}")
    with open(CACHE / f"{name}.lock", "w") as lock, open(CACHE / "engine.lock", "w") as engine_lock:
        # Test processes build each object once between them.
        fcntl.flock(engine_lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda n: _object(HERE / n, ()), ENGINE))
        fcntl.flock(engine_lock, fcntl.LOCK_UN)
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(2) as pool:
            objects += pool.map(lambda s: _object(s, python if s.suffix == ".cpp" else ()), sources)
        key = _hash(*(o.name for o in objects))
        folder = CACHE / f"{name}-{key}"
        out = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
        if not out.exists():
            folder.mkdir(exist_ok=True)
            libraries = []
            if any(map(_knows_torch, sources)):
                # What bind_operators.cpp defines comes before torch's.
                libraries = [f"-L{_torch() / 'lib'}", "-Wl,-Bsymbolic", "-Wl,--no-as-needed", "-ltorch_cpu"]
            _run([compiler(), "-shared", "-o", f"{out}.{os.getpid()}", *map(str, objects), *libraries])
            os.replace(f"{out}.{os.getpid()}", out)
    return out


@functools.cache
def load(family: str, *files: str) -> ModuleType:
    """The module emulated_<family>: bind_<family>.cpp, and ``files`` of csrc/cuda or tests/emulator.

    Without ``files`` that is csrc/cuda/<family>.cu.
    """
    sources = [HERE / f"bind_{family}.cpp"]
    for file in files or (f"{family}.cu",):
        sources.append(CUDA / file if (CUDA / file).exists() else HERE / file)
    name = f"emulated_{family}"
    spec = importlib.util.spec_from_file_location(name, module_path(name, sources))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
