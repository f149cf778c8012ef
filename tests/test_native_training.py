"""The compiled training kernels give the reference's bits: every instruction set, any number of threads."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import FORMATS, generator, same_bits
from test_masked_steps import ADAMW, EMPTY, SGD

import inq_kernels as inq
from inq_kernels import cpu, reference
from inq_kernels.reference import pack_bits, unpack_bits

# No skip: without the library this file fails, and says why.
assert cpu.unavailable() is None, cpu.unavailable()
leaf = torch.ops.inq_cpu
ISAS = ("portable", "avx2", "avx512")
DTYPES = (torch.float32, torch.bfloat16)
# Ragged in words of 64 weights, blocks of 2048 and chunks of 32768; rows that end within a byte.
SHAPES = [(1,), (7,), (8, 1), (3, 21), (64,), (65,), (5, 13), (1000,), (17, 241), (3, 5, 7, 3, 3)]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


MACHINES = [
    (isa, threads)
    for isa in ISAS[: ISAS.index(leaf.detected_isa().replace("amx", "avx512")) + 1]
    for threads in (1, 2, 3)
]


@pytest.fixture
def machines():
    """A loop over each instruction set that this machine has, with one thread and more: (isa, threads)."""
    before = leaf.isa(), torch.get_num_threads()

    def each():
        for isa, threads in MACHINES:
            leaf.set_isa(isa)
            torch.set_num_threads(threads)
            yield isa, threads
        torch.set_num_threads(1)

    yield each
    leaf.set_isa(before[0])
    torch.set_num_threads(before[1])


def bits_to_weights(bits, dtype):
    """Float32 bits, finite, as weights of ``dtype``; for bfloat16 the lower half is cut off."""
    bits = torch.where((bits & 0x7F800000) == 0x7F800000, bits & ~0x800000, bits).to(torch.int32)
    return bits.view(torch.float32) if dtype == torch.float32 else (bits >> 16).to(torch.int16).view(torch.bfloat16)


@functools.cache
def kinds(shape, dtype):
    """(name, weights): what a kernel may be wrong at."""
    return list(_kinds(shape, dtype))


def _kinds(shape, dtype):
    g = generator(len(shape))
    n = torch.randn(shape, generator=g)
    choice = torch.randint(0, 6, shape, generator=g)
    power = torch.randint(-12, 1, shape, generator=g)
    values = torch.tensor([0.0, -0.0, 0.75, 1.5, -1.0, 1.25])[choice] * torch.exp2(power.float())
    edge = torch.where(torch.rand(shape, generator=g) < 0.5, torch.nextafter(values, torch.tensor(0.0)), values)
    yield "normal", (n * 0.02).to(dtype)
    yield "few values", values.to(dtype)
    yield "edges of bins", edge.to(dtype)
    yield "equal", torch.full(shape, -0.3).to(dtype)
    yield "zeros", (n * 0).to(dtype)
    yield "subnormal", (n * 2.0**-127).to(dtype)
    yield "least subnormals", bits_to_weights(torch.randint(0, 1 << 22, shape, generator=g) << 8 & 0x7FFFFF, dtype)
    yield "small", (n * 2.0**-112).to(dtype)
    yield "large", (n * 2.0**124).clamp(-3.3e38, 3.3e38).to(dtype)
    yield "any", bits_to_weights(torch.randint(-(1 << 31), 1 << 31, shape, generator=g), dtype)


def masks(numel, seed=0):
    """(name, mask, keep)."""
    g = generator(seed)
    draw = [torch.rand(numel, generator=g) for _ in range(2)]
    yield "none", torch.zeros((numel + 7) // 8, dtype=torch.uint8), None
    yield "half", pack_bits(draw[0] < 0.5), None
    yield "all", pack_bits(torch.ones(numel, dtype=torch.bool)), None
    yield "keep", torch.zeros((numel + 7) // 8, dtype=torch.uint8), pack_bits(draw[1] < 0.7)
    # Frozen weights are kept ones; and bits after the last weight mean nothing.
    both = pack_bits((draw[0] < 0.3) & (draw[1] < 0.7)), pack_bits(draw[1] < 0.7)
    if numel % 8:
        both[1][-1] |= 0x80
    yield "both", *both


def flags(fmt):
    return fmt.bits, fmt.levels == "dense", fmt.granularity == "channel", fmt.exponent == "mse"


def rules(fmt):
    return [inq.Format(fmt.bits, fmt.levels, g, e) for g in ("tensor", "channel") for e in ("max", "mse")]


@dtypes
def test_exponents(machines, dtype):
    cases = itertools.product(SHAPES, range(10), FORMATS)
    for i, (shape, kind, fmt) in enumerate(cases):
        name, w = kinds(shape, dtype)[kind]
        rule = rules(fmt)[i % 4]
        expected = reference.exponents(w, rule)
        for machine in machines():
            assert torch.equal(leaf.exponents(w, *flags(rule)), expected), (name, shape, rule, machine)


@dtypes
def test_exponents_of_long_rows(machines, dtype):
    # Threads share a row. Several pieces; a sum beyond 2^32 in one bin.
    w = torch.randn(2, 300_000, generator=generator(3)).to(dtype)
    w[1] = 1.999
    for rule in rules(inq.Format(4)):
        expected = reference.exponents(w, rule)
        for machine in machines():
            assert torch.equal(leaf.exponents(w, *flags(rule)), expected), machine


def test_ties_of_the_mse_rule_go_to_the_larger_exponent():
    # At 2 bits n1 = 0 makes the errors 0 and 1/4 (0.5 becomes 1), n1 = −1 makes them 1/4 and 0.
    w = torch.tensor([[1.0, 0.5], [0.5, -1.0]])
    assert leaf.exponents(w, 2, False, True, True).tolist() == [[0], [0]]
    assert leaf.exponents(w, 2, False, False, True).tolist() == [[0], [0]]
    # One weight more decides.
    assert leaf.exponents(torch.tensor([[1.0, 0.5, 0.5]]), 2, False, True, True).tolist() == [[-1]]


def counts(candidates):
    return sorted({0, min(1, candidates), candidates // 3, candidates})


@dtypes
@pytest.mark.parametrize("random", [False, True])
def test_threshold_and_quantization(machines, dtype, random):
    for i, (shape, kind) in enumerate(itertools.product(SHAPES, range(10))):
        name, w = kinds(shape, dtype)[kind]
        for j, (which, mask, keep) in enumerate(masks(w.numel())):
            candidates = ~unpack_bits(mask, (w.numel(),))
            if keep is not None:
                candidates &= unpack_bits(keep, (w.numel(),))
            total = int(candidates.sum())
            count = (0, min(1, total), total // 3, total)[(i + i // 10 + j) % 4]
            seed, fmt = 5 << 40 | i, FORMATS[(i + j) % len(FORMATS)]
            check(machines, w, mask, keep, count, random, seed, rules(fmt)[j % 4], (name, shape, which, count))


def check(machines, w, mask, keep, count, random, seed, fmt, case):
    """The whole of a portion: exponents, threshold, quantization."""
    expected = reference.partition_threshold(w, mask, keep, count, random, seed)
    zeroed = w if keep is None else torch.where(unpack_bits(keep, w.shape), w, 0.0)
    n1 = reference.exponents(zeroed, fmt)
    theirs = w.clone(), mask.clone()
    reference.quantize_with_mask_(*theirs, n1, expected, keep, fmt, random, seed)
    for machine in machines():
        assert torch.equal(leaf.partition_threshold(w, mask, keep, count, random, seed), expected), (case, machine)
        got = leaf.exponents_and_threshold(w, mask, keep, count, random, seed, *flags(fmt))
        assert torch.equal(got[0], n1), (case, machine)
        assert torch.equal(got[1], expected), (case, machine)
        ours = w.clone(), mask.clone()
        leaf.quantize_with_mask_(*ours, n1, expected, keep, *flags(fmt)[:2], random, seed)
        assert same_bits(ours[0], theirs[0]), (case, machine)
        assert torch.equal(ours[1], theirs[1]), (case, machine)


@pytest.mark.parametrize("numel", [2**21 - 1, 2**21 + 37])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("random", [False, True])
def test_large_enough_for_a_sample(machines, numel, pruned, random):
    """One pass decides from 2^21 weights on. The largest weight is frozen, and still decides about the exponent."""
    g = generator(numel)
    w = torch.randn(1, numel, generator=g)
    w[0, 1_000_003] = 1e3
    mask, keep = (torch.rand(numel, generator=g) < p for p in (0.3, 0.9))
    mask[1_000_003] = keep[1_000_003] = True
    fmt = inq.Format(4, granularity="tensor", exponent="max")
    keep_bits = pack_bits(keep) if pruned else None
    check(machines, w, pack_bits(mask), keep_bits, numel // 4, random, 9, fmt, numel)


@dtypes
def test_large_enough_for_threads(machines, dtype):
    # Rows that are no multiple of 64, in more blocks than one thread takes; every kind of mask.
    for kind in (0, 1, 9):
        name, w = kinds((37, 2703), dtype)[kind]
        for which, mask, keep in masks(w.numel()):
            count = 11_000 if which != "all" else 0
            check(machines, w, mask, keep, count, kind == 9, 3, inq.Format(4, granularity="channel"), (name, which))


@dtypes
def test_ties_over_many_chunks_go_to_the_lower_index(machines, dtype):
    # More chunks than threads, all of them full of ties; the boundary in the first, in the middle, at the end.
    numel, g = 200_003, generator(7)
    w = torch.tensor([0.5, -0.5, 0.25])[torch.randint(0, 3, (1, numel), generator=g)].to(dtype)
    mask = pack_bits(torch.rand(numel, generator=g) < 0.1)
    candidates = int((~unpack_bits(mask, (numel,))).sum())
    for count in (1, 30_000, candidates // 2, candidates - 1, candidates):
        check(machines, w, mask, None, count, False, 0, inq.Format(2), (numel, count))


@dtypes
def test_any_exponent_that_int8_holds(machines, dtype):
    w = bits_to_weights(torch.randint(-(1 << 31), 1 << 31, (255, 70), generator=generator(2)), dtype)
    n1 = torch.arange(-126, 128).clamp(-126, 127).to(torch.int8)[torch.arange(255) % 254].view(-1, 1).contiguous()
    everything = leaf.partition_threshold(w, EMPTY.new_zeros((w.numel() + 7) // 8), None, w.numel(), False, 0)
    for fmt in FORMATS:
        expected = reference.quantize(w, n1, fmt)
        for machine in machines():
            ours, mask = w.clone(), EMPTY.new_zeros((w.numel() + 7) // 8)
            leaf.quantize_with_mask_(ours, mask, n1, everything, None, *flags(fmt)[:2], False, 0)
            assert same_bits(ours, expected), (fmt, machine)
            assert bool(unpack_bits(mask, (w.numel(),)).all())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_weights(data):
    isa = data.draw(st.sampled_from(MACHINES))[0]
    dtype = data.draw(st.sampled_from(DTYPES))
    rows, k = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 40))
    some = st.sampled_from([0, 0x80000000, 1, 0x400000, 0x600000, 0x7F7FFFFF, 0x3F400000, 0x3FC00000, 0x3F800000])
    bits = st.lists(some | st.integers(0, (1 << 32) - 1), min_size=rows * k, max_size=rows * k)
    w = bits_to_weights(torch.tensor(data.draw(bits)), dtype).view(rows, k)
    boolean = st.lists(st.booleans(), min_size=rows * k, max_size=rows * k)
    frozen, kept = torch.tensor(data.draw(boolean)), torch.tensor(data.draw(boolean))
    fmt = data.draw(st.sampled_from([r for f in FORMATS for r in rules(f)]))
    mask, keep = pack_bits(frozen & kept), data.draw(st.sampled_from([None, pack_bits(kept)]))
    candidates = ~(frozen & kept) if keep is None else kept & ~frozen
    count = data.draw(st.integers(0, int(candidates.sum())))
    random = data.draw(st.booleans())
    before = leaf.set_isa(isa)
    try:
        zeroed = w if keep is None else torch.where(kept.view(rows, k), w, 0.0)
        n1 = reference.exponents(zeroed, fmt)
        threshold = reference.partition_threshold(w, mask, keep, count, random, 3)
        got = leaf.exponents_and_threshold(w, mask, keep, count, random, 3, *flags(fmt))
        assert torch.equal(got[0], n1)
        assert torch.equal(got[1], threshold)
        ours, theirs = (w.clone(), mask.clone()), (w.clone(), mask.clone())
        reference.quantize_with_mask_(*theirs, n1, threshold, keep, fmt, random, 3)
        leaf.quantize_with_mask_(*ours, n1, threshold, keep, *flags(fmt)[:2], random, 3)
        assert same_bits(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    finally:
        leaf.set_isa(before)


# --- optimizer steps --------------------------------------------------------------------------------------------------


STEP_SIZES = (1, 7, 8, 63, 64, 65, 1000, 70_003)


def step_case(dtype, step):
    """Parameters, gradients and masks: no mask, some of it, all of it."""
    g = generator(step)
    lists = [[torch.randn(n, generator=g).to(dtype) for n in STEP_SIZES for _ in range(3)] for _ in range(2)]
    held = [torch.rand(n, generator=g) < (0, 0.5, 2)[i] for n in STEP_SIZES for i in range(3)]
    return *lists, held


def step(module, optimizer, options, number, p, grads, state, bits):
    maximize = options.get("maximize", False)
    if optimizer == "adamw":
        betas = options.get("betas", (0.9, 0.999))
        numbers = (0.1, *betas, options.get("weight_decay", 0.01), options.get("eps", 1e-8), number)
        module.masked_adamw_(p, grads, *state, bits, *numbers, maximize)
    else:
        numbers = [0.1, *(options.get(name, 0.0) for name in ("momentum", "dampening", "weight_decay"))]
        nesterov = options.get("nesterov", False)
        module.masked_sgd_(p, grads, *(state or [[]]), bits, *numbers, nesterov, maximize, number == 1)


def three_steps(dtype, optimizer, options, compare):
    """All values before and after, and what was held; ``compare(ours, the reference's)`` each step, if not None."""
    params, _, held = step_case(dtype, 0)
    bits = [EMPTY if not h.any() else pack_bits(h) for h in held]
    count = 2 if optimizer == "adamw" else int("momentum" in options)
    # Not zeros: a frozen weight's state is kept, whatever it is, in a first step too.
    before = (params, *([torch.rand(p.shape, generator=generator(8)) for p in params] for _ in range(count)))
    ours = [[t.clone() for t in group] for group in before]
    for number in range(1, 4):
        grads = step_case(dtype, number)[1]
        for g, h in zip(grads, held, strict=True):
            # What is frozen must not care.
            g[h] = (float("nan"), float("inf"), 1e38)[number - 1]
        theirs = [[t.clone() for t in group] for group in ours]
        step(leaf, optimizer, options, number, ours[0], grads, ours[1:], bits)
        if compare is not None:
            step(reference, optimizer, options, number, theirs[0], grads, theirs[1:], bits)
            for x, y in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
                compare(x, y)
    return before, ours, held


def same_but_for_rounding(x, y):
    # A few units of float32; one of bfloat16 where float32's meet a tie.
    units = 1 if x.dtype == torch.bfloat16 else 8
    assert torch.allclose(x.float(), y.float(), rtol=units * torch.finfo(x.dtype).eps, atol=1e-6)


@dtypes
@pytest.mark.parametrize(("optimizer", "options"), [("sgd", o) for o in SGD] + [("adamw", o) for o in ADAMW])
def test_masked_steps(machines, dtype, optimizer, options):
    first = None
    for machine in machines():
        before, ours, held = three_steps(dtype, optimizer, options, None if first else same_but_for_rounding)
        # The same bits on every instruction set and for any number of threads.
        first = first or ours
        for group in zip(before, ours, first, strict=True):
            for old, x, same, h in zip(*group, held, strict=True):
                assert same_bits(x, same), machine
                assert same_bits(x[h], old[h]), machine
                assert bool(h.all()) or not torch.equal(x[~h], old[~h])


def test_bfloat16_is_rounded_to_nearest_even_and_nan_stays_nan(machines):
    # One step of SGD with lr −1 adds the gradient: all sums of two bfloat16 numbers, subnormal ones too.
    g = generator(4)
    bits = torch.randint(-(1 << 31), 1 << 31, (2, 70_000), generator=g)
    p, d = (bits_to_weights(b, torch.bfloat16) for b in bits)
    d = torch.where(torch.rand(d.shape, generator=g) < 0.5, p * 2**-8, d)
    d[:10] = float("nan")
    p[10:20] = float("inf")
    expected = (p.float() + d.float()).to(torch.bfloat16)
    for machine in machines():
        q = p.clone()
        leaf.masked_sgd_([q], [d], [], [EMPTY], -1.0, 0.0, 0.0, 0.0, False, False, False)
        assert torch.equal(q.isnan(), expected.isnan()), machine
        assert same_bits(q[~q.isnan()], expected[~q.isnan()]), machine


# --- errors -----------------------------------------------------------------------------------------------------------


def test_errors():
    w, mask = torch.ones(4, 5), torch.zeros(3, dtype=torch.uint8)
    n1, none = torch.zeros(4, 1, dtype=torch.int8), torch.tensor([0, 0])
    threshold, quantize = leaf.partition_threshold, leaf.quantize_with_mask_
    wrong = torch.zeros(2, dtype=torch.uint8)
    tail = (None, 2, False, False, 0)
    for call, message in (
        (lambda: threshold(w, mask, None, 21, False, 0), "count: expected 0 to 20 unfrozen weights, got 21"),
        (lambda: threshold(w, mask, None, -1, False, 0), "count: expected 0 to 20 unfrozen weights, got -1"),
        (lambda: threshold(w, wrong, None, 1, False, 0), r"mask: expected shape \[3\].*got \[2\]"),
        (lambda: threshold(w, mask, wrong, 1, False, 0), r"keep: expected shape \[3\].*got \[2\]"),
        (lambda: threshold(w, mask.int(), None, 1, False, 0), "mask: expected uint8, got int32"),
        (lambda: threshold(w.double(), mask, None, 1, False, 0), "w: expected float32 or bfloat16, got float64"),
        (lambda: threshold(w.T, mask, None, 1, False, 0), "w: expected a contiguous tensor"),
        (
            lambda: leaf.exponents(w.half(), 5, False, False, True),
            "exponents: w: expected float32 or bfloat16, got float16",
        ),
        (lambda: leaf.exponents(w[:0], 5, False, False, True), "exponents: w: expected rank ≥ 1 and at least one"),
        (lambda: leaf.exponents(w, 6, False, False, True), "exponents: bits: expected 2 to 5, got 6"),
        (lambda: quantize(w, mask, n1[:3], none, *tail), r"n1: expected shape \[4, 1\], got \[3, 1\]"),
        (lambda: quantize(w, mask, n1.int(), none, *tail), "n1: expected int8, got int32"),
        (lambda: quantize(w, mask, n1, none[:1], *tail), r"threshold: expected shape \[2\], got \[1\]"),
        (lambda: quantize(w, mask, n1, -1 - none, *tail), "threshold: expected a key ≥ 0, got -1"),
        (lambda: leaf.masked_sgd_([w], [], [], [EMPTY], 1, 0, 0, 0, False, False, False), "grads: expected 1 tensors"),
        (
            lambda: leaf.masked_sgd_([w], [w], [], [EMPTY], 1, 0.9, 0, 0, False, False, False),
            "momentum_buffers: expected 1 tensors, got 0",
        ),
        (
            lambda: leaf.masked_sgd_([w], [w.bfloat16()], [], [EMPTY], 1, 0, 0, 0, False, False, False),
            r"grads\[0\]: expected float32, got bfloat16",
        ),
        (
            lambda: leaf.masked_sgd_([w], [w], [], [wrong], 1, 0, 0, 0, False, False, False),
            r"masks\[0\]: expected shape \[3\]",
        ),
        (
            lambda: leaf.masked_adamw_([w], [w], [w], [w[:2]], [EMPTY], 1, 0.9, 0.9, 0, 0, 1, False),
            r"exp_avg_sqs\[0\]: expected shape \[4, 5\] of its parameter, got \[2, 5\]",
        ),
        (
            lambda: leaf.masked_adamw_([w], [w], [w], [w], [EMPTY], 1, 0.9, 0.9, 0, 0, 0, False),
            "step: expected at least 1, got 0",
        ),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            call()
