"""csrc/register_cuda*.cpp on the emulator: the CUDA library's operators, from torch's tensors to kernels and back.

What is checked beside values: bounds and races of every buffer that an operator allocates, that it works on the device
and stream of its tensors, that it refuses tensors of others, and that no error of CUDA is lost.
"""

import itertools

import pytest
import torch
from support import FORMATS, generator, integer_case, random_packed, same_bits
from support_operators import library, on_device

import inq_kernels as inq
from inq_kernels import cuda, fragments, layouts, reference

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled library has these operators here")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
leaf = torch.ops.inq_cuda


@pytest.fixture(scope="module", autouse=True)
def operators():
    return library()


def parts(packed):
    return packed.weight, packed.weight_exp, packed.weight_scale


def tail(packed, layout="storage"):
    return packed.format.bits, packed.format.levels, layout, ""


def bits(numel, share, seed=0):
    return reference.pack_bits(torch.rand(numel, generator=generator(seed)) < share)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ["max", "mse"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_exponents(granularity, rule, dtype):
    for fmt, shape in zip(FORMATS, [(3, 70), (1, 1), (40, 1), (2, 3, 5), (5,), (1, 300)] * 2, strict=False):
        w = torch.randn(shape, generator=generator(1)).to(dtype)
        named = inq.Format(fmt.bits, fmt.levels, granularity, rule)
        with on_device():
            n1 = cuda.exponents(w, fmt.bits, fmt.levels, granularity, rule)
        assert torch.equal(n1, reference.exponents(w, named)), (named, shape)


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_portion_in_three_operators(granularity, random):
    for i, dtype in enumerate(DTYPES):
        fmt = inq.Format(4, granularity=granularity)
        w = torch.randn(6, 211, generator=generator(i)).to(dtype)
        mask, keep = bits(w.numel(), 0, i), bits(w.numel(), 0.8, i)
        w.masked_fill_(~reference.unpack_bits(keep, w.shape), 0.0)
        rule = (fmt.levels, fmt.granularity, fmt.exponent)
        with on_device(seed=i):
            n1, threshold = cuda.exponents_and_threshold(w, mask, keep, 500, random, 7, fmt.bits, *rule)
            alone = cuda.partition_threshold(w, mask, keep, 500, random, 7)
        assert torch.equal(n1, reference.exponents(w, fmt))
        assert torch.equal(threshold, reference.partition_threshold(w, mask, keep, 500, random, 7))
        assert torch.equal(alone, threshold)
        expected, held = w.clone(), mask.clone()
        reference.quantize_with_mask_(expected, held, n1, threshold, keep, fmt, random, 7)
        got = w.t().contiguous().t()  # other strides: the same flat order
        with on_device(seed=i):
            cuda.quantize_with_mask_(got, mask, n1, threshold, keep, fmt.bits, fmt.levels, random, 7)
        assert same_bits(got.contiguous(), expected)
        assert torch.equal(mask, held)


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("derive", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_portion_of_many_tensors(granularity, derive, random):
    fmt = inq.Format(3, "dense", granularity)
    for i, dtype in enumerate(DTYPES):
        shapes = [(7, 31), (1, 1), (33, 4), (5, 2, 3, 3), (700,)]
        ws = [torch.randn(s, generator=generator(10 * i + j)).to(dtype) for j, s in enumerate(shapes)]
        masks = [bits(w.numel(), 0 if derive else 0.3, j) for j, w in enumerate(ws)]
        keeps = [None, None, bits(ws[2].numel(), 2), None, None]
        n1s = [torch.full((w.shape[0], 1), -100, dtype=torch.int8) for w in ws]
        if not derive:
            n1s = [reference.exponents(w, fmt) for w in ws]
        counts = [w.numel() // 2 - (0 if derive else w.numel() // 3) for w in ws]
        args = (counts, derive, fmt.bits, fmt.levels, fmt.granularity, fmt.exponent, random, [3, 1, 4, 1, 5])
        copies = [[t.clone() for t in ts] for ts in (ws, masks, n1s)]
        reference.freeze_portion_(*copies, keeps, counts, derive, fmt, random, args[-1])
        with on_device(seed=i):
            cuda.freeze_portion_(ws, masks, n1s, keeps, *args)
        for got, expected in zip((ws, masks, n1s), copies, strict=True):
            assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", ["masked_sgd_", "masked_adamw_"])
def test_steps_of_parameters_of_every_dtype(name):
    g = generator(3)
    shapes = [(3, 5), (700,), (2, 3, 4, 4), (1,), (0, 3), (40, 30)] * 2
    params = [torch.randn(s, generator=g).to(DTYPES[i % 3]) for i, s in enumerate(shapes)]
    params[2] = params[2].contiguous(memory_format=torch.channels_last)
    grads = [torch.randn(p.shape, generator=g).to(p.dtype) for p in params]
    states = [[torch.rand(p.shape, generator=g) for p in params] for _ in range(1 if name == "masked_sgd_" else 2)]
    empty = torch.empty(0, dtype=torch.uint8)
    masks = [empty if i % 2 else bits(p.numel(), 0.5, i) for i, p in enumerate(params)]
    numbers = (
        (0.1, 0.9, 0.1, 1e-2, True, False, False) if name == "masked_sgd_" else (0.1, 0.9, 0.99, 1e-2, 1e-8, 3, True)
    )
    copies = [[t.clone() for t in ts] for ts in (params, grads, *states)]
    getattr(reference, name)(*copies, masks, *numbers)
    with on_device():
        getattr(cuda, name)(params, grads, *states, masks, *numbers)
    for got, expected in zip((params, grads, *states), copies, strict=True):
        for a, b in zip(got, expected, strict=True):
            # One unit in the last place of 16-bit numbers.
            torch.testing.assert_close(a, b, rtol={4: 1e-5, 2: 2.0**-7}[a.element_size()], atol=1e-6)
    with on_device():
        getattr(cuda, name)([], [], *([] for _ in states), [], *numbers)
        assert library()._submitted() == 0


# --- storage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_storage(fmt):
    for i, (n, k) in enumerate([(1, 1), (5, 8), (17, 65), (33, 100), (1, 259)]):
        packed = random_packed(fmt, n, k, scale=bool(i % 2), seed=i)
        dtype = DTYPES[i % 3]
        w, (stored, n1, scale) = inq.unpack(random_packed(fmt, n, k, n1=-1, seed=i), dtype), parts(packed)
        row = torch.full((n, 1), -1, dtype=torch.int8)
        wide = torch.zeros(n, k, dtype=dtype).t().contiguous().t()
        with on_device(seed=i):
            assert torch.equal(cuda.pack(w, row, *tail(packed)[:2]), reference.pack(w, row, fmt))
            got = cuda.unpack(stored, n1, scale, k, *tail(packed)[:2], dtype)
            cuda.unpack_(wide, stored, n1, scale, k, *tail(packed)[:2])
            for layout in (*fragments.LAYOUTS, "slices_fp16", "cpu16"):
                made = cuda.prepack(stored, k, *tail(packed)[:2], layout)
                assert torch.equal(made, layouts.prepack(stored, k, fmt, layout)), (layout, n, k)
                assert torch.equal(cuda.unprepack(made, n, k, *tail(packed)[:2], layout), stored)
        expected = reference.unpack(stored, n1, scale, k, fmt, dtype)
        assert same_bits(got, expected)
        assert same_bits(wide.contiguous(), expected)


# --- products ---------------------------------------------------------------------------------------------------------

VIEWS = {
    "plain": lambda x: x,
    "one row": lambda x: x[0],
    "no row": lambda x: x[:0],
    "3-D": lambda x: x.view(1, *x.shape),
    "3-D transposed": lambda x: x.view(1, *x.shape).transpose(0, 1),
    "transposed": lambda x: x.t().contiguous().t(),
    "wide": lambda x: torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, : x.shape[1]],
    "an odd offset": lambda x: torch.nn.functional.pad(x, (1, 2), value=torch.nan)[:, 1:-2],
    "stride 0": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_views_of_x(dtype, view):
    for n, k in ((20, 64), (3, 61), (1, 1)):
        packed = random_packed(inq.Format(5), n, k, scale=True, n1=-2)
        x = VIEWS[view](integer_case(packed.format, k, (5, k), dtype))
        grad = VIEWS[view](integer_case(packed.format, n, (5, n), dtype))
        bias = torch.arange(float(n)).to(dtype)
        plain = random_packed(packed.format, n, k, n1=-2)
        with on_device():
            y = cuda.linear(x, *parts(packed), bias, *tail(packed))
            dx = cuda.linear_dx(grad, *parts(plain), k, *tail(plain))
        assert same_bits(y + 0.0, reference.linear(x, *parts(packed), bias, packed.format) + 0.0)
        assert same_bits(dx + 0.0, reference.linear_dx(grad, *parts(plain), k, plain.format) + 0.0)


@pytest.mark.parametrize("capability", [80, 86, 90, 120])
@pytest.mark.parametrize("m", [1, 8, 64, 65, 130])
def test_every_number_of_rows(m, capability):
    """K a multiple of 8, so that 65 rows and more take wgmma on Hopper; and 61, which no tensor map describes."""
    for fmt, dtype, k in ((inq.Format(4), torch.float16, 320), (inq.Format(5, "dense"), torch.bfloat16, 61)):
        packed = random_packed(fmt, 41, k)
        x = integer_case(fmt, k, (m, k), dtype)
        bias = torch.randn(41, generator=generator(), dtype=torch.float64)
        with on_device(capability, seed=m):
            y = cuda.linear(x, *parts(packed), bias, *tail(packed))
        expected = reference.linear(x, *parts(packed), bias.float(), fmt)
        assert same_bits(y + 0.0, expected + 0.0)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_format(fmt):
    """The words that hold a format are those that kernels decode: three magnitudes, dense or not, are held as four."""
    n, k = 20, 70
    for i, dtype in enumerate((torch.float16, torch.bfloat16)):
        packed = random_packed(fmt, n, k, n1=-2, seed=i)
        x, grad = integer_case(fmt, k, (3, k), dtype), integer_case(fmt, n, (3, n), dtype)
        laid_out = layouts.prepack(packed.weight, k, fmt, cuda.LAYOUTS[dtype])
        with on_device():
            y = cuda.linear(x, *parts(packed), None, *tail(packed))
            dx = cuda.linear_dx(grad, *parts(packed), k, *tail(packed))
            decoded = leaf.decode(laid_out, n, k, fmt.bits, fmt.levels == "dense", dtype)
            sums = x.float() @ decoded.float().T
            finished = leaf.finish(sums, packed.weight_exp, None, None, fmt.bits, fmt.levels == "dense", dtype)
        expected = reference.linear(x, *parts(packed), None, fmt) + 0.0
        assert same_bits(y + 0.0, expected)
        assert same_bits(finished + 0.0, expected)
        assert same_bits(dx + 0.0, reference.linear_dx(grad, *parts(packed), k, fmt) + 0.0)


def test_sums_that_splits_share_on_hopper():
    """Few tiles and a long K: the choice cuts it."""
    k = 2048
    packed = random_packed(inq.Format(4), 40, k, n1=-2)
    x = integer_case(packed.format, k, (70, k), torch.float16)
    assert "splits 4" in leaf.plan("linear", 70, 40, k, 4, False, True, True, 90, 16)
    with on_device(processors=16):
        y = cuda.linear(x, *parts(packed), None, *tail(packed))
    assert same_bits(y + 0.0, reference.linear(x, *parts(packed), None, packed.format) + 0.0)


def test_the_dense_path(monkeypatch):
    """From 2048 rows on: decoded weights, torch's product in float32, the rows' factors."""
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype))
    packed = random_packed(inq.Format(5, "dense"), 5, 9, scale=True)
    x = integer_case(packed.format, 9, (2, 1024, 9), torch.float16)
    bias = torch.randn(5, generator=generator()).half()
    with on_device():
        y = cuda.linear(x, *parts(packed), bias, *tail(packed))
        assert library()._submitted() == 4  # prepack's table, prepack, decode, finish
    assert same_bits(y + 0.0, reference.linear(x, *parts(packed), bias, packed.format) + 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8(dtype):
    for fmt, view in zip(FORMATS, VIEWS, strict=False):
        packed = random_packed(fmt, 20, 61, scale=True)
        x = VIEWS[view](integer_case(fmt, 61, (5, 61), dtype))
        with on_device():
            y = cuda.linear_fp8(x, *parts(packed), None, *tail(packed))
        assert same_bits(y + 0.0, reference.linear_fp8(x, *parts(packed), None, fmt) + 0.0)


@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 7), (3, 5, 0), (70, 5, 0), (3, 1, 1)], ids=str)
def test_empty_and_smallest_products(shape):
    m, n, k = shape
    fmt = inq.Format(4)
    w, n1 = torch.zeros(n, fmt.row_bytes(k), dtype=torch.uint8), torch.zeros(n, 1, dtype=torch.int8)
    bias = torch.arange(float(n)).half()
    x, grad = torch.ones(m, k, dtype=torch.float16), torch.ones(m, n, dtype=torch.float16)
    tail = (4, "paper", "storage", "")
    with on_device():
        assert torch.equal(cuda.linear(x, w, n1, None, bias, *tail), bias.expand(m, n))
        assert torch.equal(cuda.linear_fp8(x, w, n1, None, bias, *tail), bias.expand(m, n))
        assert torch.equal(cuda.linear_dx(grad, w, n1, None, k, *tail), torch.zeros(m, k).half())


# --- every operator ---------------------------------------------------------------------------------------------------


def calls():
    """{operator: its arguments}, tensors all distinct."""
    fmt, n, k = inq.Format(4), 20, 64
    packed = random_packed(fmt, n, k, scale=True)
    stored, n1, scale = parts(packed)
    made = {layout: layouts.prepack(stored, k, fmt, layout) for layout in fragments.LAYOUTS}
    w, half = torch.randn(n, k, generator=generator()), lambda *s: torch.randn(s, generator=generator()).half()
    mask, keep = bits(n * k, 0.2), bits(n * k, 2)
    f, rule = (4, False), (4, False, False, True)
    threshold = torch.tensor([0x3F000000, 1])
    none, other = torch.empty(0, dtype=torch.uint8), torch.randn(7, 3, generator=generator(1))
    row = n1.clone()
    lists = lambda: ([w.clone(), other.clone()], [half(n, k).float(), other.clone()])  # noqa: E731
    return {
        "exponents": (w, *rule),
        "partition_threshold": (w, mask, keep, 100, False, 0),
        "exponents_and_threshold": (w, mask, keep, 100, False, 0, *rule),
        "quantize_with_mask_": (w.clone(), mask.clone(), row, threshold, keep, *f, False, 0),
        "freeze_portion_": (
            *([w.clone(), other.clone()], [mask.clone(), bits(21, 0)], [row.clone(), torch.zeros(7, 1).char()]),
            *([keep, none], [100, 5], True, *rule, False, [0, 1]),
        ),
        "masked_sgd_": (*lists(), lists()[0], [mask, none], 0.1, 0.9, 0.0, 0.0, False, False, False),
        "masked_adamw_": (*lists(), *map(list, lists()), [mask, none], 0.1, 0.9, 0.99, 0.0, 1e-8, 1, False),
        "pack": (inq.unpack(packed, torch.float32), n1, *f),
        "unpack": (stored, n1, scale, k, *f, torch.float32),
        "unpack_": (torch.empty(n, k), stored, n1, scale, k, *f),
        "prepack": (stored, fragments.encode_table(fragments.FP16, fmt), k, *f, 0),
        "unprepack": (made[fragments.FP16], n, k, *f, 0),
        "linear": (half(3, k), made[fragments.FP16], n1, scale, half(n), *f),
        "linear_dx": (half(3, n), made[fragments.FP16], n1, scale, k, *f),
        "linear_fp8": (half(3, k), made[fragments.E4M3], n1, scale, half(n), *f),
        "decode": (made[fragments.FP16], n, k, *f, torch.float16),
        "finish": (half(3, n).float(), n1, scale, half(n), *f, torch.float16),
    }


NAMES = list(calls())
every = pytest.mark.parametrize("name", NAMES)


def tensors_of(args):
    listed = [t for arg in args for t in (arg if isinstance(arg, list) else [arg])]
    return [t for t in listed if isinstance(t, torch.Tensor) and t.numel()]


def replaced(args, old, new):
    swap = lambda t: new if t is old else t  # noqa: E731
    return [[swap(t) for t in arg] if isinstance(arg, list) else swap(arg) for arg in args]


def run(name, args):
    """What an operator returns and what it changes, flat."""
    result = getattr(leaf, name)(*args)
    results = list(result) if isinstance(result, tuple) else [] if result is None else [result]
    return results + tensors_of(args)


def test_every_operator_is_called_here():
    declared = torch._C._dispatch_get_all_op_names()
    assert {*NAMES, "plan"} == {name[10:] for name in declared if name.startswith("inq_cuda::")}


@every
def test_tensors_of_another_device_are_refused(name):
    """Each argument in turn, on no GPU and on another: an error that says so, nothing is changed or launched."""
    count = len(tensors_of(calls()[name]))
    for i, index in itertools.product(range(count), (-1, 3)):
        if (i == 0 or name == "prepack") and index == 3:
            continue  # the device is the first one's; prepack's table is on the CPU
        args = calls()[name]
        before = [t.clone() for t in tensors_of(args)]
        with on_device(elsewhere=[(tensors_of(args)[i], index)]):
            with pytest.raises((ValueError, RuntimeError), match=rf"inq_cuda\.{name}: .*expected .*(CUDA|cuda|CPU)"):
                getattr(leaf, name)(*args)
            assert library()._submitted() == 0
        assert all(same_bits(a, b) for a, b in zip(tensors_of(args), before, strict=True))


@every
def test_no_error_of_cuda_is_lost(name):
    """Each launch, copy and clear in turn is refused."""
    with on_device():
        run(name, calls()[name])
        count = library()._submitted()
    assert count > 0
    for i in range(count):
        with on_device(fails_at=i), pytest.raises(RuntimeError, match="inq_cuda.*CUDA: cudaErrorLaunchFailure"):
            run(name, calls()[name])


@every
def test_any_alignment_gives_the_same(name):
    """Each tensor in turn one element off: the same results, or for the layouts of products an error."""
    with on_device():
        expected = run(name, calls()[name])
    for i in range(len(tensors_of(calls()[name]))):
        args = calls()[name]
        t = tensors_of(args)[i]
        moved = torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)
        args = replaced(args, t, moved)
        if t.dim() == 4 and t.dtype == torch.uint8:
            with on_device(), pytest.raises((ValueError, RuntimeError), match="weight: expected an address"):
                run(name, args)
            continue
        with on_device():
            got = run(name, args)
        assert all(same_bits(a + 0, b + 0) for a, b in zip(got, expected, strict=True)), i


@every
def test_wrong_dtypes_and_shapes_are_refused(name):
    """Each tensor in turn of another dtype, longer, of one dimension more: an error, nothing is launched."""
    changes = {
        "dtype": lambda t: t.int() if t.dtype == torch.int64 else t.long(),
        "longer": lambda t: torch.cat([t, t[:1]]),
        "rank": lambda t: t[None],
    }
    for i, change in itertools.product(range(len(tensors_of(calls()[name]))), changes):
        if (name, i, change) in TAKEN:
            continue
        args = calls()[name]
        t = tensors_of(args)[i]
        args = replaced(args, t, changes[change](t))
        with on_device():
            with pytest.raises((ValueError, RuntimeError), match=rf"inq_cuda\.{name}: "):
                run(name, args)
            assert library()._submitted() == 0, (i, change)


# Any number of rows or weights, any rank; a bias of another dtype is converted.
TAKEN = {
    *(
        (name, 0, change)
        for name in ("linear", "linear_dx", "linear_fp8", "exponents")
        for change in ("longer", "rank")
    ),
    *((name, 0, "rank") for name in ("partition_threshold", "exponents_and_threshold", "unpack_")),
    *(("linear", 4, "dtype"), ("linear_fp8", 4, "dtype"), ("finish", 3, "dtype")),
    *(("prepack", 0, "longer"), ("finish", 0, "longer")),
}


@pytest.mark.parametrize("name", ["masked_sgd_", "masked_adamw_", "freeze_portion_"])
def test_lists_that_do_not_belong_together_are_refused(name):
    """Of two dtypes, or one too short."""
    lists = [i for i, arg in enumerate(calls()[name]) if isinstance(arg, list)]
    for i in lists[1:]:
        args = list(calls()[name])
        args[i] = args[i][:1]
        with on_device(), pytest.raises((ValueError, RuntimeError), match=rf"inq_cuda\.{name}: .*expected 2 of them"):
            run(name, args)
    args = list(calls()[name])
    args[0] = [args[0][0], args[0][1].half()]
    with on_device(), pytest.raises((ValueError, RuntimeError), match=rf"inq_cuda\.{name}: .*(float32|one dtype)"):
        run(name, args)


def test_operands_may_share_memory():
    """They are only read: a bias that is a row of x, exponents within the bytes of the weight."""
    packed = random_packed(inq.Format(4), 64, 64, n1=0)
    x = integer_case(packed.format, 64, (3, 64), torch.float16)
    weight = layouts.prepack(packed.weight, 64, packed.format, fragments.FP16)
    shared = weight.flatten()[:64].view(torch.int8).view(64, 1)
    with on_device():
        y = leaf.linear(x, weight, shared, None, x[0], 4, False)
    expected = reference.linear(x, packed.weight, shared, None, x[0], packed.format)
    assert same_bits(y + 0.0, expected + 0.0)
