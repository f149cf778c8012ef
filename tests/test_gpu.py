"""Triton's kernels on a CUDA device, through the public functions: ``make gpu``, or ``pytest -m gpu``.

What the interpreter cannot show: machine code's results, the same bits in every run, graphs, streams, devices, sizes.
"""

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

import inq_kernels as inq

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch finds none here"),
]
FMT = inq.Format(4)
SIXTEEN = (torch.float16, torch.bfloat16)
# Each class of rows of triton_ops.tiles, its edges, and the dense path.
MS = (1, 3, 16, 17, 64, 65, 130, 2048)


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    """Functions without an argument for it take their backend from here. A request by name never falls back."""
    monkeypatch.setenv("INQ_BACKEND", "triton")


def to(packed, device="cuda"):
    fields = (None if t is None else t.to(device) for t in (packed.weight, packed.weight_exp, packed.weight_scale))
    return inq.PackedWeight(*fields, packed.format, packed.shape)


def linear(x, packed, bias=None):
    return inq.linear(x, packed, bias, backend="triton")


def normal(shape, dtype, seed=0):
    return torch.randn(shape, generator=generator(seed)).to("cuda", dtype)


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*SIXTEEN, torch.float32], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{f.bits}-{f.levels}")
@pytest.mark.parametrize(("n", "k", "m"), [(40, 61, 3), (129, 96, 17), (256, 1024, 1), (96, 320, 130)])
def test_integers_are_exact(dtype, fmt, n, k, m):
    packed = random_packed(fmt, n, k)
    x = integer_case(fmt, k, (m, k), dtype)
    w, n2 = integer_weight(packed)
    exact = (x.long() @ w.T).double() * torch.exp2(n2.double())
    y = linear(x.cuda(), to(packed)).cpu()
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
    from inq_kernels.reference import quantize_rows_e4m3

    m, n, k, fmt = 70, 96, 1024, inq.Format(bits, levels)
    packed = to(random_packed(fmt, n, k, n1=-2))
    x = normal((m, k), torch.bfloat16)
    tail = (None, None, fmt.bits, fmt.levels, "storage", "triton")
    y = torch.ops.inq.linear_fp8(x, packed.weight, packed.weight_exp, *tail).double()
    values, t = quantize_rows_e4m3(x)
    rounded, w = values.double() * torch.exp2(-t.double()), inq.unpack(packed, torch.float64)
    exact, size = rounded @ w.T, rounded.abs() @ w.abs().T
    assert bool(((y - exact).abs() <= exact.abs() * 2.0**-8 + size * 2.0**-13).all())


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
    assert torch.equal(inq.pack(w.cuda(), fmt, packed.weight_exp.cuda()).weight.cpu(), packed.weight)


@pytest.mark.parametrize("rule", ["max", "mse"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_partition_is_that_of_the_cpu(rule, granularity, monkeypatch):
    fmt = inq.Format(5, granularity=granularity, exponent=rule)
    w = torch.randn(60, 500, generator=generator()) * 0.1
    w[10:20] = w[:10]  # ties go to the lower index
    got = inq.quantize_with_mask(w.cuda(), None, 0.5, fmt)
    monkeypatch.setenv("INQ_BACKEND", "reference")
    expected = inq.quantize_with_mask(w, None, 0.5, fmt)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, expected, strict=True))


def test_frozen_weights_keep_their_bits():
    weight = torch.nn.Parameter(normal((64, 100), torch.float32))
    held = torch.rand(64, 100, generator=generator(1)).cuda() < 0.5
    from inq_kernels.reference import pack_bits

    optimizer = inq.optim.AdamW([weight], lr=0.1, weight_decay=0.1)
    optimizer.set_mask(weight, pack_bits(held))
    before = weight.detach().clone()
    for step in range(3):
        weight.grad = normal((64, 100), torch.float32, step)
        optimizer.step()
    assert torch.equal(weight[held], before[held])
    assert bool((weight[~held] != before[~held]).all())


# --- the same bits, whatever runs beside ------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "k"), [(1, 512, 4096), (16, 512, 8192), (200, 512, 1024)])
def test_100_runs_give_the_same_bits(m, n, k):
    packed, x = to(random_packed(FMT, n, k)), normal((m, k), torch.bfloat16)
    first = linear(x, packed)
    wrong = sum(not torch.equal(linear(x, packed), first) for _ in range(100))
    assert wrong == 0


def test_100_partitions_give_the_same_bits():
    w = normal((300, 1000), torch.float32)
    first = inq.quantize_with_mask(w, None, 0.5, FMT)
    for _ in range(100):
        assert all(map(torch.equal, inq.quantize_with_mask(w, None, 0.5, FMT), first))


@pytest.mark.parametrize("m", [1, 16, 130])
def test_graph_capture_and_replay(m):
    packed = to(random_packed(FMT, 512, 2048))
    x = normal((m, 2048), torch.float16)
    expected = linear(x, packed)  # compiles outside the graph
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, packed)
    for seed in range(3):
        other = normal((m, 2048), torch.float16, seed)
        x.copy_(other)
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, linear(other, packed))
    assert y.shape == expected.shape


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
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.inq.freeze_portion_(ws, masks, n1s, [None] * 3, counts, True, *tail)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_two_streams():
    packed = [to(random_packed(FMT, 512, 4096, seed=i)) for i in range(2)]
    xs = [normal((16, 4096), torch.float16, i) for i in range(2)]
    expected = [linear(x, p) for x, p in zip(xs, packed, strict=True)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i].append(linear(xs[i], packed[i]))
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
    w = torch.randn(40, 100, generator=generator())
    assert torch.equal(inq.quantize(w.cuda(1), FMT).cpu(), inq.quantize(w.cuda(0), FMT).cpu())


# --- more than 2^31 elements ------------------------------------------------------------------------------------------


def needs(gigabytes):
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GiB of device memory, {free:.0f} are free")


def test_unpack_beyond_31_bits():
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


def test_linear_beyond_31_bits():
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


def test_partition_beyond_31_bits():
    needs(60)
    count = 2**31 + 4096
    w = torch.full((1, count), 2.0**-9, device="cuda")
    w[0, -5:] = 1.0  # the largest lie behind 2^31
    fmt = inq.Format(4, exponent="max")
    w_hat, frozen, n1 = inq.quantize_with_mask(w, None, 5 / count, fmt)
    assert int(n1) == 0
    assert frozen[0, -5:].all()
    assert int(frozen.sum()) == 5
    assert torch.equal(w_hat[0, -8:-5], w[0, -8:-5])
