"""A portion of many weights in the same launches: the reference's bits, few reads of W, and no waiting for the device;
tables of addresses are made once and never mistaken."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import FORMATS, WHICH, bits_to_weights, candidates, generator, same_bits
from torch import nn

import inq_kernels as inq
from inq_kernels import backends, reference
from inq_kernels.reference import pack_bits, unpack_bits

pytest.importorskip("triton")
from inq_kernels.triton_ops import masked_steps, partition, portion, quantize, tables
from support_triton import guarded, kinds, random_masks, times, traffic
from test_triton_training import (
    DEVICE,
    DTYPES,
    EMPTY,
    SIZES,
    Guard,
    cases,
    dtypes,
    flags,
    rules,
)

pytestmark = [
    pytest.mark.usefixtures("quick_interpreter"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning"),
]
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's loads are counted")
RULES = rules(inq.Format(4))
rule_ids = [f"{fmt.granularity}-{fmt.exponent}" for fmt in RULES]


def zeroed(some):
    """``cases`` whose pruned weights are 0, in eight rows at most: the interpreter takes 20 ms and more for each."""
    shapes = [next((r, w.numel() // r) for r in range(8, 0, -1) if w.numel() % r == 0) for w, *_ in some]
    some = [(w.view(shape), *rest) for (w, *rest), shape in zip(some, shapes, strict=True)]
    return [(w if k is None else w * unpack_bits(k, w.shape), m, k, count) for w, m, k, count in some]


def assert_as_reference(some, derive, fmt, random, seeds, guard=None):
    """The portion of ``cases``, ours beside the reference's."""
    ws, masks, keeps, counts = (list(x) for x in zip(*some, strict=True))
    n1s = [torch.full((w.shape[0], 1), -2, dtype=torch.int8, device=DEVICE) for w in ws]
    place = guard or torch.clone
    theirs = [[t.clone() for t in each] for each in (ws, masks, n1s)]
    ours = [[place(t) for t in each] for each in (ws, masks, n1s)]
    reference.freeze_portion_(*theirs, keeps, counts, derive, fmt, random, seeds)
    totals = portion.freeze_portions_(*ours, keeps, counts, derive, fmt, random, seeds)
    for i, (w, mask) in enumerate(zip(*theirs[:2], strict=True)):
        assert torch.equal(ours[2][i], theirs[2][i]), (i, fmt)
        assert torch.equal(ours[1][i], mask), (i, fmt)
        assert same_bits(ours[0][i], w), (i, fmt)
        assert int(totals[i]) == int(unpack_bits(mask, (w.numel(),)).sum()), i
    return ours


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("fmt", RULES, ids=rule_ids)
@dtypes
def test_a_portion_of_many_weights(dtype, fmt, random):
    guard = Guard(aligned=not random)
    number = DTYPES.index(dtype) + RULES.index(fmt)
    some = zeroed(cases(dtype)[number % 4 :: 4])
    fmt = inq.Format(FORMATS[number % 7].bits, FORMATS[number % 7].levels, fmt.granularity, fmt.exponent)
    assert_as_reference(some, True, fmt, random, [i << 40 | i for i in range(len(some))], guard)
    guard.check()


@pytest.mark.parametrize("random", [False, True])
@dtypes
def test_a_portion_with_exponents_that_are_fixed(dtype, random):
    assert_as_reference(zeroed(cases(dtype)[1::3]), False, inq.Format(3), random, list(range(3)))


@pytest.mark.parametrize("length", [1, 3, 100, 1023, 1024, 1025, 3000])
def test_rows_of_any_length(length, monkeypatch):
    """Many rows in a tile, many tiles in a row, rows that begin and end anywhere, and slots of long ones."""
    from inq_kernels.triton_ops import exponents

    monkeypatch.setattr(exponents, "_SEGMENT", 2048)
    # The interpreter takes 20 ms and more for a row.
    rows = max(min(2100 // length, 64), 3)
    g = generator(length)
    w = torch.randn(rows, length, generator=g) * torch.exp2(torch.randint(-9, 9, (rows, 1), generator=g).float())
    w[rows // 2] = 0
    w[-1, -1] = 300
    mask, keep = random_masks(w.numel(), "both")
    w = w.to(DEVICE) * unpack_bits(keep, w.shape)
    for exponent in ("max", "mse"):
        fmt = inq.Format(3, granularity="channel", exponent=exponent)
        assert_as_reference([(w, mask, keep, candidates(mask, keep, w.numel()) // 2)], True, fmt, False, [0])
        assert torch.equal(partition.exponents_of([w], fmt)[0], reference.exponents(w, fmt))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_any_portion(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    some = []
    for _ in range(data.draw(st.integers(1, 2))):
        rows, k = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 24))
        few = st.sampled_from([0, 0x80000000, 1, 0x400000, 0x600000, 0x7F7FFFFF, 0x3F400000, 0x3FC00000, 0x3F800000])
        few |= st.sampled_from([0x8000, 0x3F80, 0x3C00, 0x3E00, 0x0400, 0x7BFF]) | st.integers(0, (1 << 32) - 1)
        bits = data.draw(st.lists(few, min_size=rows * k, max_size=rows * k))
        w = bits_to_weights(torch.tensor(bits), dtype).view(rows, k).to(DEVICE)
        mask, keep = random_masks(w.numel(), data.draw(st.sampled_from(WHICH)), data.draw(st.integers(0, 99)))
        some.append((w, mask, keep, data.draw(st.integers(0, candidates(mask, keep, w.numel())))))
    fmt = data.draw(st.sampled_from([rule for f in FORMATS for rule in rules(f)]))
    seeds = [data.draw(st.integers(-(1 << 63), (1 << 63) - 1)) for _ in some]
    assert_as_reference(zeroed(some), data.draw(st.booleans()), fmt, data.draw(st.booleans()), seeds)


def test_transposed_weights():
    w = torch.randn(12, 9, generator=generator(1)).to(DEVICE)
    mask = torch.zeros(14, dtype=torch.uint8, device=DEVICE)
    theirs, ours = (w.clone(), mask.clone()), (w.T.contiguous().T, mask.clone())
    n1s = [torch.zeros(12, 1, dtype=torch.int8, device=DEVICE) for _ in range(2)]
    fmt = inq.Format(4, granularity="channel")
    reference.freeze_portion_([theirs[0]], [theirs[1]], n1s[:1], [None], [50], True, fmt, False, [0])
    portion.freeze_portion_([ours[0]], [ours[1]], n1s[1:], [None], [50], True, *flags(fmt), False, [0])
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert torch.equal(*n1s)


def test_nothing_and_what_does_not_fit():
    fmt = inq.Format(4)
    assert portion.freeze_portions_([], [], [], [], [], True, fmt).shape == (0,)
    w, mask = torch.ones(4, 5, device=DEVICE), torch.zeros(3, dtype=torch.uint8, device=DEVICE)
    n1 = torch.zeros(4, 1, dtype=torch.int8, device=DEVICE)
    for arguments, message in (
        (([w], [mask], [], [None]), "n1s: expected 1, got 0"),
        (([w], [mask], [n1[:3]], [None]), r"n1 number 0: expected shape \[4, 1\], got \[3, 1\]"),
        (([w], [mask[:2]], [n1], [None]), r"mask: expected shape \[3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            portion.freeze_portions_(*arguments, [1], True, fmt)
    assert not mask.any()


# --- reads and writes -------------------------------------------------------------------------------------------------


def expected_reads(dtype, fmt, random, derive):
    """Four at the most: a digit each, and freezing. Where nothing is counted in W, what exponents need."""
    digits = 3 if dtype == torch.float32 else 2
    alone = 0 if not derive else 2 if (fmt.granularity, fmt.exponent) == ("channel", "mse") else 1
    return 1 + (alone if random else digits)


@interpreted
@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("fmt", [*RULES, None], ids=[*rule_ids, "fixed"])
@dtypes
def test_w_is_read_four_times_at_most_and_written_once(dtype, fmt, random, monkeypatch):
    """Ties in every tile, several chunks, frozen and pruned weights: nothing makes it more."""
    for module in (tables, partition, quantize):
        monkeypatch.setattr(module, "CHUNK", tables.TILE)
    derive, fmt = fmt is not None, fmt or inq.Format(4)
    some = []
    for name, shape, which in (("few values", (3, 700), "both"), ("normal", (40, 5), "none"), ("equal", (65,), "half")):
        w, (mask, keep) = kinds(shape, dtype)[name], random_masks(torch.Size(shape).numel(), which)
        some.append((w, mask, keep, candidates(mask, keep, w.numel()) // 2))
    with traffic() as (loads, stores):
        ours = assert_as_reference(zeroed(some), derive, fmt, random, [5] * len(some))
    reads = expected_reads(dtype, fmt, random, derive)
    assert reads <= 4
    for w, mask in zip(*ours[:2], strict=True):
        assert np.unique(times(loads, w)).tolist() == [reads]
        assert times(stores, w).max() == 1
        assert np.unique(times(stores, mask)).tolist() == [1]


@interpreted
@pytest.mark.parametrize("random", [False, True])
@dtypes
def test_every_output_is_written_once_and_nothing_else(dtype, random, monkeypatch):
    some = zeroed(cases(dtype)[random::4])
    ws, masks, keeps, counts = (list(x) for x in zip(*some, strict=True))
    n1s = [torch.zeros(w.shape[0], 1, dtype=torch.int8) for w in ws]
    for fmt in RULES[random::2]:
        ours = [[t.clone() for t in each] for each in (ws, masks)]
        with guarded(monkeypatch, itertools.chain(*ours)):
            portion.freeze_portions_(*ours, n1s, keeps, counts, True, fmt, random, [7] * len(ws))
    # Its weights are written again where ties are taken; the rest is not.
    thresholds = partition.partition_thresholds(ws, masks, keeps, counts, random, [7] * len(ws))
    none = thresholds.clone()
    none[:, 1] = 0
    with guarded(monkeypatch, itertools.chain(ws, masks)):
        # Its totals too: here a kernel stores each of them.
        monkeypatch.setattr(torch, "zeros", lambda *size, **how: torch.empty(*size, **how).zero_())
        quantize.freeze_(ws, masks, n1s, none, keeps, inq.Format(4), random, [7] * len(ws))


# --- tables of addresses ----------------------------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch):
    """The tables that are made, from none."""
    made = []

    class Counted(tables._Table):
        def __init__(self, *args):
            made.append(args)
            super().__init__(*args)

    monkeypatch.setattr(tables, "_Table", Counted)
    monkeypatch.setattr(tables, "_recent", type(tables._recent)())
    monkeypatch.setattr(tables, "_captured", {})
    return made


def sgd(params, grads):
    masked_steps.masked_sgd_(params, grads, [], [EMPTY] * len(params), 1.0, 0.0, 0.0, 0.0, False, False, False)


def test_a_table_is_made_once_for_tensors_that_stay(made):
    params, grads = ([torch.zeros(n, device=DEVICE) for n in (5, 40)] for _ in range(2))
    for _ in range(3):
        sgd(params, grads)
    assert len(made) == 1
    # Gradients that lie elsewhere, and the first ones again.
    others = [g.clone() for g in grads]
    sgd(params, others)
    sgd(params, grads)
    assert len(made) == 2


def test_other_tensors_at_an_address_get_a_table_of_their_own(made):
    """As when memory is freed and given out again: other sizes, another order."""
    memory, ones = torch.zeros(2000, device=DEVICE), torch.ones(2000, device=DEVICE)
    expected = torch.zeros(2000, device=DEVICE)
    for parts in (((0, 1500),), ((0, 7),), ((0, 7), (64, 100)), ((64, 100), (0, 7)), ((0, 100),)):
        sgd([memory[a:b] for a, b in parts], [ones[a:b] for a, b in parts])
        for a, b in parts:
            expected[a:b] -= 1
        assert torch.equal(memory, expected), parts
    assert len(made) == 5


def test_old_tables_are_given_up(made, monkeypatch):
    monkeypatch.setattr(tables, "KEPT", 2)
    device = torch.device("cpu")
    for size in (1, 2, 1, 3, 1, 2):
        table, _ = tables.build([(size,)], [1], device)
        assert table.tolist() == [0, size]
    # The least recently used one goes: 2, when 3 comes.
    assert [args[0] for args in made] == [((1,),), ((2,),), ((3,),), ((2,),)]
    assert len(tables._recent) == 2


def test_large_tables_are_given_up_sooner(made, monkeypatch):
    monkeypatch.setattr(tables, "KEPT_NUMBERS", 250)
    for size in (1, 2, 3):
        tables.build([(size,)], [100], torch.device("cpu"))
    assert [key[1] for key in tables._recent] == [((2,),), ((3,),)]
    tables.build([(4,)], [1000], torch.device("cpu"))
    assert [key[1] for key in tables._recent] == [((4,),)]


def test_what_a_graph_copies_at_every_replay_is_kept(made, monkeypatch):
    """Counts, too, come from memory of the host that nobody else may be given."""
    capturing = [False]
    monkeypatch.setattr(tables, "_stream", lambda _: (1, capturing[0]))
    monkeypatch.setattr(tables, "_pinned", lambda numbers, _: numbers)
    numbers = torch.tensor([[0, 5]])
    tables.upload(numbers, torch.device(DEVICE))
    assert not tables._captured
    capturing[0] = True
    tables.upload(numbers, torch.device(DEVICE))
    assert [id(each) for each in tables._captured.values()] == [id(numbers)]


def test_streams_share_no_tables_but_with_a_capture(made, monkeypatch):
    """The logic alone: what another stream copies may be on its way, a capture begins when all has arrived."""
    device, state = torch.device("cpu"), [1, False]
    monkeypatch.setattr(tables, "_stream", lambda _: tuple(state))
    first = tables.build([(4,)], [1], device)
    state[0] = 2
    second = tables.build([(4,)], [1], device)
    assert first[0].data_ptr() != second[0].data_ptr()
    state[:] = 3, True
    captured = tables.build([(4,)], [1], device)
    assert captured[0].data_ptr() == first[0].data_ptr()
    assert len(made) == 2
    # One that is made inside is filled by a replay alone: nobody else may have it.
    inside = tables.build([(5,)], [1], device)
    state[1] = False
    assert tables.build([(5,)], [1], device)[0].data_ptr() != inside[0].data_ptr()
    assert len(made) == 4
    monkeypatch.setattr(tables, "KEPT", 0)
    tables.build([(6,)], [1], device)
    assert not tables._recent
    assert {id(each.table) for each in tables._captured.values()} == {id(captured[0]), id(inside[0])}


# --- inq.INQ ----------------------------------------------------------------------------------------------------------


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Linear(13, 7), nn.Linear(20, 33, dtype=torch.bfloat16)).to(DEVICE)


def make_run(model, **more):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return inq.INQ(model, optimizer, inq.Format(4), (0.3, 0.7, 1.0), **more)


class Watch:
    """Which methods that wait for a device are called on tensors, and how often each kernel is launched."""

    WAITING = ("item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "__bool__", "__int__", "__float__")

    def __init__(self, monkeypatch):
        from triton.runtime.interpreter import GridExecutor

        self.waited, self.launched, self._inside = [], [], False
        for name in (*self.WAITING, "__index__", "__getitem__"):
            monkeypatch.setattr(torch.Tensor, name, self._watched(name, getattr(torch.Tensor, name)))
        launch = GridExecutor.__call__

        def call(executor, *args, **kwargs):
            # The interpreter itself copies arguments to the host.
            self.launched.append(executor.fn.__name__)
            self._inside = True
            try:
                return launch(executor, *args, **kwargs)
            finally:
                self._inside = False

        monkeypatch.setattr(GridExecutor, "__call__", call)

    def _watched(self, name, method):
        def watched(t, *args, **kwargs):
            # Selecting by a bool mask has to know how many there are.
            if not self._inside and (name != "__getitem__" or getattr(args[0], "dtype", None) == torch.bool):
                self.waited.append(name)
            return method(t, *args, **kwargs)

        return watched


@interpreted
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_portion_of_a_run_waits_once_and_launches_once_for_all_layers(monkeypatch, granularity):
    monkeypatch.setenv("INQ_BACKEND", "triton")
    model = network().float()
    kept = torch.rand(7, 13, generator=generator(2)) < 0.6
    run = make_run(model, prune_masks={"1": kept}, overrides={"*": inq.Format(4, granularity=granularity)})
    portions = iter(run)
    for digits in ("first", "later"):
        watch = Watch(monkeypatch)
        next(portions)
        monkeypatch.undo()
        monkeypatch.setenv("INQ_BACKEND", "triton")
        assert watch.waited == ["tolist"], digits
        assert watch.launched.count("freeze_all") == 1
        assert watch.launched.count("count_digits") == 3
        assert all(int(run.frozen(name).sum()) for name in run.formats)


@pytest.mark.parametrize("partition", ["magnitude", "random"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_run_has_the_bits_of_the_reference(monkeypatch, granularity, partition):
    """Two formats and two dtypes: as many lists. Masks, codes, exponents and weights, at every portion."""
    kept = torch.rand(7, 13, generator=generator(2)) < 0.6
    runs = []
    for backend in ("triton", "reference"):
        monkeypatch.setenv("INQ_BACKEND", backend)
        model = network()
        more = {"1": inq.Format(3, granularity=granularity), "2": inq.Format(5, "dense", granularity, "max")}
        run = make_run(model, partition=partition, overrides=more, prune_masks={"1": kept})
        states = []
        for _ in run:
            states.append((copy.deepcopy(run.state_dict()["layers"]), copy.deepcopy(model.state_dict())))
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.1)
        runs.append(states)
    for (ours, our_weights), (theirs, their_weights) in zip(*runs, strict=True):
        assert all(same_bits(our_weights[name], w) for name, w in their_weights.items())
        for name, layer in theirs.items():
            assert all(torch.equal(ours[name][key], layer[key]) for key in ("mask", "codes", "n1")), name
            assert (ours[name]["signal"], ours[name]["noise"]) == (layer["signal"], layer["noise"]), name


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
def test_what_cannot_be_quantized_is_named_and_changes_nothing(monkeypatch, backend):
    """The values are looked at in the end: whatever the kernels did with them was done to copies."""
    if backend == "cpu" and DEVICE == "cuda":
        pytest.skip("the weights are on a GPU")
    monkeypatch.setenv("INQ_BACKEND", backend)
    for number, value, message in (
        (2, float("nan"), "layer '2': expected finite values, got 1 NaN and 1 Inf of 660"),
        (0, 0.0, "layer '0': expected some nonzero values"),
    ):
        model = network()
        with torch.no_grad():
            if number == 2:
                model[2].weight[3, :2] = torch.tensor([value, -float("inf")])
            else:
                model[0].weight.fill_(value)
        run = make_run(model)
        before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(run.state_dict()["layers"])
        with pytest.raises(ValueError, match=message):
            next(iter(run))
        assert run.portion == 0
        assert all(same_bits(before[name], w) for name, w in model.state_dict().items())
        for name, layer in run.state_dict()["layers"].items():
            assert layer["n1"] is None
            assert torch.equal(layer["mask"], state[name]["mask"])


def test_a_failure_in_the_middle_changes_nothing(monkeypatch):
    from inq_kernels.inq import _Portion

    model = network()
    run, before = make_run(model), copy.deepcopy(model.state_dict())
    finish = _Portion.finish

    def fail(self):
        if self.layer.name == "2":
            raise RuntimeError("out of memory")
        finish(self)

    monkeypatch.setattr(_Portion, "finish", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        next(iter(run))
    assert all(same_bits(before[name], w) for name, w in model.state_dict().items())
    assert not any(run.frozen(name).any() for name in run.formats)
    monkeypatch.undo()
    assert next(iter(run)) == 0.3


# --- what all backends refuse, and agree on ---------------------------------------------------------------------------

BACKENDS = ("reference", "cpu", "triton") if DEVICE == "cpu" else ("reference", "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expanded_weight_is_refused_and_its_mask_left(monkeypatch, backend):
    monkeypatch.setenv("INQ_BACKEND", backend)
    op = torch.ops.inq
    w = torch.tensor([[1.0], [2.0]], device=DEVICE).expand(2, 5)
    mask, n1 = torch.zeros(2, dtype=torch.uint8, device=DEVICE), torch.zeros(2, 1, dtype=torch.int8, device=DEVICE)
    threshold = torch.tensor([0, 0], device=DEVICE)
    message = r"expected memory of its own for each value, got shape \[2, 5\] with strides \(1, 0\)"
    with pytest.raises(ValueError, match=f"quantize_with_mask_: w: {message}"):
        op.quantize_with_mask_(w, mask, n1, threshold, None, 4, "paper", False, 0)
    tail = ([None] * 2, [3, 3], True, 4, "paper", "tensor", "max", False, [0, 0])
    with pytest.raises(ValueError, match=rf"freeze_portion_: ws\[1\]: {message}"):
        op.freeze_portion_([torch.ones(2, 5, device=DEVICE), w], [mask, mask.clone()], [n1, n1.clone()], *tail)
    assert not mask.any()
    assert not n1.any()
    assert w[:, 0].tolist() == [1, 2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", ["counts", "seeds", "masks", "n1s", "keeps"])
@pytest.mark.parametrize("more", [-1, 1])
def test_lists_of_other_lengths_change_nothing(monkeypatch, backend, wrong, more):
    monkeypatch.setenv("INQ_BACKEND", backend)
    lists = {
        "ws": [torch.randn(4, 5, generator=generator(i)).to(DEVICE) for i in range(2)],
        "masks": [torch.zeros(3, dtype=torch.uint8, device=DEVICE) for _ in range(2)],
        "n1s": [torch.full((4, 1), 9, dtype=torch.int8, device=DEVICE) for _ in range(2)],
        "keeps": [None, None],
        "counts": [3, 3],
        "seeds": [0, 1],
    }
    lists[wrong] = lists[wrong][:1] if more < 0 else [*lists[wrong], lists[wrong][0]]
    before = [t.clone() for name in ("ws", "masks", "n1s") for t in lists[name]]
    tail = (True, 4, "paper", "tensor", "max", True, lists.pop("seeds"))
    with pytest.raises(ValueError, match=rf"inq.freeze_portion_: {wrong}: expected 2, got {2 + more}"):
        torch.ops.inq.freeze_portion_(*lists.values(), *tail)
    after = [t for name in ("ws", "masks", "n1s") for t in lists[name]]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_threshold_that_is_none(monkeypatch, backend):
    monkeypatch.setenv("INQ_BACKEND", backend)
    w, mask = torch.ones(2, 5, device=DEVICE), torch.zeros(2, dtype=torch.uint8, device=DEVICE)
    n1 = torch.zeros(2, 1, dtype=torch.int8, device=DEVICE)
    for threshold, error, message in (
        (torch.zeros(3, dtype=torch.int64, device=DEVICE), ValueError, r"expected shape \[2\] on .*, got \[3\] on"),
        (torch.zeros(2, dtype=torch.int32, device=DEVICE), TypeError, "expected torch.int64, got torch.int32"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, r"expected shape \[2\] on .*, got .* on meta"),
    ):
        # A tensor on another device takes the whole call there, so this one is called as the dispatcher would.
        with pytest.raises(error, match=f"inq.quantize_with_mask_: threshold: {message}"):
            backends._check_threshold("quantize_with_mask_", threshold, w)
        if threshold.device == w.device:
            with pytest.raises(error, match=f"inq.quantize_with_mask_: threshold: {message}"):
                torch.ops.inq.quantize_with_mask_(w, mask, n1, threshold, None, 4, "paper", False, 0)
    assert bool((w == 1).all())
    assert not mask.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["params", "momentum_buffers"])
def test_a_step_that_cannot_be_written_back_changes_nothing(monkeypatch, backend, what):
    monkeypatch.setenv("INQ_BACKEND", backend)
    whole, expanded = torch.ones(3, 5, device=DEVICE), torch.ones(1, 5, device=DEVICE).expand(3, 5)
    lists = {"params": [whole, whole + 0], "grads": [whole + 1] * 2, "momentum_buffers": [whole + 0, whole + 0]}
    lists[what][1] = expanded
    empty = torch.empty(0, dtype=torch.uint8, device=DEVICE)
    numbers = (0.1, 0.9, 0.0, 0.0, False, False, False)
    with pytest.raises(ValueError, match=rf"inq.masked_sgd_: {what}\[1\]: expected memory of its own for each value"):
        torch.ops.inq.masked_sgd_(*lists.values(), [empty] * 2, *numbers)
    assert all(bool((t == 1).all()) for t in (*lists["params"], *lists["momentum_buffers"]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [0, 2])
def test_bits_after_the_last_weight_become_0(monkeypatch, backend, count):
    monkeypatch.setenv("INQ_BACKEND", backend)
    for size in SIZES[1:6]:
        w = torch.arange(1.0, size + 1, device=DEVICE)[None]
        mask = torch.zeros((size + 7) // 8, dtype=torch.uint8, device=DEVICE)
        mask[-1] = 0xFF << (size - 1) % 8 + 1 & 0xFF
        n1 = torch.zeros(1, 1, dtype=torch.int8, device=DEVICE)
        tail = ([None], [count], True, 4, "paper", "tensor", "max", False, [0])
        torch.ops.inq.freeze_portion_([w], [mask], [n1], *tail)
        expected = pack_bits(torch.arange(size, device=DEVICE) >= size - count)
        assert torch.equal(mask, expected), size


def test_opcheck():
    w, (mask, keep) = kinds((3, 35), torch.float32)["normal"], random_masks(105, "both")
    for derive in (True, False):
        n1s = [torch.zeros(3, 1, dtype=torch.int8, device=DEVICE) for _ in range(2)]
        tail = ([None, keep], [3, 4], derive, *flags(inq.Format(4)), False, [0, 1])
        arguments = ([w.clone(), w * unpack_bits(keep, w.shape)], [mask.clone(), mask.clone()], n1s, *tail)
        torch.library.opcheck(torch.ops.inq.freeze_portion_.default, arguments)
