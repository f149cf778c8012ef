"""What can be known of `make gpu` without a GPU: what it runs, for how long, and that its tests mean what they say."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import gpu_ready
import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_here(*words, **environment):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    ).stdout


def test_it_runs_every_test_of_the_kernels_within_eight_minutes():
    command = ["make", "-n", "gpu", "PYTHON=python", "VENV=", "OUT=folder"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tests = {
        "tests/test_gpu.py",
        "tests/test_gpu_fragments.py",
        *(f"tests/{path.name}" for path in (ROOT / "tests").glob("test_triton_*.py")),
    }
    assert set(re.findall(r"tests/\w+\.py", shown)) == {*tests, "tests/gpu_ready.py"}
    limits = [int(seconds) for seconds in re.findall(r"timeout (\d+)", shown)]
    assert len(limits) == 3
    assert "INQ_GPU_BACKEND=cuda" in shown
    assert sum(limits) + 60 <= 8 * 60  # and the build
    within = [int(seconds) for seconds in re.findall(r"(?:WITHIN=|--within )(\d+)", shown)]
    # What has begun can end.
    assert all(limit - begun >= 30 for limit, begun in zip(limits, within, strict=True))
    # A red test ends it before anything is timed: no recipe goes on after an error, and none hides one.
    assert not re.search(r"\|\| true|^-", shown, re.MULTILINE)


@pytest.mark.parametrize(("first", "second", "ended"), [(0, 0, 0), (1, 0, 1), (0, 1, 1), (124, 0, 124), (1, 2, 2)])
def test_a_red_test_stops_it_before_the_benchmarks_and_not_before_other_tests(first, second, ended, tmp_path):
    """make itself, with a Python that notes what it is to run."""
    fake = tmp_path / "python"
    fake.write_text(
        f"""#!/bin/sh
echo "$@" >> {tmp_path}/ran
case "$*" in
  *processes) echo "-n 3";;
  *gpu-tests-cuda*) exit {first};;
  *gpu-tests.xml*) exit {second};;
esac
"""
    )
    fake.chmod(0o755)
    command = ["make", "gpu", f"PYTHON={fake}", "VENV=", f"OUT={tmp_path / 'out'}", "INQ_CUDA_ARCHS=none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    ran = (tmp_path / "ran").read_text().splitlines()
    assert "gpu_ready.py" in ran[0]  # before anything is built
    assert "pip install" in ran[1]
    assert sum("-m pytest" in line and "-n 3" in line for line in ran) == 2
    assert ("bench" in ran[-1]) == (ended == 0)
    assert (done.returncode == 0) == (ended == 0)
    assert not ended or f"Error {ended}" in done.stderr


def test_what_is_missing_is_told_before_anything_is_built():
    there = {"torch": "2.11.0+cu130", "triton": "3.6.0", "setuptools": "80.9.0", "pytest-xdist": "3.8.0"}
    there |= dict.fromkeys(set(gpu_ready.NEEDED) - set(there), "1.0")
    assert gpu_ready.missing(there.get) == []
    assert gpu_ready.processes(there.get) == "-n 8"
    there |= {"setuptools": "70.2.0", "hypothesis": None, "pytest-xdist": None}
    assert gpu_ready.missing(there.get) == ["setuptools ≥ 77: got 70.2.0", "hypothesis: not installed"]
    assert gpu_ready.processes(there.get) == ""
    assert gpu_ready.missing() == []


def test_what_torch_says_when_asked_for_waiting_is_no_error():
    """torch.cuda.set_sync_debug_mode warns when it has switched: as an error it would leave later tests broken."""
    text = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
    warnings.warn(text, UserWarning, stacklevel=1)


def test_what_has_no_time_left_is_skipped_and_counted():
    shown = pytest_here("-rs", "tests/test_triton_codec.py", INQ_TESTS_WITHIN="0")
    assert re.search(r"SKIPPED \[\d+\] .*left out: 0 seconds were over", shown)
    assert " passed" not in shown


def test_tests_of_the_device_are_skipped_without_one():
    shown = pytest_here("-rs", "tests/test_gpu.py")
    assert "needs a CUDA device: torch finds none here" in shown
    assert " passed" not in shown


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="there is a GPU: the tests themselves run")
def test_tests_of_the_device_pass_where_kernels_are_interpreted():
    """Graphs, streams and waiting are stand-ins here: what is shown is that operators get what they take."""
    names = "product or graphs or storage_does or layouts_have or two_streams"
    shown = pytest_here("tests/test_gpu.py", "-k", f"({names}) and not beyond", INQ_FAKE_CUDA="1")
    assert re.search(r"\d{2} passed", shown), shown
    assert "failed" not in shown
