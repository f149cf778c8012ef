"""linear: as exact as the dense product, bit for bit on integers, differentiable, and a good citizen of torch."""

import oracle
import pytest
import torch
import torch.nn.functional as F
from support import (
    DTYPES,
    FORMATS,
    assert_as_good_as_dense,
    compiles,
    generator,
    integer_case,
    integer_weight,
    plain,
    random_packed,
    same_bits,
)
from torch._dynamo.testing import CompileCounterWithBackend

import inq_kernels as inq
from inq_kernels.backends import BackendError

FMT = inq.Format(4)
ops = torch.ops.inq


def tail(fmt, backend=""):
    return fmt.bits, fmt.levels, "storage", backend


def check(x, packed, bias=None):
    y = inq.linear(x, packed, bias)
    assert y.is_contiguous()
    w = inq.unpack(packed, torch.float64)
    exact = F.linear(x.double(), w, None if bias is None else bias.double())
    # The dense product of the same dtype, with an exact epilogue.
    dense = F.linear(x, inq.unpack(plain(packed), torch.float64).to(x.dtype)).double()
    if packed.weight_scale is not None:
        dense = dense * packed.weight_scale.double().view(-1)
    if bias is not None:
        dense = dense + bias.double()
    unit = torch.exp2(packed.weight_exp.double()).view(-1)
    assert_as_good_as_dense(y, exact, dense.to(x.dtype), unit)


# --- against float64 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, "same"], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_good_as_the_dense_product(dtype, bias_dtype, scale):
    for seed, (m, n, k) in enumerate([(5, 3, 7), (16, 17, 65), (33, 8, 300), (1, 1, 1), (2, 1, 9), (0, 4, 6)]):
        packed = random_packed(FORMATS[seed], n, k, scale=scale, seed=seed)
        x = torch.randn(m, k, generator=generator(seed)).to(dtype)
        bias = None if bias_dtype is None else torch.randn(n, generator=generator(seed))
        check(x, packed, bias.to(dtype) if bias_dtype == "same" else bias)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_format(dtype, fmt):
    check(torch.randn(9, 50, generator=generator(1)).to(dtype), random_packed(fmt, 12, 50, seed=1))


@pytest.mark.parametrize(
    ("dtype", "n1", "size"),
    [
        (torch.float64, -126, 1.0),
        (torch.float64, 127, 1.0),
        (torch.float32, -126, 1.0),
        (torch.float32, 127, 2.0**-8),
        (torch.bfloat16, -126, 1.0),
        (torch.bfloat16, 127, 2.0**-8),
        (torch.float16, -24, 1.0),
        (torch.float16, 15, 2.0**-8),
    ],
    ids=str,
)
def test_extreme_exponents(dtype, n1, size):
    # At 127 and 15 the largest products are finite in the dtype, and the sums must be too.
    x = (torch.randn(6, 40, generator=generator(2)) * size).to(dtype)
    packed = random_packed(inq.Format(3), 5, 40, n1=n1, seed=2)
    assert bool(inq.linear(x, packed).isfinite().all())
    check(x, packed)


@pytest.mark.parametrize("shape", [(11,), (1, 11), (0, 11), (2, 3, 11), (2, 0, 11), (2, 1, 3, 11)], ids=str)
def test_any_leading_shape(shape):
    packed = random_packed(FMT, 5, 11, scale=True)
    x, bias = torch.randn(shape, generator=generator(3)), torch.randn(5, generator=generator(4))
    y = inq.linear(x, packed, bias)
    assert y.shape == (*shape[:-1], 5)
    assert torch.allclose(y, inq.linear(x.reshape(-1, 11), packed, bias).view(y.shape), rtol=1e-6, atol=1e-6)
    check(x, packed, bias)


def test_any_strides():
    packed = random_packed(FMT, 5, 8)
    base = torch.randn(8, 16, generator=generator(5))
    for x in (base.T, base[:, ::2], base.view(2, 8, 8).transpose(0, 1), base[:, :8].flip(1), base[:1, :8].expand(3, 8)):
        check(x, packed)


def test_same_inputs_same_bits():
    packed, x = random_packed(FMT, 64, 300), torch.randn(20, 300)
    first = inq.linear(x, packed)
    assert all(same_bits(inq.linear(x, packed), first) for _ in range(5))


# --- bit for bit on integers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_bit_for_bit(dtype, fmt):
    for seed, (m, n, k) in enumerate([(7, 9, 8), (3, 5, 61), (1, 16, 1), (4, 3, 600)]):
        packed = random_packed(fmt, n, k, seed=seed)
        x = integer_case(fmt, k, (m, k), dtype, seed)
        w, n2 = integer_weight(packed)
        # Exact in float64, so that the only rounding is the one to dtype.
        expected = (F.linear(x.long(), w).double() * torch.exp2(n2.double())).to(dtype)
        assert torch.equal(inq.linear(x, packed), expected)
        # With n2 = 0 everywhere: a bias of integers, and the gradient, which is a sum over rows.
        even = random_packed(fmt, n, k, n1=fmt.magnitudes - 1, seed=seed)
        w, _ = integer_weight(even)
        bias = torch.arange(n).float() - 2
        assert torch.equal(inq.linear(x, even, bias), (F.linear(x.long(), w) + bias.long()).to(dtype))
        g = integer_case(fmt, n, (m, n), dtype, seed)
        dx = ops.linear_dx(g, even.weight, even.weight_exp, None, k, *tail(fmt))
        assert torch.equal(dx, (g.long() @ w).to(dtype))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_integers_by_python_from_the_bytes(fmt):
    # From codes written by the oracle to a sum in Python's integers: nothing of the package but linear is in between.
    n1, magnitudes = fmt.magnitudes - 1, fmt.magnitudes
    weights = [0] + [s << i for i in range(magnitudes) for s in (1, -1)]
    codes = [oracle.code(oracle.Fraction(w), n1, fmt.bits, fmt.levels) for w in weights]
    packed = inq.PackedWeight(
        torch.tensor([oracle.row_bytes(codes, fmt.bits)], dtype=torch.uint8),
        torch.tensor([[n1]], dtype=torch.int8), None, fmt, (1, len(weights)),
    )  # fmt: skip
    x = [(7 * i) % 11 - 4 for i in range(len(weights))]
    bias = 5
    y = inq.linear(torch.tensor(x).float(), packed, torch.tensor([float(bias)]))
    assert y.tolist() == [float(sum(a * w for a, w in zip(x, weights, strict=True)) + bias)]


# --- autograd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 6), (6,), (2, 3, 6), (0, 6)], ids=str)
@pytest.mark.parametrize("scale", [False, True])
def test_gradcheck_and_gradgradcheck(shape, scale):
    packed = random_packed(inq.Format(5), 3, 6, scale=scale)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def f(x, bias):
        return inq.linear(x, packed, bias)

    assert torch.autograd.gradcheck(f, (x, bias))
    assert torch.autograd.gradgradcheck(f, (x, bias))
    assert torch.autograd.gradcheck(lambda x: inq.linear(x, packed), (x,))


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_backward_dtypes_and_values(dtype, bias_dtype):
    packed = random_packed(FMT, 5, 12, scale=True)
    x = torch.randn(7, 12, generator=generator(6)).to(dtype).requires_grad_()
    bias = torch.randn(5).to(bias_dtype).requires_grad_()
    g = torch.randn(7, 5, generator=generator(7)).to(dtype)
    inq.linear(x, packed, bias).backward(g)
    assert (x.grad.dtype, bias.grad.dtype) == (dtype, bias_dtype)
    w = inq.unpack(packed, torch.float64)
    assert_as_good_as_dense(x.grad, g.double() @ w, g @ w.to(dtype), torch.ones(()))
    # One sum in float32, rounded once to the bias's dtype.
    assert torch.equal(bias.grad, g.sum(0, dtype=torch.float32).to(bias_dtype))


def test_only_what_needs_a_gradient_gets_one():
    packed = random_packed(FMT, 5, 12)
    x, bias = torch.randn(2, 12), torch.randn(5)
    assert not inq.linear(x, packed, bias).requires_grad
    with torch.no_grad():
        assert not inq.linear(x.requires_grad_(), packed, bias).requires_grad
    inq.linear(x.detach(), packed, bias.requires_grad_()).sum().backward()
    assert bias.grad.tolist() == [2.0] * 5
    with torch.inference_mode():
        assert inq.linear(torch.randn(2, 12), packed).shape == (2, 5)


# --- torch's tools ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 13), (13,), (2, 3, 13), (0, 13), (1, 13)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, shape):
    packed = random_packed(FMT, 5, 13, scale=True)
    x, g, bias = torch.randn(shape).to(dtype), torch.randn(*shape[:-1], 5).to(dtype), torch.randn(5).to(dtype)
    for scale, b in [(packed.weight_scale, bias), (None, None)]:
        weights = (packed.weight, packed.weight_exp, scale)
        torch.library.opcheck(ops.linear.default, (x, *weights, b, *tail(FMT)))
        torch.library.opcheck(ops.linear_dx.default, (g, *weights, 13, *tail(FMT)))


def test_opcheck_of_strided_activations():
    packed = random_packed(FMT, 5, 13)
    weights = (packed.weight, packed.weight_exp, None)
    torch.library.opcheck(ops.linear.default, (torch.randn(13, 4).T, *weights, None, *tail(FMT)))
    torch.library.opcheck(ops.linear_dx.default, (torch.randn(5, 4).T, *weights, 13, *tail(FMT)))


@compiles
@pytest.mark.parametrize("grad", [False, True])
def test_compile_once_for_every_batch_size(grad):
    packed = random_packed(FMT, 6, 10, scale=True)

    def f(x, bias):
        return inq.linear(x.sin(), packed, bias).relu()

    torch.compiler.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    for batch in (3, 5, 17, 2):
        x, bias = torch.randn(batch, 10, requires_grad=grad), torch.randn(6, requires_grad=grad)
        y, expected = compiled(x, bias), f(x, bias)
        assert torch.allclose(y, expected, rtol=1e-5, atol=1e-6)
        if grad:
            g = torch.randn_like(y)
            for a, b in zip(
                torch.autograd.grad(y, (x, bias), g), torch.autograd.grad(expected, (x, bias), g), strict=True
            ):
                assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(autocast):
    packed = random_packed(FMT, 5, 40, scale=True)
    x, bias = torch.randn(6, 40, requires_grad=True), torch.randn(5, requires_grad=True)
    with torch.autocast("cpu", autocast):
        y = inq.linear(x, packed, bias)
        y64 = inq.linear(x.double(), packed)
    # As without autocast for an x of its dtype: nothing inside is rounded a second time.
    assert same_bits(y.detach(), inq.linear(x.detach().to(autocast), packed, bias.detach()))
    assert y64.dtype == torch.float64
    y.sum().backward()
    assert (x.grad.dtype, bias.grad.dtype) == (torch.float32, torch.float32)


def test_backward_under_autocast():
    packed, g = random_packed(FMT, 5, 40), torch.randn(6, 5)
    expected = ops.linear_dx(g, packed.weight, packed.weight_exp, None, 40, *tail(FMT))
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(ops.linear_dx(g, packed.weight, packed.weight_exp, None, 40, *tail(FMT)), expected)


def test_float32_means_ieee(monkeypatch):
    # On a CPU without bfloat16 instructions "medium" changes no result, so the setting itself is looked at too.
    packed, x = random_packed(FMT, 30, 200), torch.randn(10, 200)
    expected = inq.linear(x, packed, backend="reference")
    seen, dense = [], F.linear

    def spy(*args):
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return dense(*args)

    monkeypatch.setattr(F, "linear", spy)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        chosen = torch.backends.mkldnn.matmul.fp32_precision
        y = inq.linear(x.requires_grad_(), packed, backend="reference")
        y.sum().backward()
        assert torch.backends.mkldnn.matmul.fp32_precision == chosen != "ieee"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["ieee", "ieee"]
    assert same_bits(y.detach(), expected)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"x": torch.ones(2, 8, dtype=torch.uint8)}, TypeError, r"x: .*got torch.uint8.*layer.weight.dtype"),
        ({"x": torch.ones(2, 8, dtype=torch.int64)}, TypeError, "x: .*got torch.int64"),
        ({"x": torch.ones(2, 9)}, ValueError, r"x: expected .* weight of shape \[3, 8\], got \[2, 9\]"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x: expected .*got \[\]"),
        ({"x": torch.ones(2, 8, device="meta")}, ValueError, "x: expected device cpu of the weight, got meta"),
        ({"bias": torch.ones(4)}, ValueError, r"bias: expected shape \[3\] on cpu, got \[4\]"),
        ({"bias": torch.ones(1, 3)}, ValueError, r"bias: expected shape \[3\] on cpu, got \[1, 3\]"),
        ({"bias": torch.ones(3, dtype=torch.int32)}, TypeError, "bias: expected a float dtype, got torch.int32"),
        ({"packed": random_packed(FMT, 3, 2, 2, 2)}, ValueError, r"x: expected .* weight of shape \[3, 2, 2, 2\]"),
        ({"backend": "cuda"}, BackendError, "backend 'cuda' was asked for and cannot run: "),
        ({"backend": "tpu"}, ValueError, r"backend: expected one of \('reference', .*\), got 'tpu'"),
    ],
)
def test_errors(arguments, error, text):
    with pytest.raises(error, match=f"^inq.linear: {text}"):
        inq.linear(**{"x": torch.ones(2, 8), "packed": random_packed(FMT, 3, 8), **arguments})


def test_a_row_scale_takes_no_gradient():
    packed = random_packed(FMT, 3, 8, scale=True)
    packed.weight_scale.requires_grad_()
    with pytest.raises(ValueError, match="^inq.linear: weight_scale: expected requires_grad=False"):
        inq.linear(torch.ones(2, 8), packed)


def test_the_environment_asks_for_a_backend(monkeypatch):
    packed, x = random_packed(FMT, 3, 8), torch.ones(2, 8)
    monkeypatch.setenv("INQ_BACKEND", "cuda")
    with pytest.raises(BackendError, match="^inq.linear: backend 'cuda' was asked for"):
        inq.linear(x, packed)
    # The argument is the closer of the two.
    inq.linear(x, packed, backend="reference")
    monkeypatch.setenv("INQ_BACKEND", "fastest")
    with pytest.raises(ValueError, match="got 'fastest'"):
        inq.linear(x, packed)
