"""select() is a pure function of its arguments; an explicit request never falls back; every operator is implemented."""

from types import SimpleNamespace

import pytest
import torch

import inq_kernels as inq
from inq_kernels import backends, library
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


GPU = {**HERE, "triton": None}


def test_triton_runs_on_a_gpu_and_interpreted_only_on_request():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert select("linear", "", GPU, "cuda", dtype) == "triton"
    assert select("linear", "", GPU, "cuda", torch.float64) == "reference"
    assert select("linear", "", GPU, "cpu", interpreted=True) == "cpu"
    assert select("linear", "triton", GPU, "cpu", interpreted=True) == "triton"
    with pytest.raises(BackendError, match="CUDA devices, or on the CPU with TRITON_INTERPRET=1; got .* cpu"):
        select("linear", "triton", GPU, "cpu")
    with pytest.raises(BackendError, match="float32, bfloat16 and float16, got torch.float64"):
        select("linear", "triton", GPU, "cuda", torch.float64)


LIBRARY = {**GPU, "cuda": None}


def test_the_cuda_library_is_taken_for_what_it_has():
    for dtype in (torch.bfloat16, torch.float16):
        assert select("linear", "", LIBRARY, "cuda", dtype) == "cuda"
        assert select("conv2d", "", LIBRARY, "cuda", dtype) == "triton"
    assert select("linear", "", LIBRARY, "cuda", torch.float32) == "triton"
    assert select("pack", "", LIBRARY, "cuda", torch.float32) == "cuda"
    assert select("pack", "", LIBRARY, "cuda", torch.float64) == "reference"
    assert select("linear", "", LIBRARY, "cpu", torch.bfloat16) == "cpu"
    assert select("linear_fp8", "", LIBRARY, "cuda", capability=90) == "cuda"
    assert select("linear_fp8", "", LIBRARY, "cuda", capability=100) == "triton"
    for op, device, dtype, capability, words in (
        ("conv2d", "cuda", torch.float16, 90, "does not have it; Triton's backend does"),
        ("linear", "cuda", torch.float32, 90, "float16, bfloat16, got torch.float32"),
        ("linear", "cpu", torch.float16, 90, "CUDA devices, got tensors on cpu"),
        ("linear_fp8", "cuda", torch.float16, 80, "9.0 alone, and the device has 8.0"),
        ("linear", "cuda", torch.float16, 75, "8.0 or more, and the device has 7.5"),
    ):
        with pytest.raises(BackendError, match=words):
            select(op, "cuda", LIBRARY, device, dtype, capability=capability)


def test_the_capability_is_that_of_the_tensors_device(monkeypatch):
    """A Hopper GPU beside an Ampere one, whichever is the current device."""
    monkeypatch.delenv("INQ_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: ((9, 0), (8, 0))[index or 0])
    monkeypatch.setattr(backends, "_availability", lambda: LIBRARY)
    monkeypatch.setattr(backends, "_select_here", backends._select_here.__wrapped__)
    for index, expected in ((0, "cuda"), (1, "triton"), (0, "cuda")):
        like = SimpleNamespace(device=torch.device("cuda", index), is_cpu=False)
        assert backends.choose("linear_fp8", like, torch.bfloat16) == expected


def test_triton_moves_weights_into_its_own_layouts(monkeypatch):
    """The CUDA library has no kernel for them."""
    from inq_kernels import layouts

    fmt, asked = inq.Format(4), []
    monkeypatch.delenv("INQ_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_availability", lambda: LIBRARY)
    monkeypatch.setattr(backends, "choose", lambda *a: "cuda")

    def implementation(op, backend):
        asked.append((op, backend))
        return lambda weight, *sizes: getattr(layouts, op)(weight, *sizes[:-3], fmt, sizes[-1])

    monkeypatch.setattr(backends, "_implementation", implementation)
    stored = torch.zeros(16, fmt.row_bytes(64), dtype=torch.uint8)
    for layout, expected in (("slices_fp16", "triton"), ("fragments_fp16", "cuda")):
        made = torch.ops.inq.prepack(stored, 64, 4, "paper", layout)
        torch.ops.inq.unprepack(made, 16, 64, 4, "paper", layout)
        assert asked[-2:] == [("prepack", expected), ("unprepack", expected)]
    monkeypatch.setenv("INQ_BACKEND", "cuda")
    torch.ops.inq.prepack(stored, 64, 4, "paper", "slices_fp16")
    assert asked[-1] == ("prepack", "cuda")


def test_the_layout_of_the_cuda_library(monkeypatch):
    monkeypatch.setattr(backends, "_select_here", lambda *a: select(*a[:2], LIBRARY, *a[2:]))
    monkeypatch.delenv("INQ_BACKEND", raising=False)
    fmt, layout = inq.Format(4), backends.preferred_layout
    assert layout("cuda", torch.bfloat16, fmt) == "fragments_bf16"
    assert layout("cuda", torch.float16, fmt) == "fragments_fp16"
    # What the library does not multiply is Triton's.
    assert layout("cuda", torch.float32, fmt) == layout("cuda", torch.float16, fmt, op="conv2d") == "slices_fp16"


def test_why_triton_is_not_there(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in backends._triton_unavailable()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "8.0 or more, and the device has 7.5" in backends._triton_unavailable()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "PTX" in backends._triton_unavailable()
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def absent():
        raise ImportError("no such module")

    monkeypatch.setattr(backends, "_triton_operators", absent)
    assert "pip install 'inq_kernels[triton]'): no such module" in backends._triton_unavailable()


def test_the_layout_is_that_of_the_backend_which_runs(monkeypatch):
    fmt, dense = inq.Format(4), inq.Format(4, "dense")
    monkeypatch.setattr(backends, "_select_here", lambda *a: select(*a[:2], GPU, *a[2:], interpreted=True))
    layout = backends.preferred_layout
    monkeypatch.delenv("INQ_BACKEND", raising=False)
    assert layout("cuda", torch.bfloat16, fmt) == "slices_bf16"
    assert layout("cuda", torch.float16, fmt) == layout("cuda", torch.float32, fmt) == "slices_fp16"
    assert layout("cuda", torch.bfloat16, dense) == "slices_fp16"
    assert layout("cuda", torch.float64, fmt) == layout("cpu", torch.float64, fmt) == "storage"
    assert layout("cpu", torch.float32, fmt) == "cpu16"
    assert layout("cpu", torch.float32, fmt, "triton") == "slices_fp16"
    assert layout("cpu", torch.float32, fmt, "cuda") == layout("cpu", torch.float32, fmt, "nonsense") == "storage"


@pytest.mark.parametrize("layout", ["cpu16", "slices_fp16", "slices_bf16"])
def test_a_module_takes_its_layout_along_or_leaves_it(layout, monkeypatch):
    module = inq.Linear.from_float(torch.nn.Linear(40, 24), inq.Format(4))
    expected, state = module(torch.ones(1, 40)), module.state_dict()["weight"]
    module._lay_out(layout)
    assert torch.equal(module.state_dict()["weight"], state)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    module.to("cpu")
    assert backends.layouts.layout_of(module.weight) == (layout if layout == "cpu16" else "storage")
    assert torch.equal(module(torch.ones(1, 40)), expected)


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
    monkeypatch.setenv("INQ_BACKEND", "cuda")
    for call in (
        lambda: torch.ops.inq.exponents(torch.ones(1, 1), 4, "paper", "tensor", "max"),
        lambda: torch.ops.inq.pack(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int8), 4, "paper"),
    ):
        with pytest.raises(BackendError, match="'cuda' was asked for"):
            call()
