"""Triton's conv2d: bit for bit the reference on integers, as good as torch's, in every argument, with any strides."""

import contextlib
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    FORMATS,
    assert_as_good_as_dense,
    generator,
    integer_case,
    integer_weight,
    plain,
    random_packed,
    same_bits,
)
from support_triton import DEVICE, EXAMPLES, assert_same, check_error, fenced, guarded, pairwise

import inq_kernels as inq
from inq_kernels import layouts, reference, slices

pytest.importorskip("triton")
from inq_kernels.triton_ops import conv2d as triton_conv2d

# Triton's interpreter gives numpy arrays of one element where Python wants an integer: the bounds of loops.
pytestmark = [
    pytest.mark.usefixtures("quick_interpreter"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    # What becomes infinite in the interpreter's numpy, as it does silently on a GPU.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FMT = inq.Format(4)

# x, weight, stride, padding, dilation, groups, and which kernel it must run.
CASES = {
    "plain": ((2, 3, 8, 9), (4, 3, 3, 3), (1, 1), (0, 0), (1, 1), 1, "tile"),
    "1x1": ((2, 40, 4, 5), (33, 40, 1, 1), (1, 1), (0, 0), (1, 1), 1, "tile"),
    "1x1, stride": ((2, 5, 5, 7), (17, 5, 1, 1), (2, 3), (0, 0), (1, 1), 1, "tile"),
    "1x1, padding": ((1, 40, 4, 3), (7, 40, 1, 1), (1, 1), (1, 2), (1, 1), 1, "tile"),
    "whole K": ((1, 32, 5, 6), (3, 32, 2, 2), (1, 1), (0, 0), (1, 1), 1, "tile"),
    "one output": ((1, 1, 3, 3), (1, 1, 3, 3), (1, 1), (0, 0), (1, 1), 1, "direct"),
    "stride": ((2, 3, 9, 8), (4, 3, 3, 2), (2, 3), (0, 0), (1, 1), 1, "tile"),
    "padding": ((2, 3, 5, 6), (4, 3, 3, 3), (1, 1), (1, 2), (1, 1), 1, "tile"),
    "dilation": ((2, 3, 9, 9), (4, 3, 3, 2), (1, 1), (1, 1), (2, 3), 1, "tile"),
    "all of them": ((2, 4, 11, 12), (6, 2, 3, 2), (2, 1), (2, 1), (2, 3), 2, "tile"),
    "kernel larger than x": ((1, 2, 2, 2), (3, 2, 5, 5), (1, 1), (2, 2), (1, 1), 1, "tile"),
    "many outputs and pixels": ((2, 3, 13, 14), (70, 3, 2, 2), (1, 1), (1, 1), (1, 1), 1, "tile"),
    "split": ((1, 100, 4, 5), (20, 100, 3, 3), (1, 1), (1, 1), (1, 1), 1, "tile"),
    "groups": ((2, 6, 5, 5), (40, 3, 3, 3), (1, 1), (0, 0), (1, 1), 2, "tile"),
    "groups, split": ((1, 200, 3, 3), (6, 100, 3, 3), (1, 1), (1, 1), (1, 1), 2, "tile"),
    "depthwise": ((2, 5, 6, 7), (5, 1, 3, 3), (1, 1), (1, 1), (1, 1), 5, "direct"),
    "depthwise, two a channel": ((2, 4, 6, 6), (8, 1, 3, 3), (2, 1), (0, 0), (1, 2), 4, "direct"),
    "depthwise, two slices": ((1, 3, 8, 9), (3, 1, 7, 7), (1, 2), (3, 2), (1, 1), 3, "direct"),
    "depthwise, many": ((1, 70, 5, 4), (70, 1, 2, 2), (1, 1), (0, 0), (1, 1), 70, "direct"),
}
MEMORY = ("contiguous", "channels_last", "strided")
# Every case in each dtype; formats and strides take turns, so that each meets each dtype and kind of kernel.
CHOSEN = [
    (case, DTYPES[j], FORMATS[(3 * i + j + i // 8) % 8], MEMORY[(i + j) % 3])
    for (i, case), j in itertools.product(enumerate(CASES), range(3))
]
chosen = pytest.mark.parametrize(("case", "dtype", "fmt", "memory"), CHOSEN, ids=str)


def stored_as(x, memory):
    """The same values with other strides; "one image": the first in the place of all."""
    if memory == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if memory == "strided":
        return x.repeat_interleave(2, 3).transpose(2, 3).contiguous().transpose(2, 3)[..., ::2]
    if memory == "swapped":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if memory == "wide":
        # Some channels of a channels-last tensor, from an odd one on.
        return F.pad(x, (0, 0, 0, 0, 1, 2)).to(memory_format=torch.channels_last)[:, 1 : 1 + x.shape[1]]
    if memory == "one image":
        return x[:1].expand(x.shape)
    return x


def geometry(case):
    """(x's shape, the weight's, the operator's arguments of a convolution)."""
    x_shape, w_shape, *conv, _ = CASES[case]
    return x_shape, w_shape, (list(w_shape[2:]), *map(list, conv[:3]), conv[3])


def run(x, packed, bias, conv, layout=None):
    """Our kernel on weights in ``layout``, by default the best for x."""
    fmt = packed.format
    layout = layout or slices.best(x.dtype, fmt)
    weight = layouts.prepack(packed.weight, packed.k, fmt, layout)
    parts = [None if t is None else t.to(DEVICE) for t in (weight, packed.weight_exp, packed.weight_scale, bias)]
    y = triton_conv2d.conv2d(on_device(x), *parts, *conv, fmt.bits, fmt.levels, layout, "triton")
    assert y.stride() == torch.empty_like(y, memory_format=reference.conv_memory_format(x)).stride()
    return y.cpu()


def on_device(x):
    """x on the device, with the strides that it has."""
    return x if DEVICE == "cpu" else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE).copy_(x)


def check(x, packed, bias, conv):
    """Against float64."""
    y = run(x, packed, bias, conv)
    arguments = (None, *conv[1:])
    exact = F.conv2d(x.double(), inq.unpack(packed, torch.float64), *arguments)
    dense = F.conv2d(x, inq.unpack(plain(packed), torch.float64).to(x.dtype), *arguments).double()
    if packed.weight_scale is not None:
        dense = dense * packed.weight_scale.double().view(-1, 1, 1)
    if bias is not None:
        exact, dense = (t + bias.double().view(-1, 1, 1) for t in (exact, dense))
    unit = torch.exp2(packed.weight_exp.double()).view(-1, 1, 1)
    assert_as_good_as_dense(y, exact, dense.to(x.dtype), unit)
    return y


def select(case, dtype, fmt, channels_last=False):
    (b, c, h, w), shape, (kernel, stride, padding, dilation, groups) = geometry(case)
    size = inq.library.conv_output_size((h, w), kernel, stride, padding, dilation)
    k, codes = shape[1] * kernel[0] * kernel[1], slices.codec(slices.best(dtype, fmt), fmt).codes
    dot = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    return triton_conv2d.select(dot, b * size[0] * size[1], shape[0] // groups, groups, k, codes, channels_last, 4)


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("i", range(len(CASES)), ids=list(CASES).__getitem__)
def test_integers_bit_for_bit(i, guarded):
    """Each named geometry once; dtypes, formats and strides take turns, and the pairs below have them all."""
    case, dtype, fmt, memory = CHOSEN[3 * i + i % 3]
    x_shape, w_shape, conv = geometry(case)
    packed = random_packed(fmt, *w_shape, seed=len(case))
    x = stored_as(integer_case(fmt, packed.k, x_shape, dtype, seed=len(case)), memory)
    bias = None if memory == "strided" else torch.randn(w_shape[0], generator=generator(3)).to(dtype)
    expected = reference.conv2d(x, packed.weight, packed.weight_exp, None, bias, *conv, fmt)
    assert torch.equal(run(x, packed, bias, conv), expected)


# Every pair of choices of a convolution twice, in few small cases. ``channels`` and ``outputs`` are those of a group,
# of depthwise convolutions the channels in all; images are larger than the window by ``extra``.
AXES = dict(
    batch=(1, 2, 3),
    groups=(1, 2, 3, "depthwise", "two a channel"),
    channels=(1, 3, 17, 70),
    outputs=(2, 5, 33),
    kernel=((1, 1), (1, 3), (3, 3), (2, 5)),
    stride=((1, 1), (2, 1), (3, 2)),
    padding=((0, 0), (1, 2), (2, 1)),
    dilation=((1, 1), (2, 1), (1, 3)),
    extra=((0, 0), (3, 5), (6, 1)),
    memory=("contiguous", "channels_last", "strided", "swapped", "wide", "one image"),
    fmt=FORMATS,
    dtype=DTYPES,
    layout=(layouts.STORAGE, slices.FP16, slices.BF16),
    bias=(False, True),
    scale=(False, True),
    exponents=("of rows", "one", "apart"),
)
PAIRS = pairwise(0, **AXES) + pairwise(1, **AXES)


def described(case):
    kernel, groups = "x".join(map(str, case["kernel"])), str(case["groups"]).replace(" ", "_")
    return f"{case['channels']}x{case['outputs']}x{groups}-{kernel}-{case['memory']}-{case['fmt']}-{case['dtype']}"


def shapes(case):
    """(x's shape, the weight's, the operator's arguments) of a case of AXES."""
    kernel, stride, padding, dilation = (case[name] for name in ("kernel", "stride", "padding", "dilation"))
    groups, channels, outputs = case["groups"], case["channels"], case["outputs"]
    if isinstance(groups, str):
        groups, channels, outputs = channels, 1, 2 if groups == "two a channel" else 1
    size = [max(dilation[i] * (kernel[i] - 1) + 1 + case["extra"][i] - 2 * padding[i], 1) for i in range(2)]
    weight = (groups * outputs, channels, *kernel)
    return (case["batch"], groups * channels, *size), weight, tuple(map(list, (kernel, stride, padding, dilation)))


def weight_of(case, shape):
    rows = shape[0]
    n1 = {"of rows": None, "one": -3, "apart": torch.tensor([-20, 6]).repeat(rows)[:rows].view(-1, 1)}
    return random_packed(case["fmt"], *shape, n1=n1[case["exponents"]], scale=case["scale"], seed=rows)


def on_device_in(layout, packed):
    """(the weight's parts, in memory with fences; the name of their layout)."""
    fmt = packed.format
    layout = layout if layout == layouts.STORAGE or slices.has(layout, fmt) else slices.FP16
    weight = layouts.prepack(packed.weight, packed.k, fmt, layout)
    return [fenced(t) for t in (weight, packed.weight_exp, packed.weight_scale)], layout


def exact_convolution(x, packed, bias, conv):
    """By the definition, in integers, which float64 adds exactly; row scale, bias and dtype each round once."""
    w, n2 = integer_weight(packed)
    y = F.conv2d(x.double(), w.double(), None, *conv[1:]) * torch.exp2(n2.double()).view(-1, 1, 1)
    y = y.float()
    if packed.weight_scale is not None:
        y = y * packed.weight_scale.view(-1, 1, 1)
    return (y if bias is None else y + bias.float().view(-1, 1, 1)).to(x.dtype)


@contextlib.contextmanager
def torchs_own(dtype):
    """torch's convolutions in half precision without oneDNN: of some inputs one column wide its own crash (torch 2.13,
    a Xeon with AVX512-FP16 and AMX)."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = before and dtype not in (torch.float16, torch.bfloat16)
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def check_conv2d(case):
    x_shape, w_shape, window = shapes(case)
    fmt, dtype, conv = case["fmt"], case["dtype"], (*window, x_shape[1] // w_shape[1])
    packed = weight_of(case, w_shape)
    bias = torch.randn(w_shape[0], generator=generator(1)).to(dtype) if case["bias"] else None
    parts, layout = on_device_in(case["layout"], packed)
    parts.append(fenced(bias))

    def conv2d(x):
        x = fenced(x)
        before = [None if t is None else t.clone() for t in (x, *parts)]
        with pytest.MonkeyPatch.context() as patch, guarded(patch, reads=(x, *parts)):
            y = triton_conv2d.conv2d(x, *parts, *conv, fmt.bits, fmt.levels, layout, "triton")
        assert all(t is None or same_bits(t, b) for t, b in zip((x, *parts), before, strict=True))
        assert y.stride() == torch.empty_like(y, memory_format=reference.conv_memory_format(x)).stride()
        return y.cpu()

    x = stored_as(torch.randn(x_shape, generator=generator(2)).to(dtype), case["memory"])
    arguments, w = (None, *conv[1:]), inq.unpack(packed, torch.float64)
    exact = F.conv2d(x.double(), w, *arguments)
    with torchs_own(dtype):
        dense = F.conv2d(x, inq.unpack(plain(packed), torch.float64).to(dtype), *arguments).double()
    dense = dense if packed.weight_scale is None else dense * packed.weight_scale.double().view(-1, 1, 1)
    size = F.conv2d(x.double().abs(), w.abs(), *arguments)
    if bias is not None:
        added = bias.double().view(-1, 1, 1)
        exact, dense, size = exact + added, dense + added, size + added.abs()
    unit = torch.exp2(packed.weight_exp.double()).view(-1, 1, 1)
    check_error(conv2d(x), exact, dense.to(dtype), unit, size)
    x = stored_as(integer_case(fmt, packed.k, x_shape, dtype, seed=2), case["memory"])
    assert_same(conv2d(x), exact_convolution(x, packed, bias, conv), case["scale"] and case["bias"])


def check_conv2d_dx(case):
    x_shape, w_shape, window = shapes(case)
    fmt, dtype, conv = case["fmt"], case["dtype"], (*window, x_shape[1] // w_shape[1])
    y_shape = (x_shape[0], w_shape[0], *inq.library.conv_output_size(x_shape[2:], *window))

    def conv2d_dx(grad, packed):
        parts, layout = on_device_in(case["layout"], packed)
        with pytest.MonkeyPatch.context() as patch, guarded(patch):
            dx = triton_conv2d.conv2d_dx(
                fenced(grad), *parts, list(x_shape), *conv, fmt.bits, fmt.levels, layout, "triton"
            )
        assert dx.shape == x_shape
        return dx.cpu()

    def gradient(grad, w):
        with torchs_own(grad.dtype):
            return torch.nn.grad.conv2d_input(x_shape, w, grad, *conv[1:])

    packed = weight_of(case, w_shape)
    grad = stored_as(torch.randn(y_shape, generator=generator(3)).to(dtype), case["memory"])
    w = inq.unpack(packed, torch.float64)
    exact, dense = gradient(grad.double(), w), gradient(grad, w.to(dtype))
    size = gradient(grad.double().abs(), w.abs())
    operand = torch.finfo(dtype).eps / 2 if case["scale"] else 0.0
    check_error(conv2d_dx(grad, packed), exact, dense, w.abs().amax().clamp(min=1e-300), size, operand)
    # Small integers, and rows of one exponent: the sums are exact.
    packed = random_packed(fmt, *w_shape, n1=-3, seed=5)
    grad = stored_as(torch.randint(-1, 2, y_shape, generator=generator(4)).to(dtype), case["memory"])
    exact = gradient(grad.double(), inq.unpack(packed, torch.float64))
    assert same_bits(conv2d_dx(grad, packed) + 0.0, exact.to(dtype) + 0.0)


@pytest.mark.parametrize("case", PAIRS, ids=described)
def test_conv2d_beside_float64_and_the_exact_oracle(case):
    check_conv2d(case)


@pytest.mark.parametrize("case", PAIRS, ids=described)
def test_conv2d_dx_beside_float64_and_the_exact_oracle(case):
    check_conv2d_dx(case)


RANDOM = {name: st.sampled_from(values) for name, values in AXES.items()} | {
    "channels": st.integers(1, 12),
    "outputs": st.integers(1, 20),
    "kernel": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "padding": st.tuples(st.integers(0, 3), st.integers(0, 3)),
    "dilation": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "extra": st.tuples(st.integers(0, 6), st.integers(0, 6)),
}


@settings(max_examples=EXAMPLES, deadline=None)
@given(case=st.fixed_dictionaries(RANDOM))
def test_random_convolutions(case):
    check_conv2d(case)
    check_conv2d_dx(case)


def test_the_pairs_run_every_kernel():
    """Tiles, tiles whose sums are shared out, and the kernel without tl.dot; windows that leave the image, and not."""
    kinds = set()
    for case in PAIRS:
        x_shape, w_shape, (kernel, stride, padding, dilation) = shapes(case)
        size = inq.library.conv_output_size(x_shape[2:], kernel, stride, padding, dilation)
        groups, k = x_shape[1] // w_shape[1], w_shape[1] * kernel[0] * kernel[1]
        codes = slices.codec(slices.best(case["dtype"], case["fmt"]), case["fmt"]).codes
        dot = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[case["dtype"]]
        m = x_shape[0] * size[0] * size[1]
        choice = triton_conv2d.select(dot, m, w_shape[0] // groups, groups, k, codes, False, 4)
        kinds.add((choice.kernel, choice.splits > 1, any(padding)))
    expected = {("direct", False), ("tile", False), ("tile", True)}
    assert kinds == {(*kind, padded) for kind in expected for padded in (False, True)}


@pytest.mark.parametrize(
    ("dtype", "n1", "size"),
    [
        (torch.float32, -126, 1.0),
        (torch.float32, 127, 2.0**-9),
        (torch.bfloat16, -126, 1.0),
        (torch.bfloat16, 127, 2.0**-9),
        (torch.float16, -24, 1.0),
        (torch.float16, 15, 2.0**-9),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", ["padding", "depthwise", "split"])
def test_extreme_exponents(case, dtype, n1, size):
    x_shape, w_shape, conv = geometry(case)
    # Channels of a few ones: sums of many would overflow.
    x = torch.randn(x_shape, generator=generator(2)) * size
    x[:, 3:] = 0
    y = check(x.to(dtype), random_packed(inq.Format(3), *w_shape, n1=n1), None, conv)
    assert bool(y.isfinite().all())


@pytest.mark.parametrize("case", ["padding", "depthwise"])
@pytest.mark.parametrize("fmt", [inq.Format(5), inq.Format(5, "dense"), inq.Format(4, "dense")], ids=str)
def test_large_float32(case, fmt):
    """As far as the dense convolution goes, as for linear; without tl.dot in 16 bits as well."""
    x_shape, w_shape, conv = geometry(case)
    packed = random_packed(fmt, *w_shape, n1=0)
    for size in (2.0**119, 2.0**-119):
        for dtype in (torch.float32, torch.bfloat16)[: 2 if case == "depthwise" else 1]:
            x = (torch.randn(x_shape, generator=generator(7)) * size).to(dtype)
            assert bool(check(x, packed, None, conv).isfinite().all())


@pytest.mark.parametrize("case", ["padding", "depthwise"])
def test_any_strides(case):
    _, w_shape, conv = geometry(case)
    packed, channels = random_packed(FMT, *w_shape), w_shape[1] * conv[-1]
    base = torch.randn(6, 7, 8, 6, generator=generator(3))
    for x in (base.permute(0, 3, 2, 1)[:2, :channels], base[::3, :channels], base[:1, :1].expand(2, channels, 8, 6)):
        check(x, packed, None, conv)
    check(base[0, 0].as_strided((1, channels, 4, 5), (0, 3, 0, 2)), packed, None, conv)


@pytest.mark.parametrize("case", ["whole K", "depthwise"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_in_every_layout(case, dtype):
    """Decoded numbers differ by a power of two from layout to layout: y does not, wherever words hold as many codes."""
    x_shape, w_shape, conv = geometry(case)
    for fmt in (inq.Format(3, "dense"), inq.Format(5, "dense")):
        packed = random_packed(fmt, *w_shape, seed=4)
        x = integer_case(fmt, packed.k, x_shape, dtype, seed=4)
        expected = reference.conv2d(x, packed.weight, packed.weight_exp, None, None, *conv, fmt)
        for layout in layouts.LAYOUTS:
            if layout not in slices.LAYOUTS or slices.has(layout, fmt):
                assert torch.equal(run(x, packed, None, conv, layout), expected), layout


@pytest.mark.skipif(DEVICE == "cuda", reason="tests/test_gpu.py has more than 2^31 elements on the device")
@pytest.mark.parametrize("dimension", range(4))
@pytest.mark.parametrize("groups", [1, 3])
def test_strides_that_make_more_than_31_bits(dimension, groups):
    """Neighbours in one dimension are 2^30 elements apart, so the third has an offset that int32 does not hold. Of this
    memory few pages are ever touched."""
    shape = (3, 3, 3, 3)
    packed = random_packed(FMT, 3, 3 // groups, 2, 2, n1=-3)
    x = torch.randint(-9, 10, shape, generator=generator(1)).half()
    strides = [27, 9, 3, 1]
    strides[dimension] = 2**30
    far = torch.empty(2**31 + 128, dtype=torch.float16).as_strided(shape, strides).copy_(x)
    conv = ([2, 2], [1, 1], [0, 0], [1, 1], groups)
    expected = reference.conv2d(x, packed.weight, packed.weight_exp, None, None, *conv, FMT)
    assert torch.equal(run(far, packed, None, conv), expected)


def test_parts_of_any_strides():
    x_shape, w_shape, conv = geometry("plain")
    x, packed = torch.randn(x_shape, generator=generator(5)), random_packed(FMT, *w_shape, scale=True)
    bias = torch.randn(4, generator=generator(6))
    expected = run(x, packed, bias, conv)
    exponent, scale = (t.repeat(1, 2)[:, :1] for t in (packed.weight_exp, packed.weight_scale))
    strided = inq.PackedWeight(packed.weight, exponent, scale, FMT, packed.shape)
    assert not exponent.is_contiguous()
    assert same_bits(run(x, strided, bias.repeat_interleave(2)[::2], conv), expected)


def test_a_few_images_at_a_time(monkeypatch):
    """What more pixels than int32 counts would do."""
    x_shape, w_shape, conv = geometry("padding")
    packed = random_packed(FMT, *w_shape)
    x = integer_case(FMT, packed.k, (5, *x_shape[1:]), torch.float32)
    expected = run(x, packed, None, conv)
    assert torch.equal(expected, reference.conv2d(x, packed.weight, packed.weight_exp, None, None, *conv, FMT))
    monkeypatch.setattr(triton_conv2d, "_PIXELS", 90)
    assert same_bits(run(x, packed, None, conv), expected)


@pytest.mark.parametrize("case", ["padding", "depthwise"])
def test_no_images(case):
    x_shape, w_shape, conv = geometry(case)
    y = run(torch.zeros(0, *x_shape[1:]), random_packed(FMT, *w_shape), None, conv)
    assert y.shape[:2] == (0, w_shape[0])


def test_an_image_of_more_pixels_than_kernels_count(monkeypatch):
    x_shape, w_shape, conv = geometry("plain")
    packed, x = random_packed(FMT, *w_shape), torch.zeros(x_shape)
    pixels = math.prod(run(x, packed, None, conv).shape[2:])
    monkeypatch.setattr(triton_conv2d, "_PIXELS", pixels - 1)
    with pytest.raises(ValueError, match=rf"x: expected at most {pixels - 1} output pixels an image, got \d+ × \d+"):
        run(x, packed, None, conv)


def test_float64():
    x_shape, w_shape, conv = geometry("plain")
    with pytest.raises(TypeError, match="x: expected one of .*float16.*, got torch.float64"):
        run(torch.zeros(x_shape, dtype=torch.float64), random_packed(FMT, *w_shape), None, conv)


# --- the gradient -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("case", ["all of them", "depthwise", "1x1, stride"])
def test_the_gradient_is_the_references(case, layout):
    x_shape, w_shape, conv = geometry(case)
    for dtype, scale in zip(DTYPES, (True, False, True), strict=True):
        packed = random_packed(FMT, *w_shape, scale=scale, seed=8)
        size = inq.library.conv_output_size(x_shape[2:], *conv[:4])
        grad = torch.randn(x_shape[0], w_shape[0], *size, generator=generator(9)).to(dtype).to(DEVICE)
        parts = [None if t is None else t.to(DEVICE) for t in (packed.weight, packed.weight_exp, packed.weight_scale)]
        expected = reference.conv2d_dx(grad, *parts, x_shape, *conv, FMT)
        parts[0] = layouts.prepack(packed.weight, packed.k, FMT, layout).to(DEVICE)
        dx = triton_conv2d.conv2d_dx(grad, *parts, x_shape, *conv, 4, "paper", layout, "triton")
        # Equal weights in the same call of torch: on a GPU its algorithm may differ from call to call.
        tolerance = dict(rtol=0, atol=0) if DEVICE == "cpu" else {}
        torch.testing.assert_close(dx, expected, **tolerance)


# --- which kernel runs ------------------------------------------------------------------------------------------------


@chosen
def test_the_kernel_of_each_case(case, dtype, fmt, memory):
    choice = select(case, dtype, fmt, memory == "channels_last")
    assert choice.kernel == CASES[case][-1]
    assert (choice.splits > 1) == ("split" in case)


def test_a_choice_covers_the_product():
    sizes = (1, 3, 16, 49, 100, 3136, 100352)
    for dot, m, rows, groups, k, codes, processors in itertools.product(
        ("fp16", "fp32"), sizes, (1, 4, 64, 512), (1, 32), (1, 9, 27, 576, 4608), (3, 4), (4, 132)
    ):
        choice = triton_conv2d.select(dot, m, rows, groups, k, codes, False, processors)
        tile, words = choice.tile, ((k + codes - 1) // codes + 31) // 32 * 32
        if choice.kernel == "direct":
            assert k <= 1024
            assert tile in triton_conv2d._DIRECT_TILES
            continue
        assert tile in triton_conv2d.tiles_of(dot)
        assert min(tile.bn, tile.bm) >= 16
        assert max(tile.bn, tile.bm) <= 128
        assert tile.bn * tile.bm <= 128 * 64
        # From 64 rows on Triton multiplies float32 as TF32 on sm_100.
        assert dot != "fp32" or tile.bn < 64
        assert words % tile.bk == 0
        # No split is empty, and no step is left out.
        steps = words // tile.bk
        assert (choice.splits - 1) * choice.steps < steps <= choice.splits * choice.steps


def test_large_tiles_where_there_is_enough_to_do():
    full = triton_conv2d.select("bf16", 32 * 56 * 56, 128, 1, 1152, 4, False, 132)
    assert (full.tile.bn, full.tile.bm, full.splits) == (128, 64, 1)
    # One image of 7×7 pixels: every processor gets a part of the sum.
    few = triton_conv2d.select("bf16", 49, 512, 1, 4608, 4, False, 132)
    assert few.splits * -(-512 // few.tile.bn) * -(-49 // few.tile.bm) >= 132
