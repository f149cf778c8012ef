"""The Triton training kernels give the reference's bits, for one tensor and for many, and write nothing else."""

import inspect
import itertools
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import FORMATS, WHICH, bits_to_weights, candidates, generator, same_bits
from support_triton import DEVICE, kinds, random_masks
from test_masked_steps import ADAMW, SGD

import inq_kernels as inq
from inq_kernels import library, reference
from inq_kernels.reference import pack_bits, unpack_bits

pytest.importorskip("triton")
from inq_kernels.triton_ops import exponents, masked_steps, partition, portion, quantize, tables
from support_triton import guarded, no_waiting, times, traffic

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Ragged in bytes of a mask and tiles of 1024. The interpreter takes 20 ms or more for each program of a kernel: few.
SIZES = (1, 7, 31, 32, 33, 100, 257, 1000, 1024, 3003)
EMPTY = torch.empty(0, dtype=torch.uint8, device=DEVICE)
POISON = 0xA5

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# numpy says it to the interpreter, which turns arrays of one element into numbers.
pytestmark = [
    pytest.mark.usefixtures("quick_interpreter"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    # And what becomes NaN or infinite in it, as it shall.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning"),
]


class Guard:
    """Copies of tensors in buffers of poison, at multiples of 16 bytes or one element after; who writes beside them
    is found."""

    def __init__(self, aligned=True):
        self.aligned, self.buffers = aligned, []

    def __call__(self, t):
        size, item = t.numel() * t.element_size(), t.element_size()
        begin = 64 if self.aligned else 64 + item
        buffer = torch.full((begin + size + 64,), POISON, dtype=torch.uint8, device=DEVICE)
        # Rounded up: the allocator of a CPU promises no more than 16 bytes either.
        assert buffer.data_ptr() % 16 == 0
        inside = buffer[begin : begin + size].view(t.dtype).view(t.shape)
        inside.copy_(t)
        self.buffers.append((buffer, begin, begin + size))
        return inside

    def check(self):
        for buffer, begin, end in self.buffers:
            assert bool((buffer[:begin] == POISON).all()), "something before a tensor was written"
            assert bool((buffer[end:] == POISON).all()), "something after a tensor was written"


def rules(fmt):
    return [inq.Format(fmt.bits, fmt.levels, g, e) for g in ("tensor", "channel") for e in ("max", "mse")]


def flags(fmt):
    return fmt.bits, fmt.levels, fmt.granularity, fmt.exponent


def cases(dtype):
    """(w, mask, keep, count): every size, every kind of weights, masks of every kind, counts from none to all."""
    out = []
    for i, size in enumerate(SIZES):
        name = list(kinds((1,), dtype))[(i * 7 + DTYPES.index(dtype)) % 10]
        w = kinds((size, 1) if i % 3 else (size,), dtype, seed=i)[name]
        mask, keep = random_masks(size, WHICH[(i + i // 5) % 5], seed=i)
        total = candidates(mask, keep, size)
        out.append((w, mask, keep, (0, min(1, total), total // 3, total)[i % 4]))
    return out


# --- exponents --------------------------------------------------------------------------------------------------------


@dtypes
def test_exponents_of_tensors(dtype):
    guard = Guard()
    ws = [guard(w) for w in kinds((3, 111), dtype).values()]
    keys = partition.Keys(ws, [None] * len(ws), [None] * len(ws))
    histograms = keys.histograms(0, keys.start([0] * len(ws)))
    assert histograms[:, 0, 0].sum(dim=1).tolist() == [333] * len(ws)
    formats = FORMATS[DTYPES.index(dtype) :: 3]
    for i, fmt in enumerate(formats):
        for rule in rules(fmt)[: 2 if i else 1] if len(formats) == 3 else rules(fmt)[:2]:
            for w, n1, name in zip(ws, keys.exponents(histograms, rule), kinds((1,), dtype), strict=True):
                assert torch.equal(n1, reference.exponents(w, rule)), (name, rule)
    guard.check()


@dtypes
def test_exponents_of_rows(dtype):
    # One row of each kind; a tensor with another length beside them.
    ws = [torch.stack(list(kinds((45,), dtype, seed=1).values())), kinds((1, 7), dtype)["normal"]]
    for rule in (inq.Format(5, "dense", "channel"), inq.Format(3, "paper", "channel", "max")):
        for w, n1 in zip(ws, partition.exponents_of(ws, rule), strict=True):
            assert torch.equal(n1, reference.exponents(w, rule)), rule


def test_exponents_of_long_rows(monkeypatch):
    # Several segments a row, which begins anywhere; another tensor beside it.
    monkeypatch.setattr(exponents, "_SEGMENT", 2048)
    g = generator(3)
    ws = [torch.randn(2, 2501, generator=g).to(DEVICE), torch.randn(3, 2, 2, generator=g).to(DEVICE)]
    # It saturates at the largest weight's candidate or not: all segments must have been seen.
    ws[0][1, 2400] = 100
    fmt = inq.Format(4, granularity="channel")
    for w, n1 in zip(ws, partition.exponents_of(ws, fmt), strict=True):
        assert torch.equal(n1, reference.exponents(w, fmt))


def test_ties_of_the_mse_rule_go_to_the_larger_exponent():
    # At 2 bits n1 = 0 makes the errors 0 and 1/4 (0.5 becomes 1), n1 = −1 makes them 1/4 and 0.
    w = torch.tensor([[1.0, 0.5], [0.5, -1.0]], device=DEVICE)
    assert partition.exponents(w, 2, "paper", "channel", "mse").tolist() == [[0], [0]]
    assert partition.exponents(w, 2, "paper", "tensor", "mse").tolist() == [[0], [0]]
    w = torch.tensor([[1.0, 0.5, 0.5]], device=DEVICE)
    assert partition.exponents(w, 2, "paper", "tensor", "mse").tolist() == [[-1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_subnormal_weights_count_with_their_value(dtype):
    # At 2 bits n1 = −126 costs the first weight 2^-252, and each 0.75·2^-126 gains half of that: two are a tie.
    w = torch.tensor([[2.0**-125] + [-0.75 * 2.0**-126] * 5], device=DEVICE).to(dtype)
    for granularity in ("tensor", "channel"):
        assert partition.exponents(w, 2, "paper", granularity, "mse").tolist() == [[-126]], granularity
        assert partition.exponents(w[:, :3], 2, "paper", granularity, "mse").tolist() == [[-125]], granularity


# --- thresholds -------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("random", [False, True])
def test_thresholds_of_many_tensors(dtype, random):
    guard = Guard()
    some = cases(dtype) if dtype == torch.float32 or not random else cases(dtype)[3:9:2]
    ws, masks, keeps, counts = zip(*some, strict=True)
    guarded = [guard(w) for w in ws], [guard(m) for m in masks], [None if k is None else guard(k) for k in keeps]
    seeds = [i << 40 | i for i in range(len(ws))]
    got = partition.partition_thresholds(*guarded, counts, random, seeds)
    for i, (w, mask, keep, count) in enumerate(some):
        expected = reference.partition_threshold(w, mask, keep, count, random, seeds[i])
        assert torch.equal(got[i], expected), (i, w.shape, count)
    guard.check()


@dtypes
@pytest.mark.parametrize("random", [False, True])
def test_exponents_and_thresholds(dtype, random):
    # n1 of all weights, frozen ones too; keys of the candidates alone.
    some = cases(dtype)[3:8:2] if random else cases(dtype)[1:8:2]
    some = [(w if k is None else w * unpack_bits(k, w.shape), m, k, count) for w, m, k, count in some]
    ws, masks, keeps, counts = (list(x) for x in zip(*some, strict=True))
    fmt = inq.Format(4)
    n1, thresholds = partition.exponents_and_thresholds(ws, masks, keeps, counts, fmt, random, [3] * len(ws))
    for i, arguments in enumerate(some):
        assert torch.equal(n1[i], reference.exponents(ws[i], fmt)), i
        assert torch.equal(thresholds[i], reference.partition_threshold(*arguments, random, 3)), i


def test_operators_are_lists_of_one():
    w, (mask, keep) = kinds((3, 35), torch.float32)["few values"], random_masks(105, "both")
    zeroed = w * unpack_bits(keep, w.shape)
    for fmt in rules(inq.Format(3)):
        expected = reference.exponents_and_threshold(zeroed, mask, keep, 20, False, 0, fmt)
        # What is pruned counts as 0 even where it is not yet.
        got = partition.exponents_and_threshold(w, mask, keep, 20, False, 0, *flags(fmt))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), fmt
        assert torch.equal(partition.exponents(zeroed, *flags(fmt)), expected[0])
    assert torch.equal(partition.partition_threshold(w, mask, keep, 20, False, 0), expected[1])
    # Flat indices are those of the shape, whatever the strides.
    other = w.T.contiguous().T
    assert not other.is_contiguous()
    assert torch.equal(partition.partition_threshold(other, mask, keep, 20, False, 0), expected[1])


def test_impossible_counts_select_all_or_nothing():
    w, mask = torch.tensor([1.0, -3.0, 2.0], device=DEVICE), torch.tensor([1], dtype=torch.uint8, device=DEVICE)
    everything = reference.partition_threshold(w, mask, None, 2)
    nothing = reference.partition_threshold(w, mask, None, 0)
    full = torch.full_like(mask, 7)
    got = partition.partition_thresholds([w] * 3, [mask, mask, full], [None] * 3, [5, -2, 1])
    assert torch.equal(got, torch.stack([everything, nothing, nothing]))


@pytest.mark.parametrize("random", [False, True])
def test_histograms_of_ranks_add_up(random):
    if random:
        # Ranks of a random partition need the flat index in the whole: both hold all, each counts half of it.
        w = torch.zeros(2000, device=DEVICE)
        ours = pack_bits(torch.arange(2000, device=DEVICE) < 700)
        parts = [partition.Keys([w], [m], [None], True, [9]) for m in (ours, ~ours)]
    else:
        w = torch.randn(2000, generator=generator(5)).to(DEVICE)
        parts = [partition.Keys([part], [None], [None]) for part in (w[:700], w[700:])]
    none = torch.zeros(250, dtype=torch.uint8, device=DEVICE)
    selection = parts[0].start([777])
    for digit in range(len(parts[0].digits)):
        total = sum(keys.histograms(digit, selection) for keys in parts)
        selection = parts[1].select(digit, selection, total)
    assert torch.equal(selection[0], reference.partition_threshold(w, none, None, 777, random, 9))


@dtypes
def test_several_chunks_and_copies_full_of_ties(monkeypatch, dtype):
    # Eleven chunks and six copies of the counters, more than are added at once; the boundary anywhere.
    for module in (tables, partition, quantize):
        monkeypatch.setattr(module, "CHUNK", 2 * tables.TILE)
    monkeypatch.setattr(partition, "COPY_CHUNKS", 2)
    monkeypatch.setattr(partition, "_SUM_COPIES", 4)
    for module in (partition, quantize):
        monkeypatch.setattr(module, "_SCAN", 4)
    numel = 10 * tables.CHUNK + 1003
    w = torch.tensor([0.5, -0.5, 0.25])[torch.randint(0, 3, (1, numel), generator=generator(7))].to(dtype).to(DEVICE)
    mask, _ = random_masks(numel, "half")
    total, n1, fmt = candidates(mask, None, numel), torch.zeros(1, 1, dtype=torch.int8, device=DEVICE), inq.Format(4)
    for count in {torch.float32: (total // 2,), torch.bfloat16: (1,), torch.float16: (total - 1,)}[dtype]:
        expected = reference.partition_threshold(w, mask, None, count)
        assert torch.equal(partition.partition_threshold(w, mask, None, count, False, 0), expected)
        theirs, ours = (w.clone(), mask.clone()), (w.clone(), mask.clone())
        reference.quantize_with_mask_(*theirs, n1, expected, None, fmt)
        frozen = quantize.freeze_([ours[0]], [ours[1]], [n1], expected[None], [None], fmt)
        assert same_bits(ours[0], theirs[0]), count
        assert torch.equal(ours[1], theirs[1]), count
        assert frozen.tolist() == [numel - total + count]
        # The same with the ties before each chunk known.
        ours = w.clone(), mask.clone()
        arguments = [ours[0]], [ours[1]], [n1], [None], [count], False, fmt
        assert portion.freeze_portions_(*arguments).tolist() == [numel - total + count]
        assert same_bits(ours[0], theirs[0]), count
        assert torch.equal(ours[1], theirs[1]), count


# --- quantization -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("random", [False, True])
@dtypes
def test_freezing_many_tensors(dtype, random, aligned):
    guard = Guard(aligned)
    fmt = FORMATS[DTYPES.index(dtype) * 2 + random]
    some = cases(dtype)[aligned::2] if not random else cases(dtype)[aligned::4]
    n1 = [reference.exponents(w, inq.Format(fmt.bits, granularity="channel")) for w, *_ in some]
    theirs = [(w.clone(), mask.clone()) for w, mask, *_ in some]
    ours = [(guard(w), guard(mask)) for w, mask, *_ in some]
    keeps = [keep for *_, keep, _ in some]
    thresholds = torch.stack([reference.partition_threshold(*case, random, i) for i, case in enumerate(some)])
    for i, (w, mask) in enumerate(theirs):
        reference.quantize_with_mask_(w, mask, n1[i], thresholds[i], keeps[i], fmt, random, i)
    ws, masks = ([pair[i] for pair in ours] for i in (0, 1))
    frozen = quantize.freeze_(ws, masks, n1, thresholds, keeps, fmt, random, range(len(some)))
    for i, ((w, mask), (x, bits)) in enumerate(zip(theirs, ours, strict=True)):
        assert same_bits(x, w), i
        assert torch.equal(bits, mask), i
        assert int(frozen[i]) == int(unpack_bits(mask, (w.numel(),)).sum()), i
    guard.check()


@dtypes
def test_any_exponent_of_rows(dtype):
    # Rows shorter and longer than a tile, and every n1 that the dtype allows.
    lo, hi = reference.exponent_limits(dtype)
    g = generator(2)
    shapes = [(hi - lo + 1, 21), (3, 2500)]
    ws = [bits_to_weights(torch.randint(-(1 << 31), 1 << 31, s, generator=g), dtype).to(DEVICE) for s in shapes]
    n1 = [torch.arange(lo, hi + 1), torch.tensor([-3, 0, 5])]
    n1 = [n.to(torch.int8).view(-1, 1).to(DEVICE) for n in n1]
    everything = torch.tensor([[-1, 0]] * 2, device=DEVICE)
    for fmt in FORMATS[DTYPES.index(dtype) :: 3]:
        ours = [w.clone() for w in ws]
        masks = [torch.zeros((w.numel() + 7) // 8, dtype=torch.uint8, device=DEVICE) for w in ws]
        frozen = quantize.freeze_(ours, masks, n1, everything, [None] * 2, fmt)
        assert frozen.tolist() == [w.numel() for w in ws]
        for x, w, n in zip(ours, ws, n1, strict=True):
            assert same_bits(x, reference.quantize(w, n, fmt)), fmt


def test_ties_go_to_the_lower_flat_index():
    w = torch.tensor([[0.5, -1.0, 1.0], [1.0, -1.0, 0.5]], device=DEVICE)
    mask, n1 = torch.zeros(1, dtype=torch.uint8, device=DEVICE), torch.zeros(2, 1, dtype=torch.int8, device=DEVICE)
    for expected in (0b000010, 0b000110, 0b001110, 0b011110, 0b011111):
        threshold = partition.partition_threshold(w, mask, None, 1, False, 0)
        quantize.quantize_with_mask_(w, mask, n1, threshold, None, 3, "paper", False, 0)
        assert mask.tolist() == [expected]


def test_freezing_a_transposed_weight():
    w, n1 = torch.randn(12, 9, generator=generator(1)).to(DEVICE), torch.zeros(12, 1, dtype=torch.int8, device=DEVICE)
    mask = torch.zeros(14, dtype=torch.uint8, device=DEVICE)
    threshold = reference.partition_threshold(w, mask, None, 50)
    theirs, ours = (w.clone(), mask.clone()), (w.T.contiguous().T, mask.clone())
    reference.quantize_with_mask_(*theirs, n1, threshold, None, inq.Format(4))
    quantize.quantize_with_mask_(*ours, n1, threshold, None, 4, "paper", False, 0)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.data())
def test_any_weights(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    rows, k = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    some = st.sampled_from([0, 0x80000000, 1, 0x400000, 0x600000, 0x7F7FFFFF, 0x3F400000, 0x3FC00000, 0x3F800000])
    some |= st.sampled_from([0x8000, 0x3F80, 0x3C00, 0x3E00, 0x0400, 0x7BFF]) | st.integers(0, (1 << 32) - 1)
    bits = data.draw(st.lists(some, min_size=rows * k, max_size=rows * k))
    w = bits_to_weights(torch.tensor(bits), dtype).view(rows, k).to(DEVICE)
    boolean = st.lists(st.booleans(), min_size=rows * k, max_size=rows * k)
    held, kept = (torch.tensor(data.draw(boolean), device=DEVICE) for _ in range(2))
    mask, keep = pack_bits(held & kept), data.draw(st.sampled_from([None, pack_bits(kept)]))
    if keep is not None:
        w = w * kept.view(rows, k)
    count = data.draw(st.integers(0, candidates(mask, keep, w.numel())))
    fmt = data.draw(st.sampled_from([r for f in FORMATS for r in rules(f)]))
    random, seed = data.draw(st.booleans()), data.draw(st.integers(-(1 << 63), (1 << 63) - 1))
    n1, threshold = reference.exponents_and_threshold(w, mask, keep, count, random, seed, fmt)
    got = partition.exponents_and_threshold(w, mask, keep, count, random, seed, *flags(fmt))
    assert torch.equal(got[0], n1)
    assert torch.equal(got[1], threshold)
    ours, theirs = (w.clone(), mask.clone()), (w.clone(), mask.clone())
    reference.quantize_with_mask_(*theirs, n1, threshold, keep, fmt, random, seed)
    quantize.quantize_with_mask_(*ours, n1, threshold, keep, *flags(fmt)[:2], random, seed)
    assert same_bits(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


# --- optimizer steps --------------------------------------------------------------------------------------------------

STEP_SIZES = (7, 65, 8, 1024, 1030, 1)


def step_case(dtype, seed):
    """Parameters, gradients and what is held: nothing, some of it, all of it."""
    g = generator(seed)
    lists = [[torch.randn(n, generator=g).to(dtype).to(DEVICE) for n in STEP_SIZES] for _ in range(2)]
    held = [(torch.rand(n, generator=g) < (0, 0.5, 2)[i % 3]).to(DEVICE) for i, n in enumerate(STEP_SIZES)]
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


def assert_same_but_for_rounding(x, y):
    # A few units of float32; one of 16 bits where float32's meet a tie.
    units = 8 if x.dtype == torch.float32 else 1
    assert torch.allclose(x.float(), y.float(), rtol=units * torch.finfo(x.dtype).eps, atol=1e-6)


# lerp's other end.
OPTIMIZERS = [("sgd", o) for o in SGD] + [("adamw", o) for o in [*ADAMW, {"betas": (0.2, 0.3)}]]


@pytest.mark.parametrize(
    ("dtype", "optimizer", "options"),
    # Every option in float32, every third in each of the others.
    [(dtype, *o) for i, dtype in enumerate(DTYPES) for o in OPTIMIZERS[min(i, 1) * (3 - i) :: 3 if i else 1]],
)
def test_masked_steps(dtype, optimizer, options):
    aligned = "maximize" not in options
    guard = Guard(aligned)
    params, _, held = step_case(dtype, 0)
    bits = [pack_bits(h) if h.any() else EMPTY for h in held]
    count = 2 if optimizer == "adamw" else int("momentum" in options)
    # Not zeros: a frozen weight's state is kept, whatever it is, in a first step too.
    before = [params, *([torch.rand(p.shape, generator=generator(8)).to(DEVICE) for p in params] for _ in range(count))]
    for group in before:
        group[1][1] = -0.0
    ours = [[guard(t) for t in group] for group in before]
    for number in (1, 2):
        grads = [guard(g) for g in step_case(dtype, number)[1]]
        for g, h in zip(grads, held, strict=True):
            # What is frozen must not care.
            g[h] = (float("nan"), float("inf"))[number - 1]
        theirs = [[t.clone() for t in group] for group in ours]
        step(masked_steps, optimizer, options, number, ours[0], grads, ours[1:], bits)
        step(reference, optimizer, options, number, theirs[0], grads, theirs[1:], bits)
        for x, y in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
            assert_same_but_for_rounding(x, y)
    for old, new in zip(before, ours, strict=True):
        for a, b, h in zip(old, new, held, strict=True):
            assert same_bits(b[h], a[h])
            assert bool(h.all()) or not torch.equal(b[~h], a[~h])
    guard.check()


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's loads and stores are counted")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@dtypes
def test_steps_read_and_write_every_byte_once(dtype, optimizer):
    params, grads, held = step_case(dtype, 0)
    state = [[torch.rand(p.shape, generator=generator(8)) for p in params] for _ in range(1 + (optimizer == "adamw"))]
    bits = [pack_bits(h) if h.any() else EMPTY for h in held]
    with traffic() as (loads, stores):
        step(masked_steps, optimizer, {"momentum": 0.9}, 2, params, grads, state, bits)
    for t in (*params, *itertools.chain(*state)):
        assert np.unique(times(loads, t)).tolist() == np.unique(times(stores, t)).tolist() == [1]
    for t in (*grads, *(b for b in bits if b.numel())):
        assert np.unique(times(loads, t)).tolist() == [1]
        assert not times(stores, t).any()
    written = sum(len(each) for each in stores)
    assert written == sum(t.numel() * t.element_size() for t in (*params, *itertools.chain(*state)))


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's stores are counted")
@dtypes
def test_exponents_and_thresholds_write_every_output_once(dtype, monkeypatch):
    for fmt in rules(inq.Format(4))[DTYPES.index(dtype) % 2 :: 2]:
        # Each of these weights is a row, and takes the interpreter a third of a second for an exponent of its own.
        some = cases(dtype)[1:4:2] if fmt.granularity == "channel" else cases(dtype)[2::5]
        ws, masks, keeps, counts = (list(x) for x in zip(*some, strict=True))
        with guarded(monkeypatch):
            partition.exponents_and_thresholds(ws, masks, keeps, counts, fmt)
            partition.exponents_of(ws, fmt, keeps)


def test_a_mask_changes_no_bit_of_what_moves():
    params, grads, held = step_case(torch.float32, 3)
    free, state, same = ([t.clone() for t in params] for _ in range(3))
    for t in state:
        t.zero_()
    both = [[s.clone() for s in state] for _ in range(4)]
    masked_steps.masked_adamw_(
        params, grads, *both[:2], [pack_bits(h) for h in held], 0.1, 0.9, 0.99, 0.1, 1e-8, 1, False
    )
    masked_steps.masked_adamw_(free, grads, *both[2:], [EMPTY] * len(free), 0.1, 0.9, 0.99, 0.1, 1e-8, 1, False)
    for p, q, old, h in zip(params, free, same, held, strict=True):
        assert same_bits(p[~h], q[~h])
        assert same_bits(p[h], old[h])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_rounded_to_nearest_even_and_nan_stays_nan(dtype):
    # One step of SGD with lr −1 adds the gradient: all sums of two numbers, subnormal ones too.
    g = generator(4)
    bits = torch.randint(-(1 << 31), 1 << 31, (2, 5000), generator=g)
    p, d = (bits_to_weights(b, dtype) for b in bits)
    d = torch.where(torch.rand(d.shape, generator=g) < 0.5, p * 2**-8, d)
    d[:10] = float("nan")
    p[10:20] = float("inf")
    expected = (p.float() + d.float()).to(dtype).to(DEVICE)
    q = p.to(DEVICE)
    masked_steps.masked_sgd_([q], [d.to(DEVICE)], [], [EMPTY], -1.0, 0.0, 0.0, 0.0, False, False, False)
    assert torch.equal(q.isnan(), expected.isnan())
    assert same_bits(q[~q.isnan()], expected[~q.isnan()])


def test_steps_of_transposed_tensors():
    g = generator(6)
    p, grad, buffer = (torch.randn(9, 12, generator=g).to(DEVICE) for _ in range(3))
    mask = pack_bits(torch.rand(9, 12, generator=g).to(DEVICE) < 0.5)
    ours = [t.T.contiguous().T for t in (p, grad, buffer)]
    numbers = (0.1, 0.9, 0.0, 0.1, False, False, False)
    reference.masked_sgd_([p], [grad], [buffer], [mask], *numbers)
    masked_steps.masked_sgd_([ours[0]], [ours[1]], [ours[2]], [mask], *numbers)
    assert_same_but_for_rounding(ours[0], p)
    assert_same_but_for_rounding(ours[2], buffer)


def test_one_launch_for_all_parameters(monkeypatch):
    launches = []
    kernel = masked_steps.adamw_step

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(masked_steps, "adamw_step", Counted())
    params, grads, _ = step_case(torch.float32, 0)
    state = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    before = [p.clone() for p in params]
    masked_steps.masked_adamw_(params, grads, *state, [EMPTY] * len(params), 0.1, 0.9, 0.999, 0.0, 1e-8, 1, False)
    assert len(launches) == 1
    assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))


# --- the rest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [partition, quantize, portion, masked_steps])
def test_names_and_arguments_are_those_of_the_operators(module):
    names = {
        partition: ("exponents", "partition_threshold", "exponents_and_threshold"),
        quantize: ("quantize_with_mask_",),
        portion: ("freeze_portion_",),
        masked_steps: ("masked_sgd_", "masked_adamw_"),
    }[module]
    for name in names:
        schema = getattr(torch.ops.inq, name).default._schema
        assert list(inspect.signature(getattr(module, name)).parameters) == [a.name for a in schema.arguments]
        assert name in library.SCHEMAS


@pytest.mark.parametrize("module", [partition, quantize, masked_steps])
def test_configurations_give_every_argument_of_their_kernel(module):
    seen = {}
    for name, kernel, signature, constants, warps, stages, _ in module.configurations():
        assert signature.keys() == set(kernel.arg_names), name
        assert constants.keys() == {k for k, v in signature.items() if v == "constexpr"}, name
        assert warps >= 1 <= stages
        assert name not in seen, name
        seen[name] = kernel
    assert len(seen) > 10


def test_nothing_to_do():
    assert partition.exponents_of([], inq.Format(4)) == []
    assert partition.partition_thresholds([], [], [], []).shape == (0, 2)
    masked_steps.masked_sgd_([], [], [], [], 0.1, 0.9, 0.0, 0.0, False, False, False)
    none = torch.empty(0, 3, device=DEVICE)
    thresholds = partition.partition_thresholds([none], [EMPTY], [None], [0])
    assert thresholds.tolist() == [[torch.iinfo(torch.int64).max, 0]]
    n1 = torch.empty(0, 1, dtype=torch.int8, device=DEVICE)
    assert quantize.freeze_([none], [EMPTY], [n1], thresholds, [None], inq.Format(4)).tolist() == [0]


def test_tables_are_made_in_several_threads():
    """As optimizers of several models step: the cache is whole, and each gets its own table."""
    wrong = []

    def make(number):
        try:
            for i in range(300):
                rows = [[number, i % 70, j] for j in range(3)]
                table, owners = tables.build(rows, [1, 2, 1], torch.device(DEVICE))
                if table.view(3, 4)[:, 1:].tolist() != rows or owners.tolist() != [0, 1, 1, 2]:
                    wrong.append((number, i))
        except Exception as error:
            wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=make, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no device to wait for")
def test_nothing_waits_for_the_device():
    ws, masks, keeps, counts = zip(*cases(torch.float32), strict=True)
    fmt = inq.Format(4)
    with no_waiting():
        n1, thresholds = partition.exponents_and_thresholds(ws, masks, keeps, counts, fmt)
        quantize.freeze_(ws, masks, n1, thresholds, keeps, fmt)


def test_errors():
    w, mask = torch.ones(4, 5, device=DEVICE), torch.zeros(3, dtype=torch.uint8, device=DEVICE)
    n1, none = torch.zeros(4, 1, dtype=torch.int8, device=DEVICE), torch.tensor([0, 0], device=DEVICE)
    wrong = mask[:2]
    threshold, freeze, sgd = (
        partition.partition_threshold,
        quantize.quantize_with_mask_,
        masked_steps.masked_sgd_,
    )
    tail = (None, 2, "paper", False, 0)
    numbers = (1.0, 0.0, 0.0, 0.0, False, False, False)
    for error, call, message in (
        (ValueError, lambda: threshold(w, wrong, None, 1, False, 0), r"mask: expected shape \[3\].*got \[2\]"),
        (ValueError, lambda: threshold(w, mask, wrong, 1, False, 0), r"keep: expected shape \[3\].*got \[2\]"),
        (TypeError, lambda: threshold(w, mask.int(), None, 1, False, 0), "mask: expected uint8, got torch.int32"),
        (TypeError, lambda: threshold(w.double(), mask, None, 1, False, 0), "w: expected float32.*float64"),
        (ValueError, lambda: freeze(w, mask, n1[:3], none, *tail), r"n1 .*expected shape \[4, 1\], got \[3, 1\]"),
        (TypeError, lambda: freeze(w, mask, n1.int(), none, *tail), "n1 .*expected int8, got torch.int32"),
        (TypeError, lambda: freeze(w, mask, n1, none.int(), *tail), "thresholds: expected int64"),
        (ValueError, lambda: threshold(w[0, 0], mask[:1], None, 1, False, 0), "w: expected rank ≥ 1, got a scalar"),
        (
            ValueError,
            lambda: partition.exponents_of([torch.empty(2**31, device="meta")], inq.Format(4)),
            "rows of w: expected at most 2147479552, got 2147483648",
        ),
        (
            TypeError,
            lambda: partition.exponents_of([w, w.half()], inq.Format(4)),
            r"w\[1\]: expected torch.float32 as the first one, got torch.float16",
        ),
        (
            ValueError,
            lambda: partition.partition_thresholds([w], [mask], [None], [1, 2]),
            "counts: expected 1, got 2",
        ),
        (ValueError, lambda: sgd([w], [], [], [EMPTY], *numbers), "grads: expected 1 tensors, got 0"),
        (TypeError, lambda: sgd([w], [w.half()], [], [EMPTY], *numbers), r"grads\[0\]: expected torch.float32"),
        (ValueError, lambda: sgd([w], [w], [], [wrong], *numbers), r"masks\[0\]: expected shape \[3\]"),
        (
            ValueError,
            lambda: masked_steps.masked_adamw_([w], [w], [w], [w[:2]], [EMPTY], 1, 0.9, 0.9, 0, 0, 1, False),
            r"exp_avg_sqs\[0\]: expected shape \[4, 5\] of its parameter, got \[2, 5\]",
        ),
        (
            ValueError,
            lambda: masked_steps.masked_adamw_([w], [w], [w], [w], [EMPTY], 1, 0.9, 0.9, 0, 0, 0, False),
            "step: expected at least 1, got 0",
        ),
    ):
        with pytest.raises(error, match=message):
            call()
