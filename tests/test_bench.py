"""``inq bench``: what is measured, that a wrong result gets no speed, and what is made of the numbers. No test here
depends on how fast anything is."""

import argparse
import copy
import json
from math import prod

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from inq_kernels.bench import (
    bars,
    case,
    compare,
    conv2d,
    gpu,
    gpu_baselines,
    linear,
    machine,
    measure,
    neighbours,
    optim,
    partition,
    plots,
    report,
    shapes,
    timing,
)
from inq_kernels.bench.registry import GPU_OPS, NOT_MEASURED, OPS
from inq_kernels.bench.timing import (
    MIN_PAIRS,
    MIN_QUIET,
    PATIENCE,
    PATIENCE_QUIET,
    CpuClock,
    CudaClock,
    Runner,
    ratio,
    summary,
    time_pairs,
)
from inq_kernels.bench.weights import RandomWeights

from inq_kernels import Format, bench, library, reference, unpack
from inq_kernels.cli import main

CACHE = 1 << 16
TINY = ("--shape", "64,40", "--m", "1", "3", "--seconds-per-case", "0.001")


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    """A machine with small caches, so that few copies exceed them."""
    monkeypatch.setattr(machine, "last_level_cache", lambda: CACHE)
    limits = {"copy_gb_s": 10.0, "product_gflop_s": {"float32": 100.0, "bfloat16": 200.0}}
    monkeypatch.setattr(machine, "ceilings", lambda seconds: limits)


def run(out, *words):
    return main(["bench", *words, "--out", str(out)])


def results_of(out):
    return json.loads((out / "results.json").read_text())


def rows_of(results):
    return [row for section in results["sections"] for row in section["rows"]]


def work_of(op, number=0, backend="reference", **wanted):
    request = case.Request(**{"shapes": () if "conv" in op else ((64, 40),), "quick": True, **wanted})
    return list(OPS[op].cases(request))[number].build(case.Context(backend))


# --- what is measured -------------------------------------------------------------------------------------------------


def test_every_operator_is_measured_or_has_a_reason():
    covered = [name for op in OPS.values() for name in op.covers]
    assert len(covered) == len(set(covered))
    assert set(covered) | set(NOT_MEASURED) == set(library.SCHEMAS)
    assert not set(covered) & set(NOT_MEASURED)
    assert all(NOT_MEASURED.values())


def test_shapes():
    assert sum(map(prod, shapes.VGG16)) == 138_344_128
    assert sum(map(prod, shapes.RESNET50_WEIGHTS)) == 25_502_912
    assert len(set(shapes.RESNET50)) == len(shapes.RESNET50) == 23
    assert set(bars.AMX) <= set(shapes.MS_MAIN)
    wanted = {(p["shape"], p["m"], p["bits"]) for p in (c.params for c in OPS["linear"].cases(case.Request()))}
    assert {("14336x4096", m, bits) for m in bars.AMX for bits in (4, 5)} <= wanted


@pytest.mark.parametrize("quick", [True, False])
def test_cases_have_names_of_their_own(quick):
    for op in OPS.values():
        cases = list(op.cases(case.Request(quick=quick)))
        assert cases
        assert len({json.dumps(c.params, sort_keys=True) for c in cases}) == len(cases)


@pytest.mark.parametrize(("bits", "k"), [(2, 64), (3, 61), (4, 60), (5, 63)])
def test_random_weights(bits, k):
    w = RandomWeights(40, k, Format(bits))
    assert reference.invalid_codes(w.packed().weight, w.n1, k, w.fmt) == 0
    assert torch.equal(unpack(w.packed()), w.dense(torch.float32))
    rows = torch.tensor([3, 39])
    assert torch.equal(w.dense(torch.bfloat16, rows).double(), w.dense(torch.float64)[rows])
    groups = torch.tensor([1, 4])
    columns = torch.cat([torch.arange(8, 16), torch.arange(32, 40)])
    assert torch.equal(w.dense(torch.float64, groups=groups), w.dense(torch.float64)[:, columns])
    assert len(w.n1.unique()) > 1
    assert (w.dense(torch.float32) == 0).float().mean() < 0.5


@pytest.mark.parametrize("op", ["linear", "linear_dx", "conv2d", "pack", "unpack", "prepack", "masked_adamw"])
def test_copies_together_exceed_the_cache(op, monkeypatch):
    seen = []
    original = case.machine.copies
    monkeypatch.setattr(machine, "copies", lambda size: seen.append((size, original(size))) or seen[-1][1])
    work = work_of(op, **({} if "conv" in op else {"shapes": ((256, 64),)}))
    assert seen
    assert all(size * count > 4 * CACHE for size, count in seen)
    rotated = [work.candidate, *(b for b in work.baselines.values() if isinstance(b, Runner))]
    counts = {count for _, count in seen}
    assert all(len(each.calls) in counts for each in rotated)


def test_where_the_cache_is_large_for_the_memory_there_are_fewer_copies(monkeypatch):
    monkeypatch.setattr(machine, "last_level_cache", lambda: 480 << 20)
    for memory, times in ((24 << 30, 2), (48 << 30, 4)):
        monkeypatch.setattr(machine, "memory_bytes", lambda memory=memory: memory)
        assert machine.copies(240 << 20) == 2 * times + 1


def test_no_more_than_64_copies(monkeypatch):
    assert machine.copies(1) == 64
    for cache, inside in ((CACHE, False), (1 << 24, True)):
        monkeypatch.setattr(machine, "last_level_cache", lambda cache=cache: cache)
        context = case.Context("reference")
        for _ in range(2):  # copies that are there already are inside the cache too
            context.enter("group")
            assert not context.inside_cache
            assert len(context.copies("w", lambda: torch.zeros(2048))) == (33 if cache == CACHE else 64)
            assert context.inside_cache == inside


def test_a_rotation_inside_the_cache_is_said(monkeypatch):
    monkeypatch.setattr(machine, "last_level_cache", lambda: 1 << 24)
    request = case.Request(shapes=((64, 40),), ms=(1,), bits=(4,))
    limits = machine.ceilings(0)
    (one,) = OPS["linear"].cases(request)
    row = measure.run_case(one, case.Context("reference"), CpuClock(), 0.001, limits)
    assert row["error"] is None
    assert row["facts"]["rotation"] == "inside the cache"


def test_whatever_a_case_raises_makes_it_red_and_no_other():
    """A compiler's errors (Triton's, out of shared memory) are no RuntimeErrors."""

    class OutOfResources(Exception):
        pass

    def build(context):
        raise OutOfResources("shared memory")

    bad = case.Case("linear", {"dtype": "float32"}, build)
    row = measure.run_case(bad, case.Context("reference"), CpuClock(), 0.001, machine.ceilings(0))
    assert row["error"] == "OutOfResources: shared memory"
    assert "time" not in row


def test_a_case_beside_its_bar_is_timed_for_longer(monkeypatch):
    """The masked steps' bar is 5 % from torch's step: with the pairs of other cases, noise decides."""
    seconds = []
    original = measure.time_pairs
    monkeypatch.setattr(measure, "time_pairs", lambda c, a, b, s, patience: seconds.append(s) or original(c, a, b, 0.0))
    for longer in (1.0, 8.0):
        call = Runner([lambda: None], 0)
        work = case.Work(call, {"same": Runner(call.calls, 0)}, lambda: None, longer=longer)
        one = case.Case("linear", {"dtype": "float32"}, lambda context, work=work: work)
        assert measure.run_case(one, case.Context("reference"), CpuClock(), 0.5, machine.ceilings(0))["error"] is None
    assert seconds == [0.5, 4.0]
    for op in ("masked_adamw", "masked_sgd"):
        assert work_of(op, shapes=((256, 64),)).longer > 1


def test_held_down_grids():
    for isa, dtype in (("avx512", "bfloat16"), ("avx2", "float32")):
        found = [c.params for c in OPS["linear"].cases(case.Request(isa=isa))]
        assert {p["dtype"] for p in found} == {dtype}
        assert {(p["bits"], p["m"]) for p in found if p["shape"] == "14336x4096"} == {
            (bits, m) for bits in (4, 5) for m in shapes.MS_MAIN
        }
        others = [p for p in found if p["shape"] != "14336x4096"]
        assert {p["shape"] for p in others} == {f"{k}x{n}" for k, n in shapes.SHAPES[1:]}
        assert {(p["bits"], p["m"]) for p in others} == {(4, 1), (4, 16), (4, 256)}


def test_each_copy_is_memory_of_its_own():
    calls = work_of("linear").candidate.calls
    assert len({call.args[1].data_ptr() for call in calls}) == len(calls) > 1


# --- timing -----------------------------------------------------------------------------------------------------------


def test_a_runner_takes_its_copies_in_turn():
    taken = []
    runner = Runner([lambda i=i: taken.append(i) or i for i in range(3)], 0)
    assert runner.run(4) == 0
    assert runner.run(2) == 2
    assert taken == [0, 1, 2, 0, 1, 2]


class FakeClock:
    """Runners cost what they say, and each sample is written down."""

    def __init__(self, costs):
        self.costs, self.samples = costs, []

    def seconds(self, runner, repeat):
        self.samples.append((runner.bytes, repeat))
        return self.costs[runner.bytes]

    def probe(self):
        return 1.0

    def quiet(self, probe):
        return probe <= 1.0


def test_pairs_take_turns_and_short_calls_are_repeated():
    a, b = Runner([lambda: None], 1), Runner([lambda: None], 2)
    clock = FakeClock({1: 1e-3, 2: 1e-6})
    pairs = time_pairs(clock, a, b, 10 * 1.3e-3)
    assert len(pairs.mine) == len(pairs.theirs) == pairs.taken == 10 >= MIN_PAIRS
    assert not pairs.busy
    timed = clock.samples[-20:]
    assert [which for which, _ in timed] == [1, 2, 2, 1] * 5
    assert {repeat for which, repeat in timed if which == 1} == {1}
    # Enough of the short one that a sample takes about 0.2 ms.
    assert all(repeat >= 200 for which, repeat in timed if which == 2)


@pytest.mark.parametrize(("cost", "pairs"), [(1.0, MIN_PAIRS), (30.0, 3)])
def test_long_calls_get_few_pairs(cost, pairs):
    a, b = Runner([lambda: None], 1), Runner([lambda: None], 2)
    assert len(time_pairs(FakeClock({1: cost, 2: cost}), a, b, 10).mine) == pairs


class BusyClock(FakeClock):
    """Something else takes the machine for the first samples of the second runner."""

    def __init__(self, busy):
        super().__init__({1: 0.1, 2: 0.1})
        self.left = busy

    def seconds(self, runner, repeat):
        self.left -= runner.bytes == 2
        return super().seconds(runner, repeat) * (3.0 if runner.bytes == 2 and self.left >= 0 else 1.0)


@pytest.mark.parametrize(("busy", "again", "expected"), [(0, False, 1.0), (2, True, 1.0), (1000, False, 3.0)])
def test_an_uncertain_ratio_is_measured_again(busy, again, expected):
    """A machine that was busy for a while does not decide; one that always is as busy does."""
    a, b = Runner([lambda: None], 1), Runner([lambda: None], 2)
    clock = BusyClock(0)
    time_pairs(clock, a, b, 0.0)
    clock = BusyClock(busy + sum(which == 2 for which, _ in clock.samples) - 3)  # those of the warm-up
    pairs = time_pairs(clock, a, b, 0.0)
    assert (3 < pairs.taken <= 3 * PATIENCE) if again else (pairs.taken == 3)
    assert ratio(pairs.mine, pairs.theirs)["ratio"] == pytest.approx(expected)


class NeighbourClock(FakeClock):
    """Others slow the second runner in some of the pairs, and probes see them: by turns, or always."""

    def __init__(self, busy):
        super().__init__({1: 0.01, 2: 0.01})
        self.busy, self.pair = busy, 0

    def probe(self):
        self.pair += 1  # three probes a pair
        return 2.0 if self.busy((self.pair - 1) // 3) else 1.0

    def seconds(self, runner, repeat):
        return super().seconds(runner, repeat) * (3.0 if runner.bytes == 2 and self.busy((self.pair - 1) // 3) else 1.0)


def test_pairs_that_neighbours_disturbed_are_set_aside():
    a, b = Runner([lambda: None], 1), Runner([lambda: None], 2)
    pairs = time_pairs(NeighbourClock(lambda pair: pair % 3), a, b, 0.0)  # two thirds: the median would be theirs
    assert MIN_QUIET <= len(pairs.mine) == len(pairs.theirs) < pairs.taken
    assert not pairs.busy
    assert pairs.counts() == {"taken": pairs.taken}
    assert ratio(pairs.mine, pairs.theirs)["ratio"] == pytest.approx(1.0)


def test_pairs_of_a_machine_that_is_never_quiet_are_all_kept_and_say_so():
    a, b = Runner([lambda: None], 1), Runner([lambda: None], 2)
    pairs = time_pairs(NeighbourClock(lambda pair: True), a, b, 0.0)
    assert len(pairs.mine) == pairs.taken == 3 * PATIENCE_QUIET
    assert pairs.counts() == {"taken": pairs.taken, "busy": True}
    assert ratio(pairs.mine, pairs.theirs)["ratio"] == pytest.approx(3.0)


def test_probes_are_not_asked_about_long_samples(monkeypatch):
    monkeypatch.setattr(timing, "PROBED_S", 0.001)
    a, b = Runner([lambda: None], 1), Runner([lambda: None], 2)
    pairs = time_pairs(NeighbourClock(lambda pair: True), a, b, 0.0)
    assert len(pairs.mine) == pairs.taken == 3
    assert not pairs.busy


def test_a_probe_knows_the_fastest():
    probe = neighbours.Probe(calibrate_s=0.01)
    assert 0 < probe.fastest < float("inf")
    times = iter([3e-5, 2e-5, 4e-5, 4e-5])
    probe._once = lambda: next(times)
    probe.fastest = 2.5e-5
    assert probe.seconds() == 2e-5  # the faster of two
    assert probe.fastest == 2e-5
    assert not probe.quiet(probe.seconds())
    assert probe.quiet(2.4e-5)


def test_every_copy_is_used_before_the_first_is_timed(monkeypatch):
    used = []
    runner = Runner([lambda i=i: used.append(i) for i in range(100)], 1)
    monkeypatch.setattr(timing, "MIN_SAMPLE_S", 0.0)  # or a sample of calls this short goes round by itself
    timing.warm_up(CpuClock(), runner)
    assert set(used) == set(range(100))


def test_a_reset_runs_before_every_sample_and_calls_are_not_repeated():
    state = []

    def call():
        assert state == []
        state.append(1)

    runner = Runner([call], 0, state.clear)
    pairs = time_pairs(CpuClock(), runner, None, 0.001)
    assert pairs.taken >= MIN_PAIRS
    assert pairs.theirs == []


def test_the_interval_covers_the_ratio():
    rng, covered, widths = np.random.default_rng(0), 0, []
    for seed in range(200):
        busy = rng.lognormal(0, 0.5, 60)  # slows both of a pair
        a, b = busy * rng.lognormal(0, 0.1, 60), 3 * busy * rng.lognormal(0, 0.1, 60)
        found = ratio(a, b, seed)
        assert found["low"] <= found["ratio"] <= found["high"]
        covered += found["low"] <= 3 <= found["high"]
        widths.append(found["high"] - found["low"])
    assert covered >= 180
    assert np.median(widths) < 1.2
    assert ratio(a, b) == ratio(a, b)
    with pytest.raises(ValueError, match="expected as many samples of both, got 2 and 1"):
        ratio([1.0, 2.0], [1.0])


def test_summary_is_in_microseconds():
    found = summary([i * 1e-6 for i in range(101)])
    assert found["samples"] == 101
    assert (found["p10_us"], found["median_us"], found["p90_us"]) == pytest.approx((10, 50, 90))


def test_peak_memory_counts_what_a_call_takes():
    found = machine.peak_extra(lambda: torch.ones(1 << 24).sum())  # 64 MiB, given back at once
    if isinstance(found, str):
        pytest.skip(found)
    # The kernel counts pages in batches.
    assert 63 << 20 <= found < 72 << 20
    assert machine.peak_extra(lambda: None) < 4 << 20


# --- the clock of a GPU, without one ----------------------------------------------------------------------------------


class FakeDevice:
    """A device on which every call of ``step`` takes a second."""

    def __init__(self):
        self.now, self.captured, self.replays = 0, [], 0

    def step(self, name):
        self.now += 1
        return name

    def capture(self, run):
        before = self.now
        run()
        took, self.now = self.now - before, before
        self.captured.append(took)

        def replay():
            self.replays += 1
            self.now += took

        return replay

    def elapsed(self, run):
        before = self.now
        run()
        return float(self.now - before)


def on_device(device, count=3, reset=None):
    return Runner([lambda i=i: device.step(i) for i in range(count)], 8, reset)


def test_a_graph_goes_round_all_copies():
    """However few calls a sample needs: fewer copies would stay in the cache."""
    device = FakeDevice()
    clock, runner = CudaClock(device), on_device(device)
    assert clock.seconds(runner, 1) == 1.0
    assert device.captured == [3]
    assert clock.seconds(runner, 7) == 1.0
    assert device.captured == [3, 9]
    clock.seconds(runner, 8)
    assert (device.captured, device.replays) == ([3, 9], 3)  # captured once, replayed
    assert clock.how() == "CUDA graph"


def test_a_graph_ends_with_its_runner():
    device = FakeDevice()
    clock, runner = CudaClock(device), on_device(device)
    clock.seconds(runner, 1)
    assert len(clock._graphs) == 1
    del runner
    assert len(clock._graphs) == 0


def test_eager_times_are_of_calls():
    device = FakeDevice()
    clock = CudaClock(device).eager()
    assert clock.seconds(on_device(device), 2) == 1.0
    assert (device.captured, device.replays, clock.how()) == ([], 0, "eager")


def test_a_reset_is_not_timed_and_undoes_the_capture():
    device, resets = FakeDevice(), []
    clock, runner = CudaClock(device), on_device(device, 1, lambda: resets.append(device.replays))
    assert [clock.seconds(runner, 5) for _ in range(3)] == [1.0] * 3
    assert device.captured == [1]
    # Before each sample, and once more after capturing, which runs the call.
    assert resets == [0, 0, 1, 2]


def test_both_of_a_pair_are_timed_in_one_way():
    device = FakeDevice()
    clock, a, b = CudaClock(device), on_device(device), on_device(device)
    assert clock.together([a, b]) is clock

    def refused(run):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    device.capture = refused
    other = CudaClock(device).together([a, b])
    assert other.how() == "eager: operation not permitted when stream is capturing"
    assert other.seconds(a, 1) == 1.0
    assert other.together([a]) is other


def test_few_rows_are_timed_from_python_too(monkeypatch):
    """And each baseline says how it was timed."""
    device = FakeDevice()

    def build(context):
        runner = on_device(device)
        return case.Work(runner, {"other": on_device(device), "none": "not installed"}, lambda: None, 6, "bfloat16")

    limits = {"copy_gb_s": 10.0, "product_gflop_s": {"float32": 1.0, "bfloat16": 2.0}}
    for m, eager in ((1, True), (64, False)):
        one = case.Case("linear", {"m": m}, build)
        row = measure.run_case(one, case.Context("triton"), CudaClock(device), 20.0, limits)
        assert row["error"] is None
        assert row["baselines"][0]["timing"] == "CUDA graph"
        assert row["baselines"][0]["ratio"] == 1.0
        assert row["baselines"][1]["reason"] == "not installed"
        assert ("eager" in row) == eager
        lines = list(report.row_lines(row | {"params": {"shape": "1x1"}}))
        assert [line.split()[0] for line in lines[1:]] == ["other", "none", *(["eager"] if eager else [])]
        if eager:
            assert row["eager"]["baselines"][0]["timing"] == "eager"
            assert row["eager"]["time"]["median_us"] == 1e6


def test_copies_on_a_gpu_exceed_its_cache(monkeypatch):
    monkeypatch.setattr(gpu, "cache_bytes", lambda: 1000)
    context = case.Context("triton", "cuda")
    assert context.rotation(100) == 31
    assert not context.inside_cache
    assert context.rotation(10) == 64
    assert context.inside_cache


def test_a_gpu_that_is_not_there_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(tmp_path, "--device", "cuda") == 1
    assert "expected a CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert run(tmp_path, "--device", "cuda", "--isa", "avx2") == 1
    assert "expected native with --device cuda, got avx2" in capsys.readouterr().err


@pytest.mark.parametrize("op", ["linear", "linear_fp8", "linear_dx", "unpack"])
def test_cases_of_a_gpu_find_wrong_results(op):
    """Their data is made on the CPU here; graphs and baselines of the device are not."""
    request = case.Request(shapes=((64, 40),), ms=(3,), bits=(4,), dtypes=("bfloat16",), device="cuda")
    work = next(GPU_OPS[op].cases(request)).build(case.Context("reference"))
    assert work.check() is None
    if op == "linear_fp8":
        assert list(work.baselines)[:3] == ["cuBLAS bfloat16", "_scaled_mm fp8", "_weight_int4pack_mm"]
        assert isinstance(work.baselines["cuBLAS bfloat16"], Runner)
        assert work.baselines["Humming"] == "humming is not installed"
    right = work.candidate.calls
    work.candidate.calls = [lambda call=call: _spoil(call()) for call in right]
    assert work.check()


def test_tritons_linear_stands_beside_the_librarys():
    """As below; what ``linear`` is beside is chosen by the device of its data."""
    w, x = RandomWeights(40, 64, Format(4)), torch.ones(3, 64, dtype=torch.bfloat16)
    found = gpu_baselines.linear_baselines(case.Context("cuda"), w, 3, "bfloat16", x, w.packed())
    assert isinstance(found["Triton"], Runner), found["Triton"]


@pytest.mark.parametrize("op", ["linear_fp8", "linear_dx"])
def test_tritons_kernels_stand_beside_the_librarys(op):
    """Which needs a GPU: its own calls are never made here, and Triton's are interpreted."""
    request = case.Request(shapes=((64, 40),), ms=(3,), bits=(4,), dtypes=("bfloat16",), device="cuda")
    work = next(GPU_OPS[op].cases(request)).build(case.Context("cuda"))
    triton = work.baselines["Triton"]
    assert isinstance(triton, Runner), triton


@pytest.mark.parametrize("op", ["conv2d", "conv2d_dx"])
def test_convolutions_of_a_gpu_are_beside_cudnn(op, monkeypatch):
    """What is not its data is told that it is on a GPU; the data stays on the CPU."""
    monkeypatch.setattr(shapes, "RESNET50_QUICK", ((4, 8, 3, 1, 6),))
    monkeypatch.setattr(case.Context, "rotation", lambda self, size: 2)
    made, normal, weights = [], conv2d.normal, conv2d.rotated

    def on_cpu(shape, dtype, seed=0, device="cpu"):
        made.append(device)
        return normal(shape, dtype, seed)

    def rotated(context, *more):
        assert context.device == "cuda"
        return weights(case.Context("reference"), *more)

    monkeypatch.setattr(conv2d, "normal", on_cpu)
    monkeypatch.setattr(conv2d, "rotated", rotated)
    context = case.Context("reference", "cuda")
    request = case.Request(quick=True, ms=(2,), dtypes=("float32",), device="cuda")
    chosen = []
    for name, function in (("conv2d", F.conv2d), ("convolution_backward", torch.ops.aten.convolution_backward)):

        def recorded(*args, function=function):
            chosen.append(torch.backends.cudnn.benchmark)
            return function(*args)

        monkeypatch.setattr(conv2d.F if name == "conv2d" else torch.ops.aten, name, recorded)
    work = next(GPU_OPS[op].cases(request)).build(context)
    assert made == ["cuda"]
    assert list(work.baselines) == ["cuDNN float32"]
    assert isinstance(work.baselines["cuDNN float32"], Runner)
    assert chosen == [True]  # by time, in the library's call alone
    assert not torch.backends.cudnn.benchmark
    assert work.check() is None
    work.candidate.calls = [lambda call=call: _spoil(call()) for call in work.candidate.calls]
    assert work.check()


@pytest.mark.parametrize("quick", [True, False])
def test_cases_on_a_gpu(quick):
    cases = [c for op in GPU_OPS.values() for c in op.cases(case.Request(quick=quick, device="cuda"))]
    names = [json.dumps({"op": c.op, **c.params}, sort_keys=True) for c in cases]
    assert len(set(names)) == len(names)
    ops = {c.op for c in cases}
    assert ops == {"linear", "linear_fp8", "linear_dx", "partition", "masked_adamw", "masked_sgd",
                   "pack", "unpack", "prepack", "unprepack", "conv2d", "conv2d_dx"}  # fmt: skip
    if not quick:
        main_shape = {(c.params["dtype"], c.params["m"]) for c in cases if c.params["shape"] == "8192x8192"
                      and c.op == "linear" and c.params["bits"] == 4}  # fmt: skip
        assert {("bfloat16", m) for m in bars.H200_CUBLAS} | {("float16", 1)} <= main_shape


def test_what_a_time_limit_leaves_out(tmp_path, capsys):
    assert run(tmp_path, "--op", "pack", "linear", *TINY, "--no-plots", "--within", "1e-9") == 1
    captured = capsys.readouterr()
    assert "cases were left out" in captured.out
    assert results_of(tmp_path)["sections"][0]["left_out"] > 0


def test_baselines_of_packages_that_are_not_installed(monkeypatch):
    monkeypatch.setattr(gpu_baselines.importlib.util, "find_spec", lambda name: None)
    assert gpu_baselines._peer("humming", lambda: None) == "humming is not installed"
    monkeypatch.setattr(gpu_baselines.importlib.util, "find_spec", lambda name: name)

    def broken():
        raise AssertionError("block_shape must be\ngiven")

    assert gpu_baselines._peer("humming", broken) == "AssertionError: block_shape must be given"


def test_bars_of_an_h200():
    params = {"shape": "8192x8192", "m": 1, "bits": 4, "dtype": "bfloat16"}
    baselines = [{"name": "cuBLAS bfloat16", "ratio": 2.9}, {"name": "Humming", "reason": "not installed"}]
    row = {"op": "linear", "backend": "triton", "params": params, "baselines": baselines, "error": None}
    row |= {"facts": {"bits_per_weight": 9.0}, "time": {"median_us": 9.0}, "of_copy": 0.6}
    results = {"sections": [{"isa": "cuda", "machine": {"isa": "cuda", "gpu": "NVIDIA H200"}, "rows": [row]}]}
    assert status(results, "H200 linear 4-bit M=1: cuBLAS") == ("pass", 2.9)
    assert status(results, "H200 linear 4-bit M=1: of the copy") == ("fail", 0.6)
    assert status(results, "H200 linear 4-bit M=1: Humming") == ("open", None)
    # The CPU's bars do not judge a GPU, and those of an H200 no other one.
    assert status(results, "linear 4-bit: memory in use") == ("open", None)
    results["sections"][0]["machine"]["gpu"] = "NVIDIA A100"
    assert status(results, "H200 linear 4-bit M=1: cuBLAS") == ("open", None)
    row["error"] = "wrong"
    results["sections"][0]["machine"]["gpu"] = "NVIDIA H200"
    assert status(results, "H200 linear 4-bit M=1: of the copy") == ("fail", None)


# --- checks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [op for op in OPS if op != "partition" and "masked" not in op])
def test_checks_find_wrong_results(op):
    work = work_of(op, **({"shapes": ()} if op == "overhead" else {}))
    assert work.check() is None
    right = work.candidate.calls
    work.candidate.calls = [lambda call=call: _spoil(call()) for call in right]
    assert work.check()


def _spoil(y):
    y = y.clone()
    y.detach()[(0,) * y.dim()] += 1
    return y


def test_prepack_is_held_against_the_definition(monkeypatch):
    """An operator that is wrong in the same way each time is found."""
    original = torch.ops.inq.prepack
    monkeypatch.setattr(torch.ops.inq, "prepack", lambda *arguments: _spoil(original(*arguments)))
    assert "layouts.prepack" in work_of("prepack").check()


def test_the_check_of_a_partition():
    fmt = Format(5)
    original = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    original[2:4] = original[0:2]  # ties
    w, mask = original.clone(), torch.zeros(16, dtype=torch.uint8)
    n1 = reference.exponents(w, fmt)
    reference.quantize_with_mask_(w, mask, n1, reference.partition_threshold(w, mask, None, 63), None, fmt)
    assert partition._wrong(w, original, mask, 63, fmt) is None
    assert "expected 64 frozen weights, got 63" in partition._wrong(w, original, mask, 64, fmt)
    moved = w.clone()
    moved.view(-1)[5] += 1
    assert "other values" in partition._wrong(moved, original, mask, 63, fmt)
    held = reference.unpack_bits(mask, (128,))
    size = original.view(-1).abs()
    for least in (size[held].min(), size[held].max()):
        # Instead of one that is frozen, the first or the last one that is not.
        for other in (int((~held).nonzero()[0]), int((~held).nonzero()[-1])):
            changed = held.clone()
            changed[int((held & (size == least)).nonzero()[-1])], changed[other] = False, True
            new = torch.where(changed.view(8, 16), reference.quantize(original, n1, fmt), original)
            assert "although one of" in partition._wrong(new, original, reference.pack_bits(changed), 63, fmt)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_the_exponents_beside_ours(bits):
    for seed, scale in enumerate((1.0, 1e-3, 700.0, 2.0**-126)):
        w = torch.randn(64, 40, generator=torch.Generator().manual_seed(seed)) * scale
        w[seed] = 0
        w[0, 0] *= 30  # so that the rules differ
        for rule in ("max", "mse"):
            fmt = Format(bits, exponent=rule)
            assert partition._exponent(w.view(-1), fmt) == int(reference.exponents(w, fmt)[0, 0])


@pytest.mark.parametrize("rule", ["max", "mse"])
def test_topk_does_the_same(rule):
    w = torch.randn(64, 40, generator=torch.Generator().manual_seed(0))
    fmt, mine, theirs = Format(5, exponent=rule), w.clone(), w.clone()
    mask, frozen = torch.zeros(320, dtype=torch.uint8), torch.zeros(2560, dtype=torch.bool)
    n1, threshold = reference.exponents(w, fmt), reference.partition_threshold(w, mask, None, 2000)
    reference.quantize_with_mask_(mine, mask, n1, threshold, None, fmt)
    partition._with_topk(theirs, frozen, 2000, fmt)
    assert torch.equal(mine, theirs)
    assert torch.equal(reference.pack_bits(frozen), mask)


@pytest.mark.parametrize("op", ["masked_adamw", "masked_sgd"])
@pytest.mark.parametrize("call", [0, 1], ids=["operator", "optimizer"])
def test_the_check_of_a_step(op, call, monkeypatch):
    assert work_of(op, call).check() is None

    def unmasked(op, state):
        return optim._optimizer_step(op, state, optim._TORCH[op][0])

    monkeypatch.setattr(optim, "_candidate", unmasked)
    if call == 0:
        step, right = optim._step, getattr(reference, f"{op}_")

        def fake(op, state, function, is_first=True):
            return step(op, state, function, is_first) if function is right else unmasked(op, state)

        monkeypatch.setattr(optim, "_step", fake)
    assert "frozen weights moved" in work_of(op, call).check()


@pytest.fixture
def wrong_linear(monkeypatch):
    """4-bit products are wrong; others are not."""
    build = linear._linear

    def wrong(context, k, n, bits, dtype, m):
        work = build(context, k, n, bits, dtype, m)
        if bits == 4:
            work.candidate.calls = [lambda call=call: call() * 1.05 for call in work.candidate.calls]
        return work

    monkeypatch.setattr(linear, "_linear", wrong)


def test_a_red_check_gets_no_speed(wrong_linear, tmp_path, capsys):
    assert run(tmp_path, "--op", "linear", *TINY) == 1
    captured = capsys.readouterr()
    red = [line for line in captured.out.splitlines() if "4-bit" in line]
    assert len(red) == 2
    assert all("RED" in line and "µs" not in line and "×" not in line for line in red)
    assert "4-bit" in captured.err
    assert "is red: expected at most twice the error of the dense product" in captured.err
    rows = rows_of(results_of(tmp_path))
    assert [row["params"]["bits"] for row in rows] == [4, 4, 5, 5]
    assert all("time" not in row and not row["baselines"] for row in rows[:2])
    assert all("time" in row and row["error"] is None for row in rows[2:])


def test_a_candidate_that_raises_is_red(monkeypatch, tmp_path, capsys):
    def broken(*arguments):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(linear, "_linear", broken)
    assert run(tmp_path, "--op", "linear", *TINY, "--no-plots") == 1
    assert "RuntimeError: no such kernel" in capsys.readouterr().err


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """All operators once on tiny shapes."""
    out = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "last_level_cache", lambda: CACHE)
        patch.setattr(shapes, "RESNET50_QUICK", ((3, 8, 3, 2, 9),))
        assert run(out, "--quick", *TINY) == 0
        assert run(out / "rest", "--quick", *TINY[2:], "--op", "conv2d", "conv2d_dx", "overhead", "--no-plots") == 0
    return out


def test_results(tiny):
    results = results_of(tiny)
    assert results["schema"] == report.SCHEMA
    assert {"created", "seconds", "arguments", "software", "sections"} <= results.keys()
    assert {"torch", "inq_kernels", "commit", "python", "numpy"} <= results["software"].keys()
    (section,) = results["sections"]
    assert section["isa"] == "native"
    assert {"cpu", "cores", "threads", "flags", "isa", "cache_bytes"} <= section["machine"].keys()
    assert section["ceilings"]["copy_gb_s"] > 0
    rows = rows_of(results) + rows_of(results_of(tiny / "rest"))
    assert {row["op"] for row in rows} == set(OPS)
    for row in rows:
        assert row["error"] is None
        assert row["backend"] in ("cpu", "reference")
        assert row["bytes"] > 0
        assert 0 < row["time"]["p10_us"] <= row["time"]["median_us"] <= row["time"]["p90_us"]
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["time"]["median_us"] / 1e3)
        if row["flops"]:
            assert row["gflop_s"] == pytest.approx(row["flops"] / row["time"]["median_us"] / 1e3)
        assert row["baselines"]
        for baseline in row["baselines"]:
            assert baseline.get("reason") or baseline["low"] <= baseline["ratio"] <= baseline["high"]
    product = next(row for row in rows if row["op"] == "linear")
    names = ["dense bfloat16", "dense float32", "int4 g128", "dynamic int8"]
    assert [b["name"] for b in product["baselines"]] == names
    # 64 columns are no whole group of torch's int4, which must be said instead of left out.
    assert "reason" in product["baselines"][2]
    assert report.read(tiny / "results.json") == results


def test_results_name_no_path_and_no_host(tiny):
    text = (tiny / "results.json").read_text()
    for private in (__import__("platform").node(), str(tiny.parent), __import__("sys").prefix):
        assert len(private) < 5 or private not in text


def test_pictures(tiny):
    found = {path.name for path in tiny.iterdir() if path.suffix in (".png", ".svg")}
    backend = rows_of(results_of(tiny))[0]["backend"]
    end = "" if backend == "cpu" else f"-{backend}"
    assert found == {f"{stem}-native{end}.{kind}" for stem in ("time", "roofline") for kind in ("png", "svg")}
    for path in tiny.glob("*.png"):
        assert path.read_bytes()[:4] == b"\x89PNG"
    again = {path.name: path.read_bytes() for path in tiny.glob("*.svg")}
    plots.draw(results_of(tiny), tiny)
    assert again == {path.name: path.read_bytes() for path in tiny.glob("*.svg")}


def test_missing_matplotlib_is_named(monkeypatch, tmp_path, capsys):
    from inq_kernels.bench import command

    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert run(tmp_path, "--op", "linear", *TINY) == 1
    assert "inq_kernels[bench]" in capsys.readouterr().err


@pytest.mark.skipif(machine.lacks("avx2") is not None, reason=str(machine.lacks("avx2")))
def test_each_set_of_instructions_has_a_process(tmp_path, capfd):
    # The other process has this machine's caches: a shape of which they hold few copies.
    words = ("--shape", "64,8192", "--m", "1", "--bits", "4", "--seconds-per-case", "0.001", "--threads", "1")
    words += ("--backend", "reference")
    assert run(tmp_path, "--op", "linear", "linear_dx", *words, "--isa", "native,avx2", "--no-plots") == 0
    native, avx2 = results_of(tmp_path)["sections"]
    assert (native["isa"], avx2["isa"]) == ("native", "avx2")
    assert avx2["environment"] == machine.ISA_ENVIRONMENT["avx2"]
    assert avx2["machine"]["torch_capability"] == "AVX2"
    assert avx2["machine"]["isa"] == "avx2"
    assert {row["op"] for row in native["rows"]} == {"linear", "linear_dx"}
    # Without bfloat16 arithmetic, float32 is what is compared.
    assert {(row["op"], row["params"]["dtype"]) for row in avx2["rows"]} == {("linear", "float32")}
    assert "== avx2 ==" in capfd.readouterr().out


def test_each_operator_of_a_full_run_has_a_process_of_its_own(tmp_path):
    """Rows of all of them, in one section, beside the best of their ceilings."""
    words = ("--op", "pack", "masked_sgd", "--shape", "64,40", "--bits", "4", "--seconds-per-case", "0.001")
    assert run(tmp_path, *words, "--no-plots") == 0
    results = results_of(tmp_path)
    assert results["arguments"]["op"] == ["pack", "masked_sgd"]
    (section,) = results["sections"]
    assert {row["op"] for row in section["rows"]} == {"pack", "masked_sgd"}
    copy = section["ceilings"]["copy_gb_s"]
    assert copy != 10.0, "small_machine's: measured in this process"
    assert all(row["of_copy"] == pytest.approx(row["gb_s"] / copy) for row in section["rows"])


def test_joined_sections_keep_the_best_of_their_ceilings():
    def section(copy):
        row = {"op": "pack", "time": {}, "gb_s": 6.0, "product": "float32"}
        return {"isa": "native", "ceilings": {"copy_gb_s": copy, "product_gflop_s": {"float32": 1.0}}, "rows": [row]}

    joined = measure.joined([section(10.0) | {"left_out": 2}, section(12.0) | {"left_out": 1}])
    assert joined["ceilings"]["copy_gb_s"] == 12.0
    assert [row["of_copy"] for row in joined["rows"]] == [0.5, 0.5]
    assert joined["left_out"] == 3


def test_a_set_of_instructions_that_is_not_there_is_skipped(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_cpuinfo", lambda field: "sse2" if field == "flags" else None)
    assert run(tmp_path, "--op", "linear", *TINY, "--isa", "native,avx512", "--no-plots") == 0
    assert "avx512f" in results_of(tmp_path)["sections"][1]["skipped"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--shape", "64"), "expected K,N, for example 14336,4096, got '64'"),
        (("--isa", "sse"), "expected some of native,avx512,avx2, got 'sse'"),
        (("--m", "0"), "expected more than 0, got 0"),
        (("--seconds-per-case", "inf"), "expected a finite number, got inf"),
        (("--seconds-per-case", "nan"), "expected more than 0, got nan"),
        (("--op", "nothing"), "invalid choice: 'nothing'"),
    ],
)
def test_arguments(words, message, capsys):
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


def test_no_case_is_an_error(tmp_path, capsys):
    assert run(tmp_path, "--op", "conv2d", "--shape", "64,64", "--no-plots") == 1
    assert "no case is like that" in capsys.readouterr().err


def test_compare(tiny, tmp_path, capsys):
    old, new = results_of(tiny), results_of(tiny)
    for row, factor in zip((r for r in rows_of(new) if r["op"] == "linear"), (1, 1e6, 1e-6), strict=False):
        first = row["baselines"][0]
        for field in ("ratio", "low", "high"):
            first[field] *= factor
        row["time"]["median_us"] /= factor
    extra = copy.deepcopy(rows_of(new)[0])
    extra["params"]["m"] = 999
    new["sections"][0]["rows"].append(extra)
    report.write(tmp_path / "old.json", old)
    report.write(tmp_path / "new.json", new)
    assert main(["bench", "--compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")]) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if " linear " in line]
    assert [line.split()[-1] for line in lines[:3]] == ["same", "faster", "slower"]
    assert "Only in the new (1):" in out
    assert "m=999" in out
    assert "machines differ" not in out
    new["sections"][0]["machine"]["cpu"] = "another"
    assert "machines differ" in compare.compare(old, new)


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 99}'])
def test_a_file_that_is_no_result(text, tmp_path, capsys):
    path = tmp_path / "no.json"
    path.write_text(text)
    assert main(["bench", "--compare", str(path), str(path)]) == 1
    assert "expected" in capsys.readouterr().err
    assert main(["bench", "--bars", str(path)]) == 1


@pytest.mark.parametrize(
    "sections",
    [5, [5], [{"rows": [{}]}], [{"isa": "native", "machine": {"isa": "amx"}, "rows": [{"op": "linear"}]}]],
)
def test_rows_that_are_none(sections, tmp_path, capsys):
    path = tmp_path / "no.json"
    path.write_text(json.dumps({"schema": report.SCHEMA, "sections": sections}))
    for words in (("--compare", str(path), str(path)), ("--bars", str(path))):
        assert main(["bench", *words]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"inq bench: {path}")
        assert "expected rows of inq bench" in line


def test_what_torch_was_built_with():
    built = machine._torch_built_with("PyTorch built with:\n  - GCC 13.3\n  - Intel(R) MKL-DNN v3.12.0 (Git Hash 8)\n")
    assert built == {"torch_compiler": "GCC 13.3", "mkl": None, "onednn": "Intel(R) MKL-DNN v3.12.0 (Git Hash 8)"}
    built = machine._torch_built_with("  - clang 15.0\n  - Intel(R) oneAPI Math Kernel Library Version 2024.2\n")
    assert (built["torch_compiler"], built["mkl"]) == (
        "clang 15.0",
        "Intel(R) oneAPI Math Kernel Library Version 2024.2",
    )


# --- bars -------------------------------------------------------------------------------------------------------------


def synthetic(isa="amx", bits=4, m=1, ratio=5.0, shape="14336x4096", **more):
    params = {"shape": shape, "m": m, "bits": bits, "dtype": "bfloat16"}
    baselines = [{"name": "dense bfloat16", "ratio": ratio, "median_us": 5.0}, {"name": "int4 g128", "reason": "none"}]
    row = {"op": "linear", "backend": "cpu", "params": params, "baselines": baselines, "error": None}
    row |= {"facts": {"bits_per_weight": 4.0}, "time": {"median_us": 1.0}, **more}
    return {"sections": [{"isa": "native", "machine": {"isa": isa}, "rows": [row]}]}


def status(results, start):
    (found,) = [b for b in bars.evaluate(results) if b["name"].startswith(start)]
    return found["status"].split(":")[0], found["value"]


def test_bars():
    name = "linear amx 4-bit M=1: dense"
    assert status(synthetic(), name) == ("pass", 5.0)
    assert status(synthetic(ratio=4.4), name) == ("fail", 4.4)
    assert status(synthetic(m=2), name) == ("open", None)
    assert status(synthetic(isa="avx512"), name) == ("open", None)
    assert status(synthetic(isa="avx512"), "linear avx512 4-bit M=1: dense") == ("pass", 5.0)
    assert status(synthetic(backend="reference"), name) == ("open", None)
    assert status(synthetic(error="wrong"), name) == ("fail", None)
    assert status(synthetic(m=2, error="wrong"), name) == ("open", None)
    # 5 bits and other shapes have 0.85 of it.
    assert status(synthetic(bits=5, ratio=3.9), "linear amx 5-bit M=1: dense") == ("pass", 3.9)
    assert status(synthetic(shape="8192x8192", ratio=3.9), "linear amx 4-bit M=1, worst other shape: dense") == (
        "pass",
        3.9,
    )
    # What torch's int4 could not do decides nothing.
    assert status(synthetic(), "linear amx 4-bit M=1: torch int4") == ("open", None)
    assert status(synthetic(isa="avx512", m=8, ratio=0.9), "linear avx512 4-bit, worst of the other M")[0] == "fail"
    assert status(synthetic(isa="avx512", m=8, bits=5, ratio=0.82), "linear avx512 5-bit, worst of the")[0] == "pass"
    int4 = {"shape": "8192x8192", "baselines": [{"name": "int4 g128", "ratio": 1.4}]}
    for bits, expected in ((4, "fail"), (5, "pass")):
        name = f"linear amx {bits}-bit M=1, worst other shape: torch int4"
        assert status(synthetic(bits=bits, **int4), name) == (expected, 1.4)
    for ratio_, expected in ((0.8, "fail"), (0.81, "pass")):
        avx2 = synthetic(isa="avx2", shape="8192x8192", m=16, baselines=[{"name": "dense float32", "ratio": ratio_}])
        avx2["sections"][0]["rows"][0]["params"]["dtype"] = "float32"
        assert status(avx2, "linear avx2 4-bit, worst other shape") == (expected, ratio_)


def test_the_worst_row_counts():
    results = synthetic(shape="8192x8192", ratio=9.0)
    results["sections"] += synthetic(shape="4096x4096", ratio=2.0)["sections"]
    assert status(results, "linear amx 4-bit M=1, worst other shape: dense") == ("fail", 2.0)
    assert next(b for b in bars.evaluate(results) if b["value"] == 2.0)["rows"] == 2
    assert status(synthetic(facts={"bits_per_weight": 4.2}), "linear 4-bit: memory in use") == ("fail", 4.2)


def other(op, baselines=(), **more):
    row = {"op": op, "backend": "cpu", "error": None, "facts": {}, "baselines": list(baselines)}
    return {"sections": [{"isa": "native", "machine": {"isa": "avx512"}, "rows": [row | more]}]}


def test_bars_of_the_other_operators():
    facts = {"peak_extra_bytes": 100, "weight_bytes": 1000}
    params = {"shape": "VGG-16", "exponent": "max"}
    results = other("partition", [{"name": "torch topk", "ratio": 25.0}], params=params, facts=facts)
    results["sections"][0]["rows"][0]["time"] = {"median_us": 140_000.0}
    assert status(results, "partition VGG-16, max: time") == ("pass", 0.14)
    assert status(results, "partition VGG-16, max: torch topk") == ("pass", 25)
    assert status(results, "partition VGG-16, max: extra memory") == ("fail", 0.1)
    facts["peak_extra_bytes"] = "cannot be measured"
    assert status(results, "partition VGG-16, max: extra memory") == ("open", None)
    fused = [{"name": "torch fused, no mask", "ratio": 0.94}]
    assert (
        status(other("masked_adamw", fused, params={"shape": "ResNet-50", "call": "operator"}), "masked_adamw_:")[0]
        == "fail"
    )
    assert (
        status(other("masked_adamw", fused, params={"shape": "ResNet-50", "call": "optimizer"}), "masked_adamw_:")[0]
        == "open"
    )
    compiled = [{"name": "compiled operator", "ratio": 0.5, "median_us": 4.0}]
    row = {"params": {"grad": False}, "time": {"median_us": 99.0}}  # of the pairs with all baselines: not judged
    assert status(other("overhead", compiled, **row), "a call over the compiled operator, without") == ("pass", 4.0)
    pack = {"params": {"shape": "14336x4096", "dtype": "float32"}}
    copied = [{"name": "copy of as many bytes", "ratio": 0.4}]
    assert status(other("pack", copied, **pack), "pack:") == ("fail", 0.4)


def test_bars_exit_status(tmp_path, capsys):
    for ratio_, expected in ((5.0, 0), (1.0, 1)):
        report.write(tmp_path / "r.json", {"schema": report.SCHEMA, **synthetic(ratio=ratio_)})
        assert main(["bench", "--bars", str(tmp_path / "r.json")]) == expected
        out = capsys.readouterr().out
        assert "open: needs avx512" in out
        assert f"{expected} fail" in out.splitlines()[-1]


def test_bars_of_the_run_itself(tmp_path, capsys):
    assert run(tmp_path, "--op", "pack", *TINY, "--bits", "4", "--no-plots", "--bars") == 0
    assert "0 fail" in capsys.readouterr().out
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    assert parser.parse_args(["--bars", "--isa", "native,avx2"]).isa == ["native", "avx2"]


def test_thread_count():
    before = torch.get_num_threads()
    try:
        measure.thread_count(2)
        assert machine.describe()["threads"] == 2
        measure.thread_count(None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
