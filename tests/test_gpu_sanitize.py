"""tests/gpu_sanitize.py reads compute-sanitizer's output; the tool itself needs a GPU."""

import re
from pathlib import Path

import gpu_sanitize
import pytest

from inq_kernels import cuda

TESTS = (gpu_sanitize.HERE / "test_gpu.py").read_text()
LIBRARY = Path(cuda.__file__).parent / "_cuda.so"

OUTPUT = """
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at inq::cuda::linear_kernel+0x70 in linear.cuh:120
========= Error: Race reported between Write access at a.cuh:10 and Read access at b.cuh:20 [4 hazards]
========= Warning: (Warp Level Programming) Potential RAW hazard detected at __shared__ 0x0
========= Internal Sanitizer Error: the launch was not tracked. Errors might go undetected.
========= ERROR SUMMARY: 2 errors
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
.. 2 passed
"""


def test_findings_are_what_is_not_allowed():
    found = gpu_sanitize.findings(OUTPUT, [])
    assert len(found) == 4
    assert gpu_sanitize.findings(OUTPUT, ["a.cuh:10", "Potential RAW"]) == [found[0], found[3]]


def test_summaries_of_nothing_are_no_findings():
    clean = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
    clean += "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert gpu_sanitize.findings(clean, []) == []


def test_every_name_selects_a_test_without_graphs():
    """A pattern that selects nothing would be a clean report."""
    tests = dict(re.findall(r"^def (test_\w+)\(.*?\n(.*?)(?=^\S|\Z)", TESTS, re.DOTALL | re.MULTILINE))
    for part in gpu_sanitize.SELECTED:
        chosen = [name for name in tests if part in name]
        assert chosen, part
        assert not [name for name in chosen if "graph" in tests[name] or "RUNS" in tests[name]], part


def test_the_command():
    words = gpu_sanitize.command("/tools/compute-sanitizer", "memcheck")
    assert words[:5] == ["/tools/compute-sanitizer", "--tool", "memcheck", "--kernel-name", "kns=3inq4cuda"]
    assert words[words.index("-k") + 1].startswith("integers_are_exact or ")


@pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA library is not built here")
def test_the_filter_is_a_part_of_the_kernels_names():
    assert f"_ZN{gpu_sanitize.KERNELS}".encode() in LIBRARY.read_bytes()


def test_reasons_are_no_patterns():
    assert gpu_sanitize.patterns("# why\n\na.cuh:10  # because\n") == ["a.cuh:10"]
    assert gpu_sanitize.patterns(gpu_sanitize.ALLOWED.read_text()) == []
