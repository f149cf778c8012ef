"""Builds the compiled CPU library. Metadata is in pyproject.toml.

The library holds no Python and no torch C++ symbol (torch's stable ABI), so one file serves every Python and every
torch ≥ 2.11. Where it cannot be built the package installs all the same, runs on the reference implementation, and
``inq doctor`` says why: the reason is left in ``inq_kernels/_cpu_build.txt``.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext as _build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY, REASON = "_cpu.so", "_cpu_build.txt"
# Each set of instructions has files of its own (csrc/cpu/isa.h); these flags are theirs alone.
_AVX2 = "-mavx2 -mfma -mf16c -mbmi2"
_AVX512 = f"{_AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mprefer-vector-width=512"
ISA_FLAGS = {"avx2": _AVX2, "avx512": _AVX512, "amx": f"{_AVX512} -mamx-tile -mamx-bf16"}
# No contraction: a·b + c is fused where the code says so, the same in every build.
CXX_FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -DNDEBUG"


def isa_flags(source: Path) -> str:
    """The flags of a file named ``*_avx2.cpp``, ``*_avx512.cpp`` or ``*_amx.cpp``; none for any other."""
    stem, _, isa = source.stem.rpartition("_")
    return ISA_FLAGS.get(isa, "") if stem else ""


def torch_include() -> Path:
    """Where torch's headers are; found without importing torch, which takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("torch is not in the environment that builds (pip install --no-build-isolation)")
    include = Path(spec.origin).parent / "include"
    if not (include / "torch/csrc/stable/library.h").exists():
        raise RuntimeError(f"torch ≥ 2.11 with its headers is needed to build, found none in {include.parent.name}")
    return include


def ninja_file(include: Path, compiler: str, output: Path) -> str:
    """The text of build.ninja: one rule to compile, one to link."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    csrc = ROOT / "csrc"
    lines = [
        f"cxx = {_escape(compiler)}",
        f"flags = {CXX_FLAGS} -I{_escape(csrc)} {os.environ.get('CXXFLAGS', '')}",
        f"torch = -isystem {_escape(include)} -DTORCH_TARGET_VERSION=0x020b000000000000",
        "rule compile",
        "  command = $cxx $flags $more -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        # torch loads its libraries for itself alone: naming the one with the C functions makes the loader look there.
        f"  command = $cxx -shared -o $out $in -L{_escape(include.parent / 'lib')} -Wl,--no-as-needed -ltorch_cpu "
        f"-Wl,--as-needed {os.environ.get('LDFLAGS', '')}",
    ]
    objects = []
    for source in sorted([*csrc.glob("cpu/*.cpp"), *csrc.glob("register_cpu*.cpp")]):
        more = isa_flags(source)
        if more and not x86:
            continue
        if source.parent == csrc:
            more = "$torch"
        objects.append(f"{source.stem}.o")
        lines += [f"build {objects[-1]}: compile {_escape(source)}", f"  more = {more}"]
    lines += [f"build {_escape(output)}: link {' '.join(objects)}", ""]
    return "\n".join(lines)


def _escape(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class build_ext(_build_ext):
    """Compiles csrc/ with ninja into one plain shared library inside the package."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1], LIBRARY))

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self._build(output)
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            if os.environ.get("INQ_REQUIRE_NATIVE"):
                raise
            output.unlink(missing_ok=True)
            reason = f"it was installed without one: {error}"
            print(f"inq_kernels: no compiled CPU library, the reference will run: {error}", file=sys.stderr)
        else:
            reason = ""
        output.parent.mkdir(parents=True, exist_ok=True)
        (output.parent / REASON).write_text(reason)

    def copy_extensions_to_source(self) -> None:
        # Editable and in-place builds: the package is the source folder.
        target, built = ROOT / "inq_kernels", Path(self.build_lib) / "inq_kernels"
        for name in (LIBRARY, REASON):
            (target / name).unlink(missing_ok=True)
            if (built / name).exists():
                shutil.copy(built / name, target / name)

    def _build(self, output: Path) -> None:
        compiler = os.environ.get("CXX", "").strip() or next(
            filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None
        )
        if compiler is None or shutil.which(compiler.split()[0]) is None:
            raise RuntimeError(f"no C++ compiler was found ({compiler or 'c++, g++, clang++'}; CXX names one)")
        try:
            from ninja import BIN_DIR

            ninja = str(Path(BIN_DIR) / "ninja")
        except ImportError:
            ninja = shutil.which("ninja")
        if ninja is None:
            raise RuntimeError("ninja was not found (pip install ninja)")
        folder = Path(self.build_temp).resolve() / "cpu"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(torch_include(), compiler, output))
        done = subprocess.run([ninja, "-C", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            print(done.stdout, file=sys.stderr)
            lines = [line for line in done.stdout.splitlines() if "error" in line.lower()] or ["ninja failed"]
            raise RuntimeError(f"the compiler failed: {lines[0].strip()}")


def commands() -> dict:
    found = {"build_ext": build_ext}
    try:
        from setuptools.command.bdist_wheel import bdist_wheel
    except ImportError:
        return found

    class any_python(bdist_wheel):
        def get_tag(self) -> tuple[str, str, str]:
            return "py3", "none", super().get_tag()[2]

    return {**found, "bdist_wheel": any_python}


if __name__ == "__main__":  # tests/sanitize.py reads the flags from here
    setup(ext_modules=[Extension("inq_kernels._cpu", sources=[], optional=True)], cmdclass=commands())
