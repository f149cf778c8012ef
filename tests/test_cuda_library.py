"""The compiled CUDA library without a GPU: it loads, its operators are declared, and what it would choose.

The file is there where nvcc was (INQ_CUDA_ARCHS; .ci/run builds it for all GPUs). Torch without CUDA has no
libtorch_cuda, so a stub of that name stands in, as when the library was linked.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inq_kernels import cuda, library

LIBRARY = Path(cuda.__file__).parent / "_cuda.so"
pytestmark = pytest.mark.skipif(
    not LIBRARY.exists() and os.environ.get("INQ_CUDA_ARCHS", "none") == "none",
    reason="the CUDA library is not built here",
)
SCRIPT = """
import ctypes, json, sys
import torch
if len(sys.argv) > 1:
    ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
from pathlib import Path
from torch._subclasses.fake_tensor import FakeTensorMode
import inq_kernels as inq
from inq_kernels import cuda, fragments, layouts
why = cuda.load(Path(cuda.__file__).parent / "_cuda.so")
assert why is None, why
found = {"schemas": {}, "shapes": {}, "plans": {}}
leaf = torch.ops.inq_cuda
for name in (*cuda.OPERATORS, "decode", "finish", "plan"):
    found["schemas"][name] = str(getattr(leaf, name).default._schema)
with FakeTensorMode(allow_non_fake_inputs=True):
    for bits, dense, dtype in ((4, False, torch.float16), (5, True, torch.bfloat16)):
        fmt = inq.Format(bits, "dense" if dense else "paper")
        shape = layouts.shape(cuda.LAYOUTS[dtype], 40, 100, fmt)
        w, e = torch.empty(shape, dtype=torch.uint8), torch.empty(40, 1, dtype=torch.int8)
        key = f"{bits}"
        x, grad = torch.empty(2, 3, 100, dtype=dtype), torch.empty(2, 3, 40, dtype=dtype)
        found["shapes"][key] = [
            list(leaf.linear(x, w, e, None, None, bits, dense).shape),
            list(leaf.linear_dx(grad, w, e, None, 100, bits, dense).shape),
            list(leaf.decode(w, 40, 100, bits, dense, dtype).shape),
        ]
for m in (1, 16, 64, 256, 2047):
    for capability in (80, 90):
        found["plans"][f"{m} {capability}"] = leaf.plan("linear", m, 4096, 4096, 4, False, True, True, capability, 132)
found["fp8"] = leaf.plan("linear_fp8", 256, 4096, 4096, 4, False, True, True, 80, 108)
found["unaligned"] = leaf.plan("linear", 256, 4096, 4097, 4, False, True, False, 90, 132)
found["dx"] = leaf.plan("linear_dx", 256, 4096, 4096, 4, False, True, True, 90, 132)
try:
    leaf.plan("conv2d", 1, 1, 1, 4, False, True, True, 90, 132)
except Exception as error:
    found["error"] = str(error).splitlines()[0]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder, words = tmp_path_factory.mktemp("stub"), []
    if not torch.backends.cuda.is_built():
        compiler = shutil.which("c++")
        assert compiler, "the library was built here, and there is no compiler any more"
        source, stub = folder / "stub.cpp", folder / "libtorch_cuda.so"
        source.write_text('extern "C" void aoti_torch_get_current_cuda_stream() {}\n')
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-o", str(stub), str(source)], check=True
        )
        words = [str(stub)]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_it_declares_an_operator_for_everything_that_it_is_chosen_for(found):
    assert set(found["schemas"]) == {*cuda.OPERATORS, "decode", "finish", "plan"}
    assert set(cuda.OPERATORS) <= set(library.SCHEMAS)


def test_shapes_for_tracing(found):
    assert found["shapes"] == {each: [[2, 3, 40], [2, 3, 100], [40, 100]] for each in ("4", "5")}


def test_which_kernel_runs(found):
    plans = found["plans"]
    assert all(plans[f"{m} 80"].startswith("mma.sync: ") for m in (1, 16, 64, 256, 2047))
    assert all(plans[f"{m} 90"].startswith("mma.sync: ") for m in (1, 16, 64))
    assert all(plans[f"{m} 90"].startswith("wgmma: ") for m in (256, 2047))
    assert found["unaligned"].startswith("mma.sync: ")
    assert found["dx"].startswith("mma.sync: ")
    assert found["fp8"] == "none: e4m3 products are Hopper's here"
    assert "inq_cuda.plan: op: expected linear, linear_dx or linear_fp8, got conv2d" in found["error"]


def test_no_cpp_symbol_of_torch_is_inside():
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    done = subprocess.run(["nm", "-D", "--undefined-only", "--demangle", str(LIBRARY)], capture_output=True, text=True)
    symbols = [line.split(maxsplit=1)[1] for line in done.stdout.splitlines() if line.strip()]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    assert not [symbol for symbol in symbols if symbol.startswith(("at::", "c10::", "torch::"))]


def test_without_cuda_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    assert cuda.unavailable() == "there is no CUDA device"
