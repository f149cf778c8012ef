"""``make sanitize``: the C++ kernels and their own tests, built with sanitizers, run to the end without a report.

Two builds: address with undefined behaviour, and threads. The kernels need no torch; parallel_for is std::thread's here
(tests/native/threads.cpp), which the thread sanitizer understands. Not collected by pytest.
"""

import importlib.util
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "tests" / "native"
SANITIZERS = {
    "address, undefined behaviour": "-fsanitize=address,undefined -fno-sanitize-recover=all",
    "threads": "-fsanitize=thread",
}


def build_settings():
    """setup.py as a module: its flags are the library's."""
    spec = importlib.util.spec_from_file_location("inq_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ninja_file(settings, flags: str, mains: list[Path], others: list[Path]) -> str:
    """A program of each of ``mains``, with ``others`` and the kernels."""
    lines = [
        f"cxx = {os.environ.get('CXX', 'c++')}",
        f"flags = {flags} -I{ROOT / 'csrc'} -I{NATIVE}",
        "rule compile",
        "  command = $cxx $flags $more -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx $flags $in -o $out -pthread",
    ]
    shared = [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), *others]
    for source in [*shared, *mains]:
        # A main runs on every machine: test_amx.cpp asks first what this one has.
        more = settings.isa_flags(source) if source.parent != NATIVE else ""
        lines += [f"build {source.stem}.o: compile {source}", f"  more = {more}"]
    objects = " ".join(f"{source.stem}.o" for source in shared)
    lines += [f"build {main.stem}: link {main.stem}.o {objects}" for main in mains]
    return "\n".join([*lines, ""])


def main(only: list[str]) -> int:
    settings = build_settings()
    tests = sorted(NATIVE.glob("test_*.cpp"))
    others = [source for source in sorted(NATIVE.glob("*.cpp")) if not source.stem.startswith(("test_", "bench_"))]
    # Without optimisation gcc warns about its own intrinsics: warnings are the library build's matter.
    cxx = settings.CXX_FLAGS.replace("-O3", "-O1 -g -fno-omit-frame-pointer -w").replace("-DNDEBUG", "")
    failed = []
    for name, flags in SANITIZERS.items():
        if only and not any(word in name for word in only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "build.ninja").write_text(ninja_file(settings, f"{cxx} {flags}", tests, others))
            subprocess.run([sys.executable, "-m", "ninja", "-C", folder, "--quiet"], check=True)
            for test in tests:
                status = subprocess.run([str(Path(folder, test.stem))], check=False).returncode
                print(f"{test.stem}, {name}: {'clean' if status == 0 else f'FAILED with status {status}'}", flush=True)
                if status:
                    failed.append(f"{shlex.quote(test.stem)} ({name})")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
