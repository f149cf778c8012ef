"""Runs cases: the check first, then candidate and baselines in turn. A red check gets no time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch

from .. import backends
from . import gpu, machine
from .case import DTYPES, Case, Context, Op, Request, Work
from .registry import ALL
from .timing import CLOCKS, PATIENCE, PATIENCE_QUIET, Clock, CudaClock, Runner, ratio, summary, time_pairs

# The first baseline is what the bars are about: it gets this share of a case's time.
_FIRST_SHARE = 0.5
# Up to this many rows a call's launches may take longer than its kernels: timed from Python as well.
EAGER_M = 16


@contextmanager
def _backend(name: str):
    """Operators without an argument for it take their backend from the environment."""
    before = os.environ.get(backends.ENVIRONMENT)
    os.environ[backends.ENVIRONMENT] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[backends.ENVIRONMENT]
        else:
            os.environ[backends.ENVIRONMENT] = before


def run_section(
    request: Request,
    ops: Iterable[Op],
    requested: Iterable[str],
    seconds_per_case: float,
    emit: Callable[[dict], None] = lambda row: None,
    device: str = "cpu",
    within: float | None = None,
) -> dict:
    """All cases of ``ops`` on this machine as it is now: a section of the results, ``emit`` called for each row.

    Args:
        requested: backends by name, or "" for the best there is for each operator.
        within: seconds after which no further case begins; the section says how many were left out.
    """
    names = {name for environment in machine.ISA_ENVIRONMENT.values() for name in environment}
    environment = {name: os.environ[name] for name in sorted(names) if name in os.environ}
    ceilings = gpu.ceilings if device == "cuda" else machine.ceilings
    limits = ceilings(min(1.0, seconds_per_case))
    clock, rows, left_out = CLOCKS[device](min(1.0, seconds_per_case)), [], 0
    deadline = None if within is None else time.monotonic() + within
    for request_by_name in requested:
        contexts: dict[str, Context] = {}
        for case in (case for op in ops for case in op.cases(request)):
            if deadline is not None and time.monotonic() > deadline:
                left_out += 1
                continue
            dtype = DTYPES.get(case.params["dtype"], torch.float32)
            name = (*ALL[case.op].covers, "linear")[0]
            backend = backends.select(name, request_by_name, backends.availability(), device, dtype)
            with _backend(backend):
                context = contexts.setdefault(backend, Context(backend, device))
                rows.append(run_case(case, context, clock, seconds_per_case, limits))
            emit(rows[-1])
    # A machine that was busy at the start may show at the end what it can do.
    limits = machine.better(limits, ceilings(min(1.0, seconds_per_case)))
    for row in rows:
        _shares(row, limits)
    description = machine.describe() | (gpu.describe() | {"isa": "cuda"} if device == "cuda" else {})
    isa = "cuda" if device == "cuda" else request.isa
    section = {"isa": isa, "environment": environment, "machine": description, "ceilings": limits, "rows": rows}
    return section | ({"left_out": left_out} if left_out else {})


def joined(sections: list[dict]) -> dict:
    """One section of those that processes of their own made; all rows beside the best of their ceilings."""
    limits = sections[0]["ceilings"]
    for section in sections[1:]:
        limits = machine.better(limits, section["ceilings"])
    rows = [row for section in sections for row in section["rows"]]
    for row in rows:
        _shares(row, limits)
    left_out = sum(section.get("left_out", 0) for section in sections)
    return sections[0] | {"ceilings": limits, "rows": rows} | ({"left_out": left_out} if left_out else {})


def run_case(case: Case, context: Context, clock: Clock, seconds: float, limits: dict) -> dict:
    """One row. ``error`` is None and there are times, or it says what is wrong and there are none."""
    row = {
        "op": case.op,
        "params": case.params,
        "backend": context.backend,
        "error": None,
        "facts": {},
        "baselines": [],
    }
    try:
        context.enter(case.group)
        work = case.build(context)
        row["facts"] = work.facts | ({"rotation": "inside the cache"} if context.inside_cache else {})
        row["error"] = work.check()
        if row["error"] is None:
            row |= _measure(work, clock, seconds * work.longer)
            if isinstance(clock, CudaClock) and case.params.get("m", EAGER_M + 1) <= EAGER_M:
                row["eager"] = _measure(work, clock.eager(), seconds / 4)
            _shares(row, limits)
    # Whatever a compiler or a driver raises (Triton's errors are nobody else's): other cases have their rows still.
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return row


def _measure(work: Work, clock: Clock, seconds: float) -> dict:
    """The times of a row: candidate against each baseline in turn."""
    baselines = []
    runnable = [name for name, baseline in work.baselines.items() if isinstance(baseline, Runner)]
    all_samples: list[float] = []
    for name, baseline in work.baselines.items():
        if not isinstance(baseline, Runner):
            baselines.append({"name": name, "reason": baseline})
            continue
        others = len(runnable) - 1
        share = 1.0 if not others else _FIRST_SHARE if name == runnable[0] else (1 - _FIRST_SHARE) / others
        clock_of_both = clock.together([work.candidate, baseline])
        patience = PATIENCE_QUIET if name == runnable[0] else PATIENCE
        pairs = time_pairs(clock_of_both, work.candidate, baseline, share * seconds, patience)
        all_samples += pairs.mine
        row = {"name": name, "bytes": baseline.bytes} | summary(pairs.theirs) | ratio(pairs.mine, pairs.theirs)
        baselines.append(row | pairs.counts() | _rates(pairs.theirs, baseline.bytes, work.flops) | _how(clock_of_both))
    if not runnable:
        all_samples = time_pairs(clock.together([work.candidate]), work.candidate, None, seconds).mine
    moved = work.candidate.bytes
    row = {"time": summary(all_samples), "bytes": moved, "flops": work.flops, "product": work.product}
    return row | _rates(all_samples, moved, work.flops) | {"baselines": baselines}


def _how(clock: Clock) -> dict:
    return {} if (how := clock.how()) is None else {"timing": how}


def _rates(samples: list[float], moved: int, flops: int) -> dict:
    us = summary(samples)["median_us"]
    return {"gb_s": moved / us / 1e3} | ({"gflop_s": flops / us / 1e3} if flops else {})


def _shares(row: dict, limits: dict) -> None:
    """What a row reaches of the ceilings."""
    if "time" in row:
        row["of_copy"] = row["gb_s"] / limits["copy_gb_s"]
    if "gflop_s" in row:
        products = limits["product_gflop_s"]
        row["of_product"] = row["gflop_s"] / products.get(row["product"], products["float32"])


def thread_count(count: int | None) -> None:
    """Use ``count`` threads, or as many as torch chose."""
    if count is not None:
        torch.set_num_threads(count)
