"""setup.py: where the library cannot be built, the package is installed without it and says why."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def build(folder, **environment):
    kept = {k: v for k, v in os.environ.items() if k not in ("CXX", "CXXFLAGS", "INQ_REQUIRE_NATIVE")}
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        folder / "lib",
        "--build-temp",
        folder / "t",
    ]
    return subprocess.run(
        [*map(str, command)], cwd=ROOT, env={**kept, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("compiler", ["/nonexistent/c++", "/", "false"])
def test_without_a_compiler(tmp_path, compiler):
    done = build(tmp_path, CXX=compiler)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "lib" / "inq_kernels" / "_cpu.so").exists()
    reason = (tmp_path / "lib" / "inq_kernels" / "_cpu_build.txt").read_text()
    assert reason.startswith("it was installed without one: ")
    assert "the reference will run" in done.stderr


def test_where_it_must_be_built_a_failure_is_one(tmp_path):
    done = build(tmp_path, CXX="/nonexistent/c++", INQ_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "no C++ compiler was found (/nonexistent/c++; CXX names one)" in done.stderr


def test_only_named_files_are_compiled_for_an_instruction_set():
    import importlib.util

    spec = importlib.util.spec_from_file_location("inq_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    flags = {path.name: setup.isa_flags(path) for path in (ROOT / "csrc" / "cpu").glob("*.cpp")}
    assert {name for name, given in flags.items() if given} == {
        name for name in flags if name.endswith(("_avx2.cpp", "_avx512.cpp", "_amx.cpp"))
    }
    assert flags["amx.cpp"] == ""
    assert "-mamx-tile" in flags["linear_amx.cpp"]
    assert "-mavx512f" not in flags["linear_avx2.cpp"]
