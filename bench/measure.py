"""Runs cases: the check first, then candidate and baselines in turn. A red check gets no time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch

from .. import backends
from . import machine
from .case import DTYPES, Case, Context, Op, Request, Work
from .registry import OPS
from .timing import CLOCKS, Clock, Runner, ratio, summary, time_pairs

# The first baseline is what the bars are about: it gets this share of a case's time.
_FIRST_SHARE = 0.5


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
) -> dict:
    """All cases of ``ops`` on this machine as it is now: a section of the results, ``emit`` called for each row.

    Args:
        requested: backends by name, or "" for the best there is for each operator.
    """
    names = {name for environment in machine.ISA_ENVIRONMENT.values() for name in environment}
    environment = {name: os.environ[name] for name in sorted(names) if name in os.environ}
    limits = machine.ceilings(min(1.0, seconds_per_case))
    clock, rows = CLOCKS[device](), []
    for request_by_name in requested:
        contexts: dict[str, Context] = {}
        for case in (case for op in ops for case in op.cases(request)):
            dtype = DTYPES.get(case.params["dtype"], torch.float32)
            name = (*OPS[case.op].covers, "linear")[0]
            backend = backends.select(name, request_by_name, backends.availability(), device, dtype)
            with _backend(backend):
                context = contexts.setdefault(backend, Context(backend))
                rows.append(run_case(case, context, clock, seconds_per_case, limits))
            emit(rows[-1])
    description = machine.describe()
    return {"isa": request.isa, "environment": environment, "machine": description, "ceilings": limits, "rows": rows}


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
        row["facts"] = work.facts
        row["error"] = work.check()
    except (RuntimeError, ValueError, TypeError, NotImplementedError, MemoryError) as error:
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if row["error"] is None:
        _measure(row, work, clock, seconds, limits)
    return row


def _measure(row: dict, work: Work, clock: Clock, seconds: float, limits: dict) -> None:
    runnable = [name for name, baseline in work.baselines.items() if isinstance(baseline, Runner)]
    all_samples: list[float] = []
    for name, baseline in work.baselines.items():
        if not isinstance(baseline, Runner):
            row["baselines"].append({"name": name, "reason": baseline})
            continue
        others = len(runnable) - 1
        share = 1.0 if not others else _FIRST_SHARE if name == runnable[0] else (1 - _FIRST_SHARE) / others
        mine, theirs = time_pairs(clock, work.candidate, baseline, share * seconds)
        all_samples += mine
        row["baselines"].append({"name": name, "bytes": baseline.bytes, **summary(theirs), **ratio(mine, theirs)})
    if not runnable:
        all_samples, _ = time_pairs(clock, work.candidate, None, seconds)
    row["time"] = summary(all_samples)
    us = row["time"]["median_us"]
    row |= {"bytes": work.candidate.bytes, "flops": work.flops}
    row["gb_s"] = work.candidate.bytes / us / 1e3
    row["of_copy"] = row["gb_s"] / limits["copy_gb_s"]
    if work.flops:
        row["gflop_s"] = work.flops / us / 1e3
        row["of_product"] = row["gflop_s"] / limits["product_gflop_s"].get(
            work.product, limits["product_gflop_s"]["float32"]
        )
    for baseline in row["baselines"]:
        if "median_us" in baseline:
            baseline["gb_s"] = baseline["bytes"] / baseline["median_us"] / 1e3
            if work.flops:
                baseline["gflop_s"] = work.flops / baseline["median_us"] / 1e3


def thread_count(count: int | None) -> None:
    """Use ``count`` threads, or as many as torch chose."""
    if count is not None:
        torch.set_num_threads(count)
