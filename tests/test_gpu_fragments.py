"""The fragments of mma, ldmatrix, movmatrix, wgmma and TMA: the emulator's are a Hopper GPU's, bit for bit.

The same kernels run in both, on numbers that are all different; sums are of small integers, hence exact.
"""

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support_emulator import emulated, load

FOLDER = Path(__file__).resolve().parent / "emulator"
E4M3 = torch.float8_e4m3fn


def compile_fragments(folder):
    out = folder / "fragments.so"
    includes = [f"-I{FOLDER.parent.parent / 'csrc' / 'cuda'}", f"-I{FOLDER}"]
    flags = ["-std=c++20", "-O2", "-gencode", "arch=compute_90a,code=sm_90a", "-shared", "-Xcompiler", "-fPIC"]
    command = ["nvcc", *flags, *includes]
    done = subprocess.run(
        [*command, "-o", str(out), str(FOLDER / "fragments_gpu.cu")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def fragments(tmp_path_factory):
    function = ctypes.CDLL(str(compile_fragments(tmp_path_factory.mktemp("fragments")))).run_good
    word = ctypes.c_size_t
    function.argtypes = [ctypes.c_char_p, word, word, word, ctypes.c_int, ctypes.c_int]
    return function


def ints(*shape, most):
    return torch.randint(-most, most + 1, shape)


def cases():
    torch.manual_seed(0)
    box = torch.arange(20 * 56).view(20, 56).bfloat16()
    yield "transpose", ints(45, 70, most=30000).short(), None, (70, 45), torch.int16, 70, 45
    yield "mma_pipelined", ints(16, 160, most=8).half(), ints(8, 160, most=8).half(), (16, 8), torch.float32, 160, 0
    a, b = ints(2, 16, 16, most=8).bfloat16()
    yield "mma_transposed", a, b, (16, 16), torch.float32, 0, 0
    yield "warp_functions", ints(32, most=2**30).int(), None, (6, 32), torch.int32, 0, 0
    yield "named_barriers", ints(64, most=100).int(), None, (64,), torch.int32, 0, 5
    yield "bulk", ints(512, most=2**30).int(), None, (512,), torch.int32, 2048, 0
    for name in ("box", "box swizzled"):
        for column, row in ((0, 0), (8, 3), (-5, -3), (40, 17)):
            yield name, box, box, (8, 32), torch.bfloat16, 0, (row + 128) * 256 + column + 128
    for name, columns, dtype in (("f16", 64, torch.half), ("bf16", 128, torch.bfloat16), ("e4m3", 32, E4M3)):
        a, b = (ints(rows, 352, most=8).to(dtype) for rows in (64, columns))
        yield f"wgmma_{name}", a, b, (64, columns), torch.float32, 352, 0
    a, b = ints(64, 16, most=8).half(), ints(16, 16, most=8).half()
    yield "wgmma_written_by_threads", a, b, (64, 16), torch.float32, 0, 0


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available()
    or torch.cuda.get_device_capability()[0] != 9
    or shutil.which("nvcc") is None
    or importlib.util.find_spec("pybind11") is None,
    reason="needs a Hopper GPU, nvcc and pybind11",
)
@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case[0])
def test_the_hardware_agrees(fragments, case):
    name, a, b, shape, dtype, n, m = case
    on_gpu = [None if x is None else x.cuda() for x in (a, b)]
    c = torch.zeros(shape, dtype=dtype, device="cuda")
    addresses = [0 if x is None else x.data_ptr() for x in (*on_gpu, c)]
    assert fragments(name.encode(), *addresses, n, m) == 0
    library = load("good", "kernels_good.cu")
    with emulated(library) as device:
        x, w = device.input(a), device.input(b)
        y = device.output(shape, dtype)
        device.call(library.run, name, *(0 if t is None else t.data_ptr() for t in (x, w, y)), n, m)
    assert torch.equal(c.cpu().view(torch.uint8), y.view(torch.uint8))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_comparison_compiles(tmp_path):
    assert compile_fragments(tmp_path).exists()
