"""setup.py: where the library cannot be built, the package is installed without it and says why."""

import importlib.util
import os
import re
import subprocess
import sys
import types
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


@pytest.fixture(scope="module")
def setup():
    spec = importlib.util.spec_from_file_location("inq_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("none", []),
        ("all", ["80+PTX", "86", "89", "90a", "100a", "120a"]),
        ("80, 90", ["80", "90a"]),
        ("86;120a+PTX", ["86", "120a+PTX"]),
    ],
)
def test_architectures_that_are_asked_for(setup, asked, expected):
    assert setup.cuda_archs(asked) == expected


@pytest.mark.parametrize(
    ("gpus", "expected"), [("9.0\n9.0\n", ["90a"]), ("8.6\n9.0\n", ["86", "90a"]), ("10.3\n8.7\n", ["80+PTX"])]
)
def test_the_architectures_of_this_machine(setup, monkeypatch, gpus, expected):
    monkeypatch.setattr(setup.subprocess, "run", lambda *_, **__: types.SimpleNamespace(stdout=gpus))
    assert setup.cuda_archs("native") == expected


def test_other_architectures_are_refused(setup, monkeypatch):
    for asked in ("75", "70+PTX", "hopper"):
        with pytest.raises(RuntimeError, match=f"expected all, native, none or some of .*, got '{re.escape(asked)}'"):
            setup.cuda_archs(asked)
    monkeypatch.setattr(setup.subprocess, "run", lambda *_, **__: types.SimpleNamespace(stdout="7.5\n"))
    with pytest.raises(RuntimeError, match="got '75'"):
        setup.cuda_archs("native")


def test_make_builds_once(tmp_path):
    """A fresh environment has just been built by pip; make looks at the libraries' rule all the same."""
    rule = re.search(r"^\$\(VENV\)/\.built:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cu").write_text("")
    (tmp_path / "makefile").write_text(
        "VENV := v\nPY := echo built by\nv/.built: v/.ready $(wildcard csrc/*.*)\n"
        + rule
        + "v/.ready:\n\tmkdir -p v && echo by pip && touch $@ v/.built\n"
    )

    def make():
        done = subprocess.run(["make", "-s", "v/.built"], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.split("\n")[:-1]

    assert make() == ["by pip"]
    assert make() == []
    later = (tmp_path / "v" / ".built").stat().st_mtime + 5
    os.utime(tmp_path / "csrc" / "a.cu", (later, later))
    assert make() == ["built by setup.py -q build_ext --inplace"]


def test_only_named_files_are_compiled_for_an_instruction_set(setup):
    flags = {path.name: setup.isa_flags(path) for path in (ROOT / "csrc" / "cpu").glob("*.cpp")}
    assert {name for name, given in flags.items() if given} == {
        name for name in flags if name.endswith(("_avx2.cpp", "_avx512.cpp", "_amx.cpp"))
    }
    assert flags["amx.cpp"] == ""
    assert "-mamx-tile" in flags["linear_amx.cpp"]
    assert "-mavx512f" not in flags["linear_avx2.cpp"]
