"""What can be known of `make gpu` without a GPU: what it runs, for how long, and that its tests mean what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

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
    assert set(re.findall(r"tests/\w+\.py", shown)) == tests
    limits = [int(seconds) for seconds in re.findall(r"timeout (\d+)", shown)]
    assert len(limits) == 3
    assert "INQ_GPU_BACKEND=cuda" in shown
    assert sum(limits) + 60 <= 8 * 60  # and the build
    within = [int(seconds) for seconds in re.findall(r"(?:WITHIN=|--within )(\d+)", shown)]
    # What has begun can end.
    assert all(limit - begun >= 30 for limit, begun in zip(limits, within, strict=True))
    # A red test ends it before anything is timed: no recipe goes on after an error, and none hides one.
    assert not re.search(r"\|\| true|^-", shown, re.MULTILINE)


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
