"""Kernels on a CUDA device, through the public functions: ``make gpu``, or ``pytest -m gpu``.

INQ_GPU_BACKEND says whose: ``triton`` (the default), or ``cuda``, the compiled library, with Triton for what that has
not.

What the interpreter cannot show: machine code's results, the same bits in every run, graphs, streams, devices, sizes.
tests/test_triton_*.py are run on the device as well; most of them are about values.

INQ_FAKE_CUDA=1 (tests/test_make_gpu.py) runs what is small enough interpreted on a CPU: whether these tests are right.
"""

import contextlib
import fcntl
import os

import pytest
import torch
import torch.nn.functional as F
from support import (
    FORMATS,
    assert_as_good_as_dense,
    generator,
    integer_case,
    integer_weight,
    random_packed,
    same_bits,
)
from support_triton import no_waiting

import inq_kernels as inq
from inq_kernels import backends, fragments, ops, slices

FAKE = os.environ.get("INQ_FAKE_CUDA") == "1"
DEVICE = "cpu" if FAKE else "cuda"
RUNS = 2 if FAKE else 100
BACKEND = os.environ.get("INQ_GPU_BACKEND", "triton")
LAYOUT = fragments.FP16 if BACKEND == "cuda" else slices.FP16
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("quick_interpreter"),
    pytest.mark.skipif(not (FAKE or torch.cuda.is_available()), reason="needs a CUDA device: torch finds none here"),
]
FMT = inq.Format(4)
SIXTEEN = (torch.float16, torch.bfloat16)
# Each class of rows of triton_ops.tiles, its edges, and the dense path.
MS = (1, 3, 16, 17, 64, 65, 130, 2048)


@pytest.fixture(autouse=True)
def backend_is_there(monkeypatch):
    """Functions without an argument for it choose BACKEND for tensors on the device. Not by INQ_BACKEND: a request
    never falls back, and what tests prepare on the CPU, or unpack as float64, is none of Triton's."""
    here = backends.availability()
    assert here[BACKEND] is None
    if BACKEND == "triton":
        here["cuda"] = "these tests are Triton's"
    monkeypatch.setattr(backends, "_availability", lambda: here)
    backends._select_here.cache_clear()
    assert backends.select("pack", "", backends.availability(), "cuda") == BACKEND
    assert backends.ENVIRONMENT not in os.environ
    yield
    backends._select_here.cache_clear()


def backend_of(op, dtype):
    """BACKEND, or Triton where that has not this operator for x of ``dtype`` on this device."""
    major, minor = (9, 0) if FAKE else torch.cuda.get_device_capability()
    chosen = backends.select(op, "", backends.availability(), "cuda", dtype, capability=10 * major + minor)
    return BACKEND if chosen == BACKEND else "triton"


def to(packed, device=DEVICE):
    fields = (None if t is None else t.to(device) for t in (packed.weight, packed.weight_exp, packed.weight_scale))
    return inq.PackedWeight(*fields, packed.format, packed.shape)


def linear(x, packed, bias=None):
    return inq.linear(x, packed, bias, backend=backend_of("linear", x.dtype))


def normal(shape, dtype, seed=0):
    return torch.randn(shape, generator=generator(seed)).to(DEVICE, dtype)


CONV = ([3, 3], [1, 1], [1, 1], [1, 1], 1)  # window, stride, padding, dilation, groups
products = pytest.mark.parametrize("name", ["linear", "linear_fp8", "linear_dx", "conv2d", "conv2d_dx"])


def product(name, device=DEVICE, seed=0):
    """(an operand, the product as a function of it), weights in the layout that kernels read."""
    conv = name.startswith("conv2d")
    n, k = (32, 64) if FAKE else (512, 2048)
    shape = (64, 32, 3, 3) if conv else (n, k)
    backend = backend_of(name, torch.float16)
    layouts = fragments if backend == "cuda" else slices
    layout = layouts.E4M3 if name == "linear_fp8" else layouts.FP16
    packed = ops.prepack(to(random_packed(FMT, *shape, seed=seed), device), layout)
    parts, tail = (packed.weight, packed.weight_exp, packed.weight_scale), (4, "paper", packed.layout, backend)
    channels = 64 if name == "conv2d_dx" else 32
    x = normal((2, channels, 7, 8) if conv else (16, n if name == "linear_dx" else k), torch.float16, seed)
    between = {
        "linear_dx": (k,),
        "conv2d": (None, *CONV),
        "conv2d_dx": ([2, 32, 7, 8], *CONV),
    }.get(name, (None,))
    op = getattr(torch.ops.inq, name)
    return x.to(device), lambda x: op(x, *parts, *between, *tail)


def captured(call):
    """(what ``call`` gives, what computes it anew in the same memory)."""
    if FAKE:
        y = call()
        return y, lambda: y.copy_(call())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    return y, graph.replay


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*SIXTEEN, torch.float32], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{f.bits}-{f.levels}")
@pytest.mark.parametrize(("n", "k", "m"), [(40, 61, 3), (129, 96, 17), (256, 1024, 1), (96, 320, 130)])
def test_integers_are_exact(dtype, fmt, n, k, m):
    packed = random_packed(fmt, n, k)
    x = integer_case(fmt, k, (m, k), dtype)
    w, n2 = integer_weight(packed)
    exact = (x.long() @ w.T).double() * torch.exp2(n2.double())
    y = linear(x.to(DEVICE), to(packed)).cpu()
    assert torch.equal(y, exact.to(dtype))


@pytest.mark.parametrize("dtype", [*SIXTEEN, torch.float32], ids=str)
@pytest.mark.parametrize("m", MS)
def test_as_good_as_dense(dtype, m):
    n, k = 200, 1000
    packed = to(random_packed(inq.Format(5), n, k, scale=True, n1=-3))
    x, bias = normal((m, k), dtype), normal((n,), dtype, 1)
    w = inq.unpack(packed, torch.float64)
    exact = F.linear(x.double(), w, bias.double())
    dense = F.linear(x.float(), w.float(), bias.float()).to(dtype)
    unit = packed.weight_scale.double().abs().T * 2.0**-3
    assert_as_good_as_dense(linear(x, packed, bias), exact, dense, unit)


@pytest.mark.parametrize("dtype", [*SIXTEEN, torch.float32], ids=str)
def test_gradients(dtype):
    packed = to(random_packed(FMT, 130, 200, n1=-2))
    x, grad = normal((33, 200), dtype).requires_grad_(), normal((33, 130), dtype, 1)
    linear(x, packed).backward(grad)
    w = inq.unpack(packed, torch.float64)
    dense = (grad.float() @ w.float()).to(dtype)
    assert_as_good_as_dense(x.grad, grad.double() @ w, dense, 1.0)


@pytest.mark.parametrize("levels", ["paper", "dense"])
@pytest.mark.parametrize("bits", [4, 5])
def test_fp8(bits, levels):
    """Exact in the rounded x, but for the 14 bits that a tensor core keeps of a sum of 128."""
    m, n, k, fmt = 70, 96, 1024, inq.Format(bits, levels)
    packed = to(random_packed(fmt, n, k, n1=-2))
    x = normal((m, k), torch.bfloat16)
    tail = (None, None, fmt.bits, fmt.levels, "storage", backend_of("linear_fp8", x.dtype))
    check_fp8(torch.ops.inq.linear_fp8(x, packed.weight, packed.weight_exp, *tail), x, packed)


def check_fp8(y, x, packed):
    from inq_kernels.reference import quantize_rows_e4m3

    values, t = quantize_rows_e4m3(x)
    rounded, w = values.double() * torch.exp2(-t.double()), inq.unpack(packed, torch.float64)
    exact, size = rounded @ w.T, rounded.abs() @ w.abs().T
    assert bool(((y.double() - exact).abs() <= exact.abs() * 2.0**-8 + size * 2.0**-13).all())


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("stride", "padding", "groups"), [(1, 1, 1), (2, 0, 1), (1, 1, 2)])
def test_conv2d_in_memory_formats(dtype, channels_last, stride, padding, groups):
    packed = to(random_packed(FMT, 32, 16 // groups, 3, 3, n1=-2))
    x = normal((2, 16, 15, 13), dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    options = {"stride": stride, "padding": padding, "groups": groups}
    y = inq.conv2d(x, packed, backend="triton", **options)
    w = inq.unpack(packed, torch.float64)
    dense = F.conv2d(x.float(), w.float(), **options).to(dtype)
    assert_as_good_as_dense(y, F.conv2d(x.double(), w, **options), dense, 1.0)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
        lambda x: F.pad(x, (1, 2))[:, 1:-2],
        lambda x: x[:1].expand(x.shape),
        lambda x: x[::2],
        lambda x: x.view(2, -1, x.shape[1]),
        lambda x: x.view(2, -1, x.shape[1]).transpose(0, 1),
        lambda x: x[:0],
    ],
    ids=["transposed", "wide stride", "odd offset", "stride 0", "every other", "3-D", "3-D transposed", "empty"],
)
@pytest.mark.parametrize("k", [61, 128])
def test_strides(view, k):
    """A view gives what its contiguous copy gives."""
    packed = to(random_packed(FMT, 72, k))
    x = view(normal((12, k), torch.float16))
    assert same_bits(linear(x, packed).cpu(), linear(x.contiguous().clone(), packed).cpu())


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{f.bits}-{f.levels}")
def test_storage_is_that_of_the_cpu(fmt):
    packed = random_packed(fmt, 70, 333)
    w = inq.unpack(packed)
    assert same_bits(inq.unpack(to(packed)).cpu(), w)
    assert torch.equal(inq.pack(w.to(DEVICE), fmt, packed.weight_exp.to(DEVICE)).weight.cpu(), packed.weight)


@pytest.mark.parametrize("rule", ["max", "mse"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_partition_is_that_of_the_cpu(rule, granularity, monkeypatch):
    fmt = inq.Format(5, granularity=granularity, exponent=rule)
    w = torch.randn(60, 500, generator=generator()) * 0.1
    w[10:20] = w[:10]  # ties go to the lower index
    got = inq.quantize_with_mask(w.to(DEVICE), None, 0.5, fmt)
    monkeypatch.setenv("INQ_BACKEND", "reference")
    expected = inq.quantize_with_mask(w, None, 0.5, fmt)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, expected, strict=True))


def test_frozen_weights_keep_their_bits():
    weight = torch.nn.Parameter(normal((64, 100), torch.float32))
    held = torch.rand(64, 100, generator=generator(1)).to(DEVICE) < 0.5
    from inq_kernels.reference import pack_bits

    optimizer = inq.optim.AdamW([weight], lr=0.1, weight_decay=0.1)
    optimizer.set_mask(weight, pack_bits(held))
    before = weight.detach().clone()
    for step in range(3):
        weight.grad = normal((64, 100), torch.float32, step)
        optimizer.step()
    assert torch.equal(weight[held], before[held])
    assert bool((weight[~held] != before[~held]).all())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_move_what_is_free(momentum):
    """SGD, whose step is easily said, on tensors that are and are not whole runs of four."""
    from inq_kernels.reference import pack_bits

    shapes = ((64, 100), (7, 9), (1, 8192 + 300))
    weights = [torch.nn.Parameter(normal(shape, torch.float32, i)) for i, shape in enumerate(shapes)]
    held = [torch.rand(shape, generator=generator(1)).to(DEVICE) < 0.5 for shape in shapes]
    before = [w.detach().clone() for w in weights]
    optimizer = inq.optim.SGD(weights, lr=0.5, momentum=momentum)
    for w, h in zip(weights, held, strict=True):
        optimizer.set_mask(w, pack_bits(h))
        w.grad = torch.full_like(w, 0.25)
    for _ in range(2):
        optimizer.step()
    moved = 0.125 * (2 + momentum)
    for w, old, h in zip(weights, before, held, strict=True):
        assert torch.equal(w[h], old[h])
        torch.testing.assert_close(w[~h], old[~h] - moved)


# --- the same bits, whatever runs beside ------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "k"), [(1, 512, 4096), (16, 512, 8192), (200, 512, 1024)])
def test_100_runs_give_the_same_bits(m, n, k):
    packed, x = to(random_packed(FMT, n, k)), normal((m, k), torch.bfloat16)
    first = linear(x, packed)
    wrong = sum(not torch.equal(linear(x, packed), first) for _ in range(RUNS))
    assert wrong == 0


@products
def test_100_runs_of_a_product_give_the_same_bits(name):
    x, call = product(name)
    first = call(x)
    wrong = sum(not same_bits(call(x).cpu(), first.cpu()) for _ in range(RUNS))
    assert wrong == 0


def test_100_layouts_have_the_same_bits():
    packed = to(random_packed(FMT, 200, 1000))
    first = ops.prepack(packed, LAYOUT).weight
    assert all(torch.equal(ops.prepack(packed, LAYOUT).weight, first) for _ in range(RUNS))


@products
def test_no_product_waits_for_the_device(name):
    x, call = product(name)
    call(x)  # compiles
    with no_waiting():
        call(x)


def test_storage_does_not_wait_for_the_device():
    packed = to(random_packed(FMT, 64, 200))
    w = inq.unpack(packed)
    n1, out = packed.weight_exp, torch.empty_like(w)

    def all_of_it():
        torch.ops.inq.unpack_(out, packed.weight, n1, None, 200, 4, "paper")
        laid_out = torch.ops.inq.prepack(packed.weight, 200, 4, "paper", LAYOUT)
        torch.ops.inq.unprepack(laid_out, 64, 200, 4, "paper", LAYOUT)
        torch.ops.inq.pack(w, n1, 4, "paper")

    all_of_it()
    with no_waiting():
        all_of_it()
    assert torch.equal(out, w)


def test_100_partitions_give_the_same_bits():
    w = normal((300, 1000), torch.float32)
    first = inq.quantize_with_mask(w, None, 0.5, FMT)
    for _ in range(RUNS):
        assert all(map(torch.equal, inq.quantize_with_mask(w, None, 0.5, FMT), first))


@pytest.mark.parametrize("m", [1, 16, 130])
def test_graph_capture_and_replay(m):
    packed = to(random_packed(FMT, 512, 2048))
    replays_what_it_captured(normal((m, 2048), torch.float16), lambda x: linear(x, packed))


@products
def test_graphs_of_products(name):
    replays_what_it_captured(*product(name))


def replays_what_it_captured(x, call):
    call(x)  # compiles outside the graph
    y, replay = captured(lambda: call(x))
    for seed in range(3):
        other = normal(x.shape, x.dtype, seed)
        x.copy_(other)
        y.fill_(torch.nan)
        replay()
        assert torch.equal(y, call(other))


@pytest.mark.parametrize("optimizer", [inq.optim.SGD, inq.optim.AdamW])
def test_masked_steps_in_a_graph(optimizer):
    """Tables of addresses that were made before the capture, and those that are made inside it."""
    from inq_kernels.reference import pack_bits

    weights, grads = ([normal((300, 77), torch.float32, 2 * i + j) for i in range(3)] for j in range(2))
    held = torch.rand(300, 77, generator=generator(1)).cuda() < 0.5
    for known in (True, False):
        params = [torch.nn.Parameter(w.clone()) for w in weights]
        steps = optimizer(params, lr=0.1)
        for p, g in zip(params, grads, strict=True):
            steps.set_mask(p, pack_bits(held))
            p.grad = g.clone()
        steps.step()  # compiles outside the graph
        if not known:
            for p in params:
                p.grad = p.grad.clone()
        before = [p.detach().clone() for p in params]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            steps.step()
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        for p, old in zip(params, before, strict=True):
            assert torch.equal(p[held], old[held])
            assert bool((p[~held] != old[~held]).any())
            if optimizer is inq.optim.SGD:
                expected = old - 0.1 * p.grad - 0.1 * p.grad - 0.1 * p.grad
                torch.testing.assert_close(p[~held], expected[~held])


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("random", [False, True])
def test_a_portion_never_waits_for_the_device(granularity, random):
    ws = [normal((40, k), torch.float32, k) for k in (9, 100, 3000)]
    masks = [torch.zeros((w.numel() + 7) // 8, dtype=torch.uint8, device="cuda") for w in ws]
    n1s = [torch.zeros(40, 1, dtype=torch.int8, device="cuda") for _ in ws]
    counts = [w.numel() // 2 for w in ws]
    tail = (4, "paper", granularity, "mse", random, [0, 1, 2])
    with no_waiting():
        torch.ops.inq.freeze_portion_(ws, masks, n1s, [None] * 3, counts, True, *tail)


@products
def test_two_streams(name):
    pairs = [product(name, seed=i) for i in range(2)]
    expected = [call(x) for x, call in pairs]
    streams = [contextlib.nullcontext() if FAKE else torch.cuda.stream(torch.cuda.Stream()) for _ in range(2)]
    if not FAKE:
        torch.cuda.synchronize()
    found = [[], []]
    for _ in range(1 if FAKE else 20):
        for i, stream in enumerate(streams):
            with stream:
                x, call = pairs[i]
                found[i].append(call(x))
    if not FAKE:
        torch.cuda.synchronize()
    assert all(torch.equal(y, expected[i]) for i in range(2) for y in found[i])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_a_second_device():
    """Tensors say where kernels run, not the current device."""
    packed, x = random_packed(FMT, 200, 512), torch.randn(7, 512, generator=generator()).half()
    first = linear(x.cuda(0), to(packed, "cuda:0"))
    second = linear(x.cuda(1), to(packed, "cuda:1"))
    assert second.device == torch.device("cuda:1")
    assert torch.equal(first.cpu(), second.cpu())
    for name in ("linear_fp8", "linear_dx", "conv2d", "conv2d_dx"):
        x, call = product(name, "cuda:0")
        y, again = product(name, "cuda:1")
        assert torch.equal(call(x).cpu(), again(y).cpu()), name
    w = torch.randn(40, 100, generator=generator())
    assert torch.equal(inq.quantize(w.cuda(1), FMT).cpu(), inq.quantize(w.cuda(0), FMT).cpu())


# --- more than 2^31 elements ------------------------------------------------------------------------------------------


@pytest.fixture
def needs(tmp_path_factory):
    """Skips a test where less device memory is free than so many GiB. One test at a time, of all processes: what
    another one is about to take is still free now."""

    def check(gigabytes):
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < gigabytes:
            pytest.skip(f"needs {gigabytes} GiB of device memory, {free:.0f} are free")

    # Processes of pytest-xdist have folders beside each other.
    with open(tmp_path_factory.getbasetemp().parent / "inq-device-memory", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield check
        # torch keeps what it has freed; others see it as taken.
        torch.cuda.empty_cache()


def test_unpack_and_pack_beyond_31_bits(needs):
    needs(12)
    n, k = 70_000, 32_768  # 2.29e9 weights
    small = to(random_packed(FMT, 64, k))
    repeats = -(-n // 64)
    packed = inq.PackedWeight(
        small.weight.repeat(repeats, 1)[:n], small.weight_exp.repeat(repeats, 1)[:n], None, FMT, (n, k)
    )
    w, expected = inq.unpack(packed, torch.bfloat16), inq.unpack(small, torch.bfloat16)
    for start in (0, 32_768, 65_536, n - n % 64 - 64):
        assert torch.equal(w[start : start + 64], expected)
    assert torch.equal(torch.ops.inq.pack(w, packed.weight_exp, 4, "paper"), packed.weight)


def test_linear_beyond_31_bits(needs):
    """N·K of the weight, and M·N of the output."""
    needs(24)
    n, k = 70_016, 32_768
    small = to(random_packed(FMT, 64, k))
    packed = inq.PackedWeight(small.weight.repeat(n // 64, 1), small.weight_exp.repeat(n // 64, 1), None, FMT, (n, k))
    x = normal((2, k), torch.bfloat16)
    assert torch.equal(linear(x, packed).view(2, -1, 64), linear(x, small)[:, None].expand(2, n // 64, 64))
    del packed
    rows = 2**31 // 1024 + 130
    small = to(random_packed(FMT, 1024, 64))
    x = normal((rows, 64), torch.bfloat16)
    y = linear(x, small)
    exact = x[-100:].double() @ inq.unpack(small, torch.float64).T
    dense = (x[-100:].float() @ inq.unpack(small).T).bfloat16()
    assert_as_good_as_dense(y[-100:], exact, dense, torch.exp2(small.weight_exp.double()).T)


def test_layouts_beyond_31_bits(needs):
    needs(8)
    n, k = 70_016, 32_768
    small = to(random_packed(FMT, 64, k))
    packed = inq.PackedWeight(small.weight.repeat(n // 64, 1), small.weight_exp.repeat(n // 64, 1), None, FMT, (n, k))
    expected = ops.prepack(small, LAYOUT).weight
    laid_out = torch.ops.inq.prepack(packed.weight, k, 4, "paper", LAYOUT)
    back = torch.ops.inq.unprepack(laid_out, n, k, 4, "paper", LAYOUT)
    # Fragments are of 16 rows.
    rows = 64 // expected.shape[0]
    for start in (0, 32_768, 65_536, n - 64):
        assert torch.equal(laid_out[start // rows : start // rows + expected.shape[0]], expected)
        assert torch.equal(back[start : start + 64], small.weight)


def test_the_gradient_beyond_31_bits(needs):
    """M·K of what it writes."""
    needs(12)
    rows, packed = 2**31 // 1024 + 130, to(random_packed(FMT, 64, 1024, n1=-2))
    grad = normal((rows, 64), torch.bfloat16)
    parts = (packed.weight, packed.weight_exp, None, 1024, 4, "paper", packed.layout, BACKEND)
    dx, w = torch.ops.inq.linear_dx(grad, *parts)[-100:], inq.unpack(packed, torch.float64)
    assert_as_good_as_dense(dx, grad[-100:].double() @ w, (grad[-100:].float() @ w.float()).bfloat16(), 1.0)


def test_fp8_beyond_31_bits(needs):
    """M·K of x, and of its rows rounded to e4m3."""
    needs(12)
    rows, packed = 2**31 // 1024 + 130, to(random_packed(FMT, 64, 1024, n1=-2))
    x = normal((1024, 1024), torch.bfloat16).repeat(-(-rows // 1024), 1)[:rows]
    tail = (None, None, 4, "paper", packed.layout, backend_of("linear_fp8", x.dtype))
    y = torch.ops.inq.linear_fp8(x, packed.weight, packed.weight_exp, *tail)
    check_fp8(y[-100:], x[-100:], packed)


@pytest.mark.parametrize("channels_last", [False, True])
def test_conv2d_beyond_31_bits(channels_last, needs):
    """Elements of x, and, depthwise, of y as well: the last rows of the image, which few pixels alone give."""
    needs(20)
    h, w = 16_400, 2048  # · 64 channels
    x = normal((1, 64, 1, w), torch.bfloat16).expand(1, 64, h, w)
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    x[:, :, -4:] = normal((1, 64, 4, w), torch.bfloat16, 1)
    assert x.numel() > 2**31
    for shape, groups in (((16, 64, 3, 3), 1), ((64, 1, 3, 3), 64)):
        packed = to(random_packed(FMT, *shape, n1=-2))
        y = inq.conv2d(x, packed, padding=1, groups=groups, backend="triton")[:, :, -3:]
        last, weight = x[:, :, -4:].contiguous(), inq.unpack(packed, torch.float64)
        exact = F.conv2d(last.double(), weight, padding=1, groups=groups)[:, :, 1:]
        dense = F.conv2d(last.float(), weight.float(), padding=1, groups=groups).bfloat16()[:, :, 1:]
        assert_as_good_as_dense(y, exact, dense, 1.0)


def test_partition_beyond_31_bits(needs):
    needs(60)
    count = 2**31 + 4096
    w = torch.full((1, count), 2.0**-9, device=DEVICE)
    w[0, -5:] = 1.0  # the largest lie behind 2^31
    fmt = inq.Format(4, exponent="max")
    w_hat, frozen, n1 = inq.quantize_with_mask(w, None, 5 / count, fmt)
    assert int(n1) == 0
    assert frozen[0, -5:].all()
    assert int(frozen.sum()) == 5
    assert torch.equal(w_hat[0, -8:-5], w[0, -8:-5])


def test_masked_steps_beyond_31_bits(needs):
    needs(16)
    count = 2**31 + 4096
    p, grad = (torch.full((count,), value, dtype=torch.bfloat16, device=DEVICE) for value in (0.0, 1.0))
    mask = torch.zeros(count // 8, dtype=torch.uint8, device=DEVICE)
    mask[-1] = 0x80
    torch.ops.inq.masked_sgd_([p], [grad], [], [mask], 1.0, 0.0, 0.0, 0.0, False, False, False)
    assert int(p[-1]) == 0
    assert int((p == -1).sum()) == count - 1
