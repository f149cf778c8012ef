"""Timing two ways of doing one thing in turn, and what the samples say: medians, quantiles, the ratio's interval."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import compress
from typing import Protocol

import numpy as np
import torch

from .neighbours import Probe

# A sample shorter than this is mostly the clock and the loop: short calls are timed several at a time.
MIN_SAMPLE_S = 200e-6
# A first call longer than this needs no second one to know what a call costs.
SLOW_S = 1.0
# Before it is timed a runner goes round its copies, for as long as this: the first reading of a copy takes longer than
# the next, up to a third on a virtual machine.
ROUND_S = 0.15
# Ratios whose 95 % interval is wider than this part of them are measured again.
UNCERTAIN, PATIENCE = 0.15, 4
# While there are not as many quiet pairs as there should be at least, more rounds.
PATIENCE_QUIET = 10
MIN_PAIRS, MAX_PAIRS = 7, 400
# Samples of a pair longer than this together are all kept: what was before and after says little about what was within.
PROBED_S = 0.25
# With fewer quiet pairs than this, all are kept.
MIN_QUIET = 3
RESAMPLES = 2000


@dataclass(eq=False)
class Runner:
    """One way of doing a thing. ``calls`` do the same on different copies of the data, and are taken in turn.

    Attributes:
        calls: enough copies that no cache holds them all (``machine.copies``), or one call where nothing is reused.
        reset: puts back what a call changed; runs before every sample, untimed.
        bytes: moved by one call: each operand read once, each result written once.
    """

    calls: Sequence[Callable[[], object]]
    bytes: int
    reset: Callable[[], None] | None = None
    _next: int = field(default=0, init=False)

    def run(self, repeat: int = 1) -> object:
        """``repeat`` calls on the copies whose turn it is; the last one's result."""
        calls, at, count = self.calls, self._next, len(self.calls)
        for _ in range(repeat):
            result = calls[at]()
            at = at + 1 if at + 1 < count else 0
        self._next = at
        return result


class Clock(Protocol):
    """How a device's time is taken."""

    def seconds(self, runner: Runner, repeat: int) -> float:
        """The time of one call, from ``repeat`` calls in a row or more."""

    def together(self, runners: Sequence[Runner]) -> Clock:
        """The clock that times all of these in the same way, so that their times can be compared."""

    def how(self) -> str | None:
        """How it times, for the report; None where there is one way only."""

    def probe(self) -> float:
        """Something that is larger while others use what is timed."""

    def quiet(self, probe: float) -> bool:
        """Whether a probe says that nobody did."""


class CpuClock:
    """The wall clock around calls that return when they are done."""

    def __init__(self, calibrate_s: float = 0.0):
        self._probe = Probe(calibrate_s)

    def seconds(self, runner: Runner, repeat: int) -> float:
        if runner.reset is not None:
            runner.reset()
        begin = time.perf_counter()
        runner.run(repeat)
        return (time.perf_counter() - begin) / repeat

    def together(self, runners: Sequence[Runner]) -> Clock:
        return self

    def how(self) -> None:
        return None

    def probe(self) -> float:
        return self._probe.seconds()

    def quiet(self, probe: float) -> bool:
        return self._probe.quiet(probe)


def _in_turn(calls: Sequence[Callable[[], object]], count: int) -> None:
    """``Runner.run`` from the first copy on, holding no runner: a graph must not keep alive what it is kept for."""
    for i in range(count):
        calls[i % len(calls)]()


class CudaDevice:
    """What the CUDA clock needs of a GPU. Tests have another."""

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        """What repeats the launches of ``run`` without the host's part in them. RuntimeError where that cannot be."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()  # kernels are compiled, and libraries take their workspaces, outside the graph
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def elapsed(self, run: Callable[[], object]) -> float:
        """Seconds of the device from before ``run`` to after it."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


class CudaClock:
    """The device's time between two events: around a CUDA graph's replay, or around calls from Python ("eager").

    A graph goes round all copies of the data, however short a sample may be: fewer would stay in the cache. Eager
    times of short calls are those of Python and of launching, which is what they are asked for.
    """

    def __init__(self, device: CudaDevice | None = None, graphs: bool = True):
        self._device = device or CudaDevice()
        self._with_graphs = graphs
        self._graphs: weakref.WeakKeyDictionary[Runner, dict] = weakref.WeakKeyDictionary()
        self.refused: str | None = None  # why there are no graphs although they were wanted

    def seconds(self, runner: Runner, repeat: int) -> float:
        if runner.reset is not None:
            runner.reset()
            count = 1
        else:
            count = -(-repeat // len(runner.calls)) * len(runner.calls)
        run = self._graph(runner, count) if self._with_graphs else lambda: runner.run(count)
        return self._device.elapsed(run) / count

    def _graph(self, runner: Runner, count: int) -> Callable[[], object]:
        kept = self._graphs.setdefault(runner, {})
        if count not in kept:
            kept[count] = self._device.capture(partial(_in_turn, runner.calls, count))
            if runner.reset is not None:  # capturing has run it
                runner.reset()
        return kept[count]

    def together(self, runners: Sequence[Runner]) -> CudaClock:
        """This one, or an eager one where a runner cannot be captured: graphs beside calls would compare launching."""
        if not self._with_graphs:
            return self
        try:
            for runner in runners:
                if runner.reset is not None:
                    runner.reset()
                self._graph(runner, 1 if runner.reset is not None else len(runner.calls))
        except RuntimeError as error:
            eager = self.eager()
            eager.refused = " ".join(str(error).split())[:100]
            return eager
        return self

    def eager(self) -> CudaClock:
        """The same without graphs."""
        return CudaClock(self._device, graphs=False)

    def how(self) -> str:
        if self._with_graphs:
            return "CUDA graph"
        return f"eager: {self.refused}" if self.refused else "eager"

    def probe(self) -> float:
        return 0.0

    def quiet(self, probe: float) -> bool:
        return True  # the device has one user


CLOCKS: dict[str, Callable[[float], Clock]] = {"cpu": CpuClock, "cuda": lambda calibrate_s: CudaClock()}


def warm_up(clock: Clock, runner: Runner) -> tuple[float, int]:
    """Seconds a call once warm, roughly, and how many calls make a sample."""
    if (seconds := clock.seconds(runner, 1)) > SLOW_S:
        return seconds, 1
    repeat, seconds = 1, clock.seconds(runner, 1)
    while runner.reset is None and seconds * repeat < MIN_SAMPLE_S and repeat < 1 << 12:
        repeat = min(math.ceil(1.2 * MIN_SAMPLE_S / max(seconds, 1e-8)), 1 << 12, repeat * 16)
        seconds = clock.seconds(runner, repeat)
    if runner.reset is None and (calls := min(len(runner.calls), int(ROUND_S / max(seconds, 1e-8)))):
        runner.run(calls)
    return seconds, repeat


@dataclass(frozen=True)
class Pairs:
    """Seconds a call of two runners, pair by pair.

    Attributes:
        mine, theirs: of the first and of the second (empty without one): quiet pairs, if there are enough, or else all.
        taken: how many pairs there were.
        busy: that they are all although hardly any was quiet.
    """

    mine: list[float]
    theirs: list[float]
    taken: int
    busy: bool

    def counts(self) -> dict:
        """For the results, beside ``ratio``."""
        return {"taken": self.taken} | ({"busy": True} if self.busy else {})


def time_pairs(
    clock: Clock, a: Runner, b: Runner | None, budget_s: float, patience_quiet: int = PATIENCE_QUIET
) -> Pairs:
    """Samples of ``a`` and of ``b``, one each in turn, so that a busy machine slows both.

    The one that begins changes from pair to pair. As many pairs as fit into ``budget_s`` seconds, from ``MIN_PAIRS`` to
    ``MAX_PAIRS``; three where one pair alone exceeds the budget. Pairs during which others used the machine are set
    aside (see neighbours.py). Where the rest leave the ratio uncertain, as many again, up to ``PATIENCE`` times; where
    they are too few, up to ``patience_quiet`` times.
    """
    runners = [a] if b is None else [a, b]
    estimates = [warm_up(clock, runner) for runner in runners]
    pair = sum(seconds * repeat for seconds, repeat in estimates)
    least = 3 if pair > budget_s else MIN_PAIRS
    count = min(max(int(budget_s / pair), least), MAX_PAIRS)
    samples: list[list[float]] = [[] for _ in runners]
    probes: list[float] = []
    for rounds in range(1, patience_quiet + 1):
        deadline = time.perf_counter() + budget_s
        for turn in range(count):
            # Untimed resets may take longer than what is timed.
            if turn >= least and time.perf_counter() > deadline:
                break
            probe = clock.probe()
            for i in range(len(runners))[:: -1 if turn % 2 else 1]:
                samples[i].append(clock.seconds(runners[i], estimates[i][1]))
                probe = max(probe, clock.probe())
            probes.append(probe)
        quiet = [pair > PROBED_S or clock.quiet(probe) for probe in probes]
        busy = sum(quiet) < MIN_QUIET
        kept = samples if busy else [list(compress(each, quiet)) for each in samples]
        if sum(quiet) >= least and (b is None or rounds >= PATIENCE or not _uncertain(ratio(*kept))):
            break
    return Pairs(kept[0], kept[1] if b is not None else [], len(probes), busy)


def _uncertain(found: dict) -> bool:
    return found["high"] - found["low"] > UNCERTAIN * found["ratio"]


def summary(samples: Sequence[float]) -> dict:
    """Median and quantiles of seconds, in µs."""
    low, median, high = (float(q) * 1e6 for q in np.quantile(samples, (0.1, 0.5, 0.9)))
    return {"samples": len(samples), "median_us": median, "p10_us": low, "p90_us": high}


def ratio(candidate: Sequence[float], baseline: Sequence[float], seed: int = 0) -> dict:
    """How many times faster the candidate is: the ratio of the medians, and its 95 % interval.

    The interval is the bootstrap's: pairs are drawn again with replacement, which keeps what slowed both in one pair.
    """
    a, b = np.asarray(candidate), np.asarray(baseline)
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"ratio: expected as many samples of both, got {a.size} and {b.size}")
    drawn = np.random.default_rng(seed).integers(a.size, size=(RESAMPLES, a.size))
    ratios = np.median(b[drawn], axis=1) / np.median(a[drawn], axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return {"ratio": float(np.median(b) / np.median(a)), "low": float(low), "high": float(high), "pairs": int(a.size)}
