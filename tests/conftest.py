"""One thread: on a shared machine, two threads that wait for each other take ten times longer for small tensors. Where
tests want more, idle ones sleep instead of spinning: the processor is the other pytest process's.

Triton's kernels are interpreted on the CPU where there is no GPU. Triton reads the variable when kernels are defined.
"""

import importlib.util
import os
import time

# Read when torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Triton is for Linux; CI checks that it has it.
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_triton_*.py"]

# `make gpu` has eight minutes: tests that have not begun after so many seconds are skipped, and the report counts them.
_WITHIN = float(os.environ.get("INQ_TESTS_WITHIN", "inf"))
_BEGAN = time.monotonic()


def pytest_collection_modifyitems(items):
    """Interpreted kernels take longest: begun first, or one process ends minutes after the other."""
    if not torch.cuda.is_available():
        items.sort(key=lambda item: not item.path.name.startswith("test_triton_"))


def pytest_runtest_setup(item):
    if time.monotonic() - _BEGAN > _WITHIN:
        pytest.skip(f"left out: {_WITHIN:g} seconds were over (INQ_TESTS_WITHIN)")


@pytest.fixture
def native_as_before():
    """The compiled library's instruction set and torch's threads after a test as they were before; it is loaded."""
    leaf = torch.ops.inq_cpu
    isa, threads = leaf.isa(), torch.get_num_threads()
    yield
    leaf.set_isa(isa)
    torch.set_num_threads(threads)


@pytest.fixture
def guarded(monkeypatch):
    """``support_triton.guarded`` around a whole test, which must have made buffers."""
    from support_triton import guarded

    with guarded(monkeypatch) as made:
        yield
    assert made


@pytest.fixture(scope="module")
def quick_interpreter():
    """``support_interpreter.quick_interpreter`` for a module, where kernels are interpreted."""
    from inq_kernels.triton_ops.launch import INTERPRETED

    if not INTERPRETED:
        yield
        return
    from support_interpreter import quick_interpreter

    with quick_interpreter():
        yield
