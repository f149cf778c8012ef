"""select() is a pure function of its arguments; an explicit request never falls back; every operator is implemented."""

import pytest
import torch

from inq_kernels import library
from inq_kernels.backends import BACKENDS, BackendError, availability, select

HERE = {"reference": None, "cpu": None, "triton": "no triton", "cuda": "no GPU"}


@pytest.mark.parametrize("requested", ["reference", "cpu"])
def test_a_backend_that_is_there_is_taken(requested):
    assert select("linear", requested, HERE) == requested


def test_no_request_gets_one_that_is_there():
    nothing_else = {**dict.fromkeys(BACKENDS, "not built"), "reference": None}
    assert select("linear", "", nothing_else) == "reference"
    assert select("linear", "", HERE) == "cpu"
    assert select("linear", "", HERE, "cuda") == select("linear", "", HERE, dtype=torch.float16) == "reference"
    with pytest.raises(BackendError, match="it computes on the CPU, got tensors on cuda"):
        select("linear", "cpu", HERE, "cuda")
    with pytest.raises(BackendError, match="it computes in float32 and bfloat16, got torch.float16"):
        select("linear", "cpu", HERE, dtype=torch.float16)


@pytest.mark.parametrize("requested", ["triton", "cuda"])
def test_a_request_never_falls_back(requested):
    with pytest.raises(BackendError) as error:
        select("conv2d", requested, HERE)
    assert str(error.value) == f"inq.conv2d: backend {requested!r} was asked for and cannot run: {HERE[requested]}"


@pytest.mark.parametrize("requested", ["CPU", "gpu", " "])
def test_an_unknown_name(requested):
    with pytest.raises(ValueError, match=rf"^inq.pack: backend: expected one of \(.*\), got '{requested}'$"):
        select("pack", requested, HERE)


def test_select_is_pure(monkeypatch):
    given = dict(HERE)
    monkeypatch.setenv("INQ_BACKEND", "cuda")
    assert [select("linear", "reference", given) for _ in range(2)] == ["reference"] * 2
    assert select("linear", "", given) == select("linear", "", given) != "cuda"
    assert given == HERE


def test_availability_has_a_reason_for_every_absence():
    here = availability()
    assert tuple(here) == BACKENDS
    assert here["reference"] is None
    assert all(reason is None or reason for reason in here.values())


@pytest.mark.parametrize("name", library.SCHEMAS)
def test_every_operator_is_implemented(name):
    for key in ("CPU", "CUDA", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"inq::{name}", key), key


def test_an_environment_request_holds_for_every_operator(monkeypatch):
    monkeypatch.setenv("INQ_BACKEND", "triton")
    for call in (
        lambda: torch.ops.inq.exponents(torch.ones(1, 1), 4, "paper", "tensor", "max"),
        lambda: torch.ops.inq.pack(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int8), 4, "paper"),
    ):
        with pytest.raises(BackendError, match="'triton' was asked for"):
            call()
