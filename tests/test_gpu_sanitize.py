"""tests/gpu_sanitize.py reads compute-sanitizer's output; the tool itself needs a GPU."""

import gpu_sanitize

OUTPUT = """
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at inq::cuda::linear_kernel+0x70 in linear.cuh:120
========= Error: Race reported between Write access at a.cuh:10 and Read access at b.cuh:20 [4 hazards]
========= Warning: (Warp Level Programming) Potential RAW hazard detected at __shared__ 0x0
========= ERROR SUMMARY: 2 errors
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
.. 2 passed
"""


def test_findings_are_what_is_not_allowed():
    found = gpu_sanitize.findings(OUTPUT, [])
    assert len(found) == 3
    assert gpu_sanitize.findings(OUTPUT, ["a.cuh:10", "Potential RAW"]) == found[:1]


def test_summaries_of_nothing_are_no_findings():
    clean = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
    clean += "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert gpu_sanitize.findings(clean, []) == []


def test_reasons_are_no_patterns():
    assert gpu_sanitize.patterns("# why\n\na.cuh:10  # because\n") == ["a.cuh:10"]
    assert gpu_sanitize.patterns(gpu_sanitize.ALLOWED.read_text()) == []
