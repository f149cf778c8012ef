"""conv2d: torch's convolution in every argument, as exact as it, bit for bit on integers, and differentiable."""

import warnings

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
from inq_kernels import reference
from inq_kernels.backends import BackendError

FMT = inq.Format(4)
ops = torch.ops.inq

# x, weight, and the arguments of the convolution.
CASES = {
    "plain": ((2, 3, 8, 9), (4, 3, 3, 3), {}),
    "1x1": ((2, 5, 4, 4), (3, 5, 1, 1), {}),
    "one output": ((1, 1, 3, 3), (1, 1, 3, 3), {}),
    "stride": ((2, 3, 9, 8), (4, 3, 3, 2), {"stride": (2, 3)}),
    "padding": ((2, 3, 5, 6), (4, 3, 3, 3), {"padding": (1, 2)}),
    "one number": ((1, 2, 9, 9), (3, 2, 3, 3), {"stride": 2, "padding": 2, "dilation": 2}),
    "dilation": ((2, 3, 9, 9), (4, 3, 3, 2), {"dilation": (2, 3), "padding": 1}),
    "kernel larger than x": ((1, 2, 2, 2), (3, 2, 5, 5), {"padding": 2}),
    "groups": ((2, 6, 5, 5), (4, 3, 3, 3), {"groups": 2}),
    "depthwise": ((2, 4, 6, 6), (4, 1, 3, 3), {"groups": 4, "padding": 1}),
    "depthwise, two a channel": ((2, 4, 6, 6), (8, 1, 3, 3), {"groups": 4, "stride": 2}),
    "valid": ((2, 3, 6, 6), (4, 3, 3, 3), {"padding": "valid", "stride": 2}),
    "same": ((2, 3, 6, 7), (4, 3, 3, 5), {"padding": "same"}),
    "same, even": ((2, 3, 6, 7), (4, 3, 2, 4), {"padding": "same"}),
    "same, even and odd": ((2, 3, 6, 7), (4, 3, 3, 4), {"padding": "same"}),
    "same, dilated": ((2, 3, 6, 7), (4, 3, 2, 3), {"padding": "same", "dilation": (3, 2)}),
    "unbatched": ((3, 6, 6), (4, 3, 3, 3), {"padding": 1}),
    "unbatched, same": ((3, 6, 6), (4, 3, 2, 2), {"padding": "same"}),
    "batch 0": ((0, 3, 6, 6), (4, 3, 3, 3), {"padding": 1}),
}
cases = pytest.mark.parametrize("case", CASES)


def torch_conv2d(*args, **kwargs):
    with warnings.catch_warnings():
        # torch says that padding="same" with an even kernel copies its input.
        warnings.filterwarnings("ignore", "Using padding='same'", UserWarning)
        return F.conv2d(*args, **kwargs)


def make(case, dtype=torch.float32, fmt=FMT, scale=True, seed=0):
    """(x, packed, bias, arguments) of a case."""
    x_shape, w_shape, arguments = CASES[case]
    x = torch.randn(x_shape, generator=generator(seed)).to(dtype)
    bias = torch.randn(w_shape[0], generator=generator(seed + 1)).to(dtype)
    return x, random_packed(fmt, *w_shape, scale=scale, seed=seed), bias, arguments


def check(x, packed, bias, arguments):
    y = inq.conv2d(x, packed, bias, **arguments)
    w = inq.unpack(packed, torch.float64)
    exact = torch_conv2d(x.double(), w, None if bias is None else bias.double(), **arguments)
    dense = torch_conv2d(x, inq.unpack(plain(packed), torch.float64).to(x.dtype), **arguments).double()
    if packed.weight_scale is not None:
        dense = dense * packed.weight_scale.double().view(-1, 1, 1)
    if bias is not None:
        dense = dense + bias.double().view(-1, 1, 1)
    unit = torch.exp2(packed.weight_exp.double()).view(-1, 1, 1)
    assert_as_good_as_dense(y, exact, dense.to(x.dtype), unit)
    return y


# --- against float64 --------------------------------------------------------------------------------------------------


@cases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_good_as_the_dense_convolution(dtype, case):
    x, packed, bias, arguments = make(case, dtype)
    assert check(x, packed, bias, arguments).is_contiguous()
    check(x, plain(packed), None, arguments)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_format(fmt):
    check(*make("groups", fmt=fmt, seed=1))


@pytest.mark.parametrize(
    ("dtype", "n1", "size"),
    [
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
    x = (torch.randn(2, 3, 6, 6, generator=generator(2)) * size).to(dtype)
    y = check(x, random_packed(inq.Format(3), 4, 3, 3, 3, n1=n1), None, {})
    assert bool(y.isfinite().all())


@cases
def test_channels_last(case):
    x, packed, bias, arguments = make(case)
    if x.dim() == 3:
        x = x[None]
    last = x.to(memory_format=torch.channels_last)
    y = check(last, packed, bias, arguments)
    if not last.is_contiguous():
        assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(y, inq.conv2d(x, packed, bias, **arguments), rtol=1e-5, atol=1e-5)


def test_any_strides():
    packed = random_packed(FMT, 4, 3, 3, 3)
    base = torch.randn(6, 7, 8, 6, generator=generator(3))
    for x in (base.permute(0, 3, 2, 1)[:, :3], base[::2, :3], base[:, 1:7:2].flip(2), base[:1, :1].expand(2, 3, 8, 6)):
        check(x, packed, None, {"padding": 1})


# --- bit for bit on integers ------------------------------------------------------------------------------------------


def int64_conv2d(x, w, stride, padding, dilation, groups):
    """From its definition, in int64."""
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    outputs, per_group = w.shape[0], w.shape[0] // groups
    size = [(x.shape[2 + i] - dilation[i] * (w.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in range(2)]
    y = torch.zeros(x.shape[0], outputs, *size, dtype=torch.int64)
    for o in range(outputs):
        first = o // per_group * w.shape[1]
        for c in range(w.shape[1]):
            for i in range(w.shape[2]):
                for j in range(w.shape[3]):
                    rows = x[:, first + c, i * dilation[0] :: stride[0], j * dilation[1] :: stride[1]]
                    y[:, o] += w[o, c, i, j] * rows[:, : size[0], : size[1]]
    return y


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_bit_for_bit(dtype, fmt):
    for seed, (shape, conv) in enumerate(
        [
            ((4, 3, 3, 2), ((1, 2), (1, 0), (2, 1), 1)),
            ((6, 2, 1, 3), ((2, 1), (0, 2), (1, 1), 3)),
            ((4, 1, 3, 3), ((1, 1), (1, 1), (1, 1), 4)),
        ]
    ):
        packed = random_packed(fmt, *shape, seed=seed)
        w, n2 = integer_weight(packed)
        x = integer_case(fmt, packed.k, (2, shape[1] * conv[3], 7, 8), dtype, seed)
        expected = int64_conv2d(x.long(), w, *conv).double() * torch.exp2(n2.double()).view(-1, 1, 1)
        assert torch.equal(inq.conv2d(x, packed, None, *conv), expected.to(dtype))
        # With n2 = 0 everywhere, a bias of integers is exact too.
        even = random_packed(fmt, *shape, n1=fmt.magnitudes - 1, seed=seed)
        bias = torch.arange(shape[0]).float() - 2
        expected = int64_conv2d(x.long(), integer_weight(even)[0], *conv) + bias.long().view(-1, 1, 1)
        assert torch.equal(inq.conv2d(x, even, bias, *conv), expected.to(dtype))


# --- autograd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", ["plain", "stride", "groups", "depthwise", "one number", "same, even and odd", "same, dilated", "unbatched"]
)
def test_gradcheck_and_gradgradcheck(case):
    x, packed, bias, arguments = make(case, torch.float64)
    # One image and a corner are enough, and keep the numerical Jacobian small.
    x = (x if x.dim() == 3 else x[:1])[..., :6, :5].contiguous().requires_grad_()
    bias.requires_grad_()

    def f(x, bias):
        return inq.conv2d(x, packed, bias, **arguments)

    assert torch.autograd.gradcheck(f, (x, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x, bias), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: inq.conv2d(x, packed, **arguments), (x,), fast_mode=True)


@cases
def test_gradients_are_those_of_torch(case):
    x, packed, bias, arguments = make(case, torch.float64)
    x, bias = x.requires_grad_(), bias.requires_grad_()
    y = inq.conv2d(x, packed, bias, **arguments)
    expected = torch_conv2d(x, inq.unpack(packed, torch.float64), bias, **arguments)
    g = torch.randn(y.shape, dtype=torch.float64, generator=generator(4))
    ours, theirs = (torch.autograd.grad(out, (x, bias), g) for out in (y, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_backward_dtypes_and_values(dtype, bias_dtype):
    x, packed, bias, arguments = make("padding", dtype)
    bias = bias.to(bias_dtype).requires_grad_()
    y = inq.conv2d(x.requires_grad_(), packed, bias, **arguments)
    g = torch.randn(y.shape, generator=generator(5)).to(dtype)
    y.backward(g)
    assert (x.grad.dtype, bias.grad.dtype) == (dtype, bias_dtype)
    w, padding = inq.unpack(packed, torch.float64), arguments["padding"]
    exact = torch.nn.grad.conv2d_input(x.shape, w, g.double(), padding=padding)
    dense = torch.nn.grad.conv2d_input(x.shape, w.to(dtype), g, padding=padding)
    assert_as_good_as_dense(x.grad, exact, dense, torch.ones(()))
    assert torch.equal(bias.grad, g.sum((0, 2, 3), dtype=torch.float32).to(bias_dtype))


def test_only_what_needs_a_gradient_gets_one():
    x, packed, bias, arguments = make("plain")
    assert not inq.conv2d(x, packed, bias, **arguments).requires_grad
    with torch.no_grad():
        assert not inq.conv2d(x.requires_grad_(), packed, bias, **arguments).requires_grad
    y = inq.conv2d(x.detach(), packed, bias.requires_grad_(), **arguments)
    y.sum().backward()
    assert bias.grad.tolist() == [y[:, 0].numel()] * 4


# --- torch's tools ----------------------------------------------------------------------------------------------------


def operator_arguments(x, packed, bias, stride=1, padding=0, dilation=1, groups=1):
    conv = [list(v) if isinstance(v, tuple) else [v, v] for v in (stride, padding, dilation)]
    weights = (packed.weight, packed.weight_exp, packed.weight_scale)
    tail = (packed.format.bits, packed.format.levels, "storage", "")
    forward = (x, *weights, bias, list(packed.shape[2:]), *conv, groups, *tail)
    g = torch.randn_like(ops.conv2d(*forward))
    return forward, (g, *weights, list(x.shape), list(packed.shape[2:]), *conv, groups, *tail)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, last):
    # "one output" has one channel and one pixel: strides that are contiguous and channels-last at once.
    for case in ("plain", "one output", "depthwise, two a channel", "one number"):
        x, packed, bias, arguments = make(case, dtype)
        if last:
            x = x.to(memory_format=torch.channels_last)
        forward, backward = operator_arguments(x, packed, bias, **arguments)
        torch.library.opcheck(ops.conv2d.default, forward)
        torch.library.opcheck(ops.conv2d_dx.default, backward)


def test_opcheck_of_other_shapes():
    for case in ("1x1", "batch 0", "groups", "kernel larger than x"):
        x, packed, _, arguments = make(case, scale=False)
        for strided in (x, x.flip(3), x.transpose(2, 3).contiguous().transpose(2, 3), x[:1]):
            forward, backward = operator_arguments(strided, packed, None, **arguments)
            torch.library.opcheck(ops.conv2d.default, forward)
            torch.library.opcheck(ops.conv2d_dx.default, backward)


@compiles
@pytest.mark.parametrize("grad", [False, True])
def test_compile_once_for_every_batch_size(grad):
    packed = random_packed(FMT, 4, 3, 3, 3, scale=True)

    def f(x, bias):
        return inq.conv2d(x.sin(), packed, bias, stride=(2, 1), padding=[1, 0]).relu()

    torch.compiler.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    # Not 3 first: torch takes equal sizes for one symbol, and would tie the batch to the channels.
    for batch, height in ((5, 8), (3, 8), (2, 11)):
        x, bias = torch.randn(batch, 3, height, 9, requires_grad=grad), torch.randn(4, requires_grad=grad)
        y, expected = compiled(x, bias), f(x, bias)
        assert torch.allclose(y, expected, rtol=1e-5, atol=1e-5)
        if grad:
            g = torch.randn_like(y)
            ours, eager = (torch.autograd.grad(out, (x, bias), g) for out in (y, expected))
            assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(ours, eager, strict=True))
    assert counter.frame_count == 1


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["padding", "same, even", "unbatched"])
def test_autocast(case, autocast):
    x, packed, bias, arguments = make(case)
    x.requires_grad_()
    with torch.autocast("cpu", autocast):
        y = inq.conv2d(x, packed, bias, **arguments)
        assert inq.conv2d(x.double(), packed, **arguments).dtype == torch.float64
    # As without autocast for an x of its dtype: nothing inside is rounded a second time.
    assert same_bits(y.detach(), inq.conv2d(x.detach().to(autocast), packed, bias, **arguments))
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_float32_means_ieee(monkeypatch):
    x, packed, bias, arguments = make("plain")
    expected = inq.conv2d(x, packed, bias, **arguments, backend="reference")
    seen, dense = [], F.conv2d

    def spy(*args):
        seen.append(torch.backends.mkldnn.conv.fp32_precision)
        return dense(*args)

    monkeypatch.setattr(F, "conv2d", spy)
    before = torch.backends.mkldnn.conv.fp32_precision
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    try:
        y = inq.conv2d(x, packed, bias, **arguments, backend="reference")
        assert torch.backends.mkldnn.conv.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.conv.fp32_precision = before
    assert seen == ["ieee"]
    assert same_bits(y, expected)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"x": torch.ones(1, 3, 5, 5, dtype=torch.uint8)}, TypeError, r"x: .*got torch.uint8.*layer.weight.dtype"),
        ({"x": torch.ones(1, 4, 5, 5)}, ValueError, r"x: .*1 groups × 3 for a weight of shape \[4, 3, 3, 3\], got"),
        ({"groups": 2}, ValueError, "x: .*2 groups × 3"),
        ({"groups": 3, "x": torch.ones(1, 9, 5, 5)}, ValueError, "x: .*3 groups × 3"),  # 4 outputs in 3 groups
        ({"x": torch.ones(5, 5)}, ValueError, r"x: .*got \[5, 5\]"),
        ({"packed": random_packed(FMT, 4, 27)}, ValueError, r"x: .*weight of shape \[4, 27\]"),
        ({"x": torch.ones(1, 3, 2, 5)}, ValueError, "x: expected padded H of at least 3, got 2"),
        ({"x": torch.ones(1, 3, 5, 3), "dilation": (1, 2)}, ValueError, "x: expected padded W of at least 5, got 3"),
        ({"bias": torch.ones(3)}, ValueError, r"bias: expected shape \[4\] on cpu, got \[3\]"),
        ({"stride": 0}, ValueError, "stride: expected one int ≥ 1 or two, got 0"),
        ({"stride": (1, 1, 1)}, ValueError, "stride: expected one int ≥ 1 or two"),
        ({"dilation": 0.5}, ValueError, "dilation: expected one int ≥ 1 or two, got 0.5"),
        ({"dilation": (1, True)}, ValueError, r"dilation: expected one int ≥ 1 or two, got \(1, True\)"),
        ({"padding": -1}, ValueError, "padding: expected one int ≥ 0 or two, got -1"),
        ({"padding": "full"}, ValueError, "padding: expected 'same', 'valid' or ints, got 'full'"),
        ({"padding": "same", "stride": 2}, ValueError, "padding: 'same' needs stride 1"),
        ({"backend": "cuda"}, BackendError, "backend 'cuda' was asked for and cannot run: "),
        ({"backend": "gpu"}, ValueError, "backend: expected one of .*got 'gpu'"),
    ],
)
def test_errors(arguments, error, text):
    given = {"x": torch.ones(1, 3, 5, 5), "packed": random_packed(FMT, 4, 3, 3, 3), **arguments}
    with pytest.raises(error, match=f"^inq.conv2d: {text}"):
        inq.conv2d(**given)


def test_a_row_scale_takes_no_gradient():
    packed = random_packed(FMT, 4, 3, 3, 3, scale=True)
    packed.weight_scale.requires_grad_()
    with pytest.raises(ValueError, match="^inq.conv2d: weight_scale: expected requires_grad=False"):
        inq.conv2d(torch.ones(1, 3, 5, 5), packed)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("name", "value"), [("padding", 2**63 - 1), ("padding", 2**31), ("dilation", 2**62 + 1)])
def test_numbers_that_would_overflow_are_refused(name, value, backend):
    packed = random_packed(inq.Format(4), 4, 1, 1, 1)
    with pytest.raises(ValueError, match=rf"inq.conv2d: {name}: expected ints under 2\^31, got"):
        inq.conv2d(torch.randn(1, 4, 5, 5), packed, groups=4, backend=backend, **{name: (1, value)})


def test_products_on_a_gpu_are_without_cudnn():
    """Its transforms are not exact where the sums of integers are. Nothing here asks for a device."""
    before = torch.backends.cudnn.enabled
    with reference._ieee_products(torch.device("cuda")):
        assert not torch.backends.cudnn.enabled
    assert torch.backends.cudnn.enabled == before
    with reference._ieee_products(torch.device("cpu")):
        assert torch.backends.cudnn.enabled == before
