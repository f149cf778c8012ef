"""Builds the two compiled libraries, for CPUs and for CUDA. Metadata is in pyproject.toml.

They hold no Python and no torch C++ symbol (torch's stable ABI), so one file serves every Python and every torch ≥ 2.11
(the CUDA one: of its CUDA major). Where one cannot be built the package installs all the same, runs on what there is,
and ``inq doctor`` says why: the reason is left in ``inq_kernels/_cpu_build.txt`` and ``_cuda_build.txt``.

The CUDA library is built wherever nvcc is found, and needs no GPU. ``INQ_CUDA_ARCHS``: ``all`` (the default),
``native`` (the GPUs of this machine), ``none``, or a list such as ``80,90a``.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext as _build_ext

ROOT = Path(__file__).resolve().parent
LIBRARIES = {"cpu": ("_cpu.so", "_cpu_build.txt"), "cuda": ("_cuda.so", "_cuda_build.txt")}
# Each set of instructions has files of its own (csrc/cpu/isa.h); these flags are theirs alone.
_AVX2 = "-mavx2 -mfma -mf16c -mbmi2"
_AVX512 = f"{_AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mprefer-vector-width=512"
ISA_FLAGS = {"avx2": _AVX2, "avx512": _AVX512, "amx": f"{_AVX512} -mamx-tile -mamx-bf16"}
# No contraction: a·b + c is fused where the code says so, the same in every build.
CXX_FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -DNDEBUG"
# Ampere to Blackwell; the first as PTX too, for what comes later.
CUDA_ARCHS = ("80", "86", "89", "90a", "100a", "120a")
# wgmma and setmaxnreg exist on Hopper alone: *_hopper.cu is compiled for it and for nothing else.
HOPPER = "90a"
NVCC_FLAGS = (
    "-std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wno-unknown-pragmas -DNDEBUG --fmad=false -lineinfo "
    "--expt-relaxed-constexpr -Werror all-warnings"
)


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


TORCH_FLAGS = "-DTORCH_TARGET_VERSION=0x020b000000000000"


def cpu_ninja_file(include: Path, compiler: str, output: Path) -> str:
    """The text of build.ninja: one rule to compile, one to link."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    csrc = ROOT / "csrc"
    lines = [
        f"cxx = {_escape(compiler)}",
        f"flags = {CXX_FLAGS} -I{_escape(csrc)} {os.environ.get('CXXFLAGS', '')}",
        f"torch = -isystem {_escape(include)} {TORCH_FLAGS}",
        *_COMPILE,
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


def cuda_ninja_file(include: Path, compiler: str, nvcc: str, archs: Sequence[str], output: Path) -> str:
    """The text of build.ninja for the CUDA library; ``archs`` as from ``cuda_archs``."""
    csrc, cuda = ROOT / "csrc", cuda_home(nvcc)
    lines = [
        f"cxx = {_escape(compiler)}",
        f"nvcc = {_escape(nvcc)}",
        f"flags = {CXX_FLAGS} -I{_escape(csrc)} {os.environ.get('CXXFLAGS', '')}",
        # The current stream's C function is declared with USE_CUDA alone.
        f"torch = -isystem {_escape(include)} -isystem {_escape(cuda / 'include')} {TORCH_FLAGS} -DUSE_CUDA",
        *_COMPILE,
        "rule device",
        f"  command = $nvcc -ccbin $cxx {NVCC_FLAGS} -I{_escape(csrc)} $more -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule stub",
        "  command = $cxx -shared -fPIC -Wl,-soname,libtorch_cuda.so -o $out -x c++ $in",
        "rule link",
        # A CPU build of torch has no libtorch_cuda to link with: a stub of its name stands in, since the name is all
        # that the loader needs. cudart comes along, so that the driver alone is asked of the machine.
        f"  command = $cxx -shared -o $out $in -L{_escape(include.parent / 'lib')} -L{_escape(cuda / 'lib64')} "
        "-Wl,--no-as-needed -ltorch_cpu -L. -l:libtorch_cuda.so -Wl,--as-needed -Wl,--exclude-libs,ALL "
        f"-lcudart_static -ldl -lrt -lpthread {os.environ.get('LDFLAGS', '')}",
        "rule write",
        "  command = echo 'extern \"C\" void aoti_torch_get_current_cuda_stream() {}' > $out",
        "build stub.cpp: write",
        "build libtorch_cuda.so: stub stub.cpp",
    ]
    objects = []
    for source in sorted(csrc.glob("cuda/*.cu")):
        wanted = (HOPPER,) if source.stem.endswith("_hopper") else archs
        objects.append(f"{source.stem}.cu.o")
        lines += [f"build {objects[-1]}: device {_escape(source)}", f"  more = {' '.join(map(_gencode, wanted))}"]
    for source in sorted(csrc.glob("register_cuda*.cpp")):
        objects.append(f"{source.stem}.o")
        lines += [f"build {objects[-1]}: compile {_escape(source)}", "  more = $torch"]
    lines += [f"build {_escape(output)}: link {' '.join(objects)} | libtorch_cuda.so", ""]
    return "\n".join(lines)


_COMPILE = (
    "rule compile",
    "  command = $cxx $flags $more -MMD -MF $out.d -c $in -o $out",
    "  depfile = $out.d",
    "  deps = gcc",
)


def cuda_archs(asked: str) -> list[str]:
    """What ``INQ_CUDA_ARCHS`` asks for, as nvcc's numbers; "80+PTX" is code for it and for what comes later.

    Raises:
        RuntimeError: it names an architecture that the kernels are not written for, or no GPU is found for ``native``.
    """
    if asked == "none":
        return []
    if asked == "all":
        return [f"{CUDA_ARCHS[0]}+PTX", *CUDA_ARCHS[1:]]
    if asked == "native":
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        try:
            text = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(f"INQ_CUDA_ARCHS=native: no GPU is found: {error}") from error
        found = {line.strip().replace(".", "") for line in text.splitlines() if line.strip()}
        known = {arch.removesuffix("a") for arch in CUDA_ARCHS}
        # A GPU between those that are listed runs what its driver makes of the first one's PTX.
        ptx = f"{CUDA_ARCHS[0]}+PTX"
        asked = ",".join(sorted({n if n in known or int(n) < int(CUDA_ARCHS[0]) else ptx for n in found}))
    archs = []
    for name in filter(None, asked.replace(" ", ",").replace(";", ",").split(",")):
        number = name.removesuffix("+PTX").removesuffix("a")
        known = next((arch for arch in CUDA_ARCHS if arch.removesuffix("a") == number), None)
        if known is None:
            raise RuntimeError(f"INQ_CUDA_ARCHS: expected all, native, none or some of {CUDA_ARCHS}, got {name!r}")
        archs.append(known + "+PTX" * name.endswith("+PTX"))
    return archs


def _gencode(arch: str) -> str:
    number = arch.removesuffix("+PTX")
    code = f"sm_{number}" if number == arch else f"[sm_{number},compute_{number}]"
    return f"-gencode arch=compute_{number},code={code}"


def cuda_home(nvcc: str) -> Path:
    """Where CUDA's headers and libraries are: above nvcc, or where it says that it is."""
    for place in (os.environ.get("CUDA_HOME"), Path(nvcc).resolve().parent.parent, "/usr/local/cuda"):
        if place and (Path(place) / "include" / "cuda_runtime.h").exists():
            return Path(place)
    raise RuntimeError(f"CUDA's headers were not found beside {nvcc} (CUDA_HOME names the folder)")


def _escape(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _compiler() -> str:
    compiler = os.environ.get("CXX", "").strip() or next(
        filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None
    )
    if compiler is None or shutil.which(compiler.split()[0]) is None:
        raise RuntimeError(f"no C++ compiler was found ({compiler or 'c++, g++, clang++'}; CXX names one)")
    return compiler


def _cpu_text(output: Path) -> str:
    return cpu_ninja_file(torch_include(), _compiler(), output)


def _cuda_text(output: Path) -> str | None:
    """None: it was asked not to be."""
    archs = cuda_archs(os.environ.get("INQ_CUDA_ARCHS", "").strip() or "all")
    if not archs:
        return None
    nvcc = os.environ.get("NVCC", "").strip() or shutil.which("nvcc")
    if nvcc is None and os.environ.get("CUDA_HOME"):
        nvcc = shutil.which(str(Path(os.environ["CUDA_HOME"], "bin", "nvcc")))
    if nvcc is None or shutil.which(nvcc) is None:
        raise RuntimeError(f"no CUDA compiler was found ({nvcc or 'nvcc'}; NVCC or CUDA_HOME names one)")
    return cuda_ninja_file(torch_include(), _compiler(), nvcc, archs, output)


class build_ext(_build_ext):
    """Compiles csrc/ with ninja into plain shared libraries inside the package."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1], LIBRARIES[_kind(fullname)][0]))

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        kind = _kind(ext.name)
        output.unlink(missing_ok=True)
        reason = ""
        try:
            text = (_cpu_text if kind == "cpu" else _cuda_text)(output)
            if text is None:
                reason = "it was installed without one: INQ_CUDA_ARCHS=none"
            else:
                self._build(kind, text)
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            # Who asks for architectures wants the library, as CI does.
            if os.environ.get("INQ_REQUIRE_NATIVE") and (kind == "cpu" or os.environ.get("INQ_CUDA_ARCHS")):
                raise
            output.unlink(missing_ok=True)
            reason = f"it was installed without one: {error}"
            instead = "no compiled CPU library, the reference will run" if kind == "cpu" else "no CUDA library"
            print(f"inq_kernels: {instead}: {error}", file=sys.stderr)
        output.parent.mkdir(parents=True, exist_ok=True)
        (output.parent / LIBRARIES[kind][1]).write_text(reason)

    def copy_extensions_to_source(self) -> None:
        # Editable and in-place builds: the package is the source folder.
        target, built = ROOT / "inq_kernels", Path(self.build_lib) / "inq_kernels"
        for name in (name for names in LIBRARIES.values() for name in names):
            (target / name).unlink(missing_ok=True)
            if (built / name).exists():
                shutil.copy(built / name, target / name)

    def _build(self, kind: str, text: str) -> None:
        try:
            from ninja import BIN_DIR

            ninja = str(Path(BIN_DIR) / "ninja")
        except ImportError:
            ninja = shutil.which("ninja")
        if ninja is None:
            raise RuntimeError("ninja was not found (pip install ninja)")
        folder = Path(self.build_temp).resolve() / kind
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(text)
        done = subprocess.run([ninja, "-C", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            print(done.stdout, file=sys.stderr)
            lines = [line for line in done.stdout.splitlines() if "error:" in line.lower()] or ["ninja failed"]
            raise RuntimeError(f"the compiler failed: {lines[0].strip()}")


def _kind(fullname: str) -> str:
    return fullname.rpartition("_")[2]


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
    extensions = [Extension(f"inq_kernels._{kind}", sources=[], optional=True) for kind in LIBRARIES]
    setup(ext_modules=extensions, cmdclass=commands())
