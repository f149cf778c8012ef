"""The speeds that must be reached (KERNELS.md), as data, and whether results reach them: pass, fail or open."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import partial

from .overhead import COMPILED
from .shapes import MAIN, MAIN_GPU
from .storage import COPY

_MAIN = f"{MAIN[0]}x{MAIN[1]}"
# M: at least this many times faster than dense bfloat16, 4 bits.
AMX = {1: 4.5, 2: 4.2, 4: 4.2, 8: 4.2, 16: 4.0, 32: 3.0, 64: 3.0, 256: 1.6, 1024: 1.15, 4096: 1.15}
AVX512 = {1: 3.5, 2: 3.0, 4: 1.9}
NOWHERE_BELOW = 0.95
INT4 = 1.9  # AMX, M = 1: at least this many times faster than torch's int4, 4 bits
FIVE_BITS = OTHER_SHAPES = 0.85
_MASKED = {"shape": "ResNet-50", "call": "operator"}
BITS_IN_USE = {4: 4.1, 5: 5.4}

Pick = Callable[[dict, dict], "float | None"]


@dataclass(frozen=True)
class Bar:
    """``value(section, row)`` is the number held against ``limit`` in every row where it is not None.

    The worst row counts. ``needs`` says what a machine or a run must have for the bar to be decided at all.
    """

    name: str
    limit: float
    value: Pick
    needs: str
    at_least: bool = True
    unit: str = "×"


def _baseline(row: dict, name: str, field: str = "ratio") -> float | None:
    return next((b[field] for b in row["baselines"] if b["name"] == name and field in b), None)


def _where(isa: str | None, op: str, value: Callable[[dict], float | None], **params) -> Pick:
    """``value`` of the rows of ``op`` with these params, in sections that ran with this set of instructions."""

    def pick(section: dict, row: dict) -> float | None:
        here = section["machine"]["isa"]
        wrong_isa = here == "cuda" if isa is None else here != isa
        if wrong_isa or row["op"] != op or row["backend"] == "reference":
            return None
        own = row["params"]
        if any(not (v(own.get(k)) if callable(v) else own.get(k) == v) for k, v in params.items()):
            return None
        return value(row)

    return pick


def _ratio(name: str) -> Callable[[dict], float | None]:
    return lambda row: _baseline(row, name)


def _other(shape: object) -> bool:
    return shape != _MAIN


def _not_among(known: Container[int], m: int) -> bool:
    return m not in known


def _linear_bars() -> Iterator[Bar]:
    dense, bf16 = _ratio("dense bfloat16"), "bfloat16"
    for isa, table in (("amx", AMX), ("avx512", AVX512)):
        for bits, factor in ((4, 1.0), (5, FIVE_BITS)):
            for m, limit in table.items():
                pick = _where(isa, "linear", dense, shape=_MAIN, m=m, bits=bits, dtype=bf16)
                yield Bar(f"linear {isa} {bits}-bit M={m}: dense bfloat16", limit * factor, pick, f"{isa}, {_MAIN}")
            if isa == "amx":
                pick = _where(isa, "linear", _ratio("int4 g128"), shape=_MAIN, m=1, bits=bits, dtype=bf16)
                yield Bar(f"linear {isa} {bits}-bit M=1: torch int4", INT4 * factor, pick, f"{isa}, {_MAIN}")
    for isa, table in (("amx", AMX), ("avx512", AVX512)):
        for bits, factor in ((4, 1.0), (5, FIVE_BITS)):
            for m, limit in table.items():
                pick = _where(isa, "linear", dense, shape=_other, m=m, bits=bits, dtype=bf16)
                name = f"linear {isa} {bits}-bit M={m}, worst other shape: dense bfloat16"
                yield Bar(name, limit * factor * OTHER_SHAPES, pick, f"{isa}, other shapes")
            if isa == "amx":
                pick = _where(isa, "linear", _ratio("int4 g128"), shape=_other, m=1, bits=bits, dtype=bf16)
                name = f"linear {isa} {bits}-bit M=1, worst other shape: torch int4"
                yield Bar(name, INT4 * factor * OTHER_SHAPES, pick, f"{isa}, other shapes")
    for isa, dtype, beyond in (("avx512", bf16, AVX512), ("avx2", "float32", {})):
        for bits, factor in ((4, 1.0), (5, FIVE_BITS)):
            where = {"dtype": dtype, "m": partial(_not_among, beyond), "bits": bits}
            limit, name = NOWHERE_BELOW * factor, f"linear {isa} {bits}-bit, worst"
            pick = _where(isa, "linear", _ratio(f"dense {dtype}"), shape=_other, **where)
            yield Bar(f"{name} other shape and M: dense {dtype}", limit * OTHER_SHAPES, pick, f"{isa}, other shapes")
            pick = _where(isa, "linear", _ratio(f"dense {dtype}"), shape=_MAIN, **where)
            yield Bar(f"{name} of the other M: dense {dtype}", limit, pick, f"{isa}, {_MAIN}")
    for bits, limit in BITS_IN_USE.items():
        pick = _where(None, "linear", lambda row: row["facts"].get("bits_per_weight"), bits=bits)
        yield Bar(f"linear {bits}-bit: memory in use", limit, pick, "a compiled backend", at_least=False, unit="bits")


def _other_bars() -> Iterator[Bar]:
    for shape in ("VGG-16", "one tensor"):
        for rule, limit in (("max", 0.15), ("mse", 0.2)):
            where = {"shape": shape, "exponent": rule}
            name, needs = f"partition {shape}, {rule}", "a full run"
            pick = _where(None, "partition", lambda row: row["time"]["median_us"] / 1e6, **where)
            yield Bar(f"{name}: time", limit, pick, needs, at_least=False, unit="s")
            yield Bar(f"{name}: torch topk", 20, _where(None, "partition", _ratio("torch topk"), **where), needs)
            pick = _where(None, "partition", _memory_share, **where)
            yield Bar(f"{name}: extra memory, of the weights", 1 / 16, pick, needs, at_least=False, unit="")
    for op in ("masked_adamw", "masked_sgd"):
        pick = _where(None, op, lambda row: _inverse(_baseline(row, "torch fused, no mask")), **_MASKED)
        yield Bar(f"{op}_: time, of torch's fused operator without a mask", 1.05, pick, "a full run", at_least=False)
    for op in ("pack", "unpack"):
        # Into memory that exists, as a copy goes; new memory has a row of its own, beside a clone.
        pick = _where(None, op, _ratio(COPY), shape=_MAIN, dtype="float32", out=lambda out: out != "new")
        yield Bar(f"{op}: of the copy bandwidth", 0.5, pick, "a full run", unit="")
    for grad, limit in ((False, 5), (True, 10)):
        pick = _where(None, "overhead", _over_compiled, grad=grad)
        text = "with gradient" if grad else "without gradient"
        name = f"a call over the compiled operator, {text}"
        yield Bar(name, limit, pick, "a compiled operator", at_least=False, unit="µs")


def _inverse(value: float | None) -> float | None:
    return None if value is None else 1 / value


def _memory_share(row: dict) -> float | None:
    extra = row["facts"]["peak_extra_bytes"]
    return extra / row["facts"]["weight_bytes"] if isinstance(extra, int) else None


def _over_compiled(row: dict) -> float | None:
    """µs of a call beyond the compiled operator, both medians of the same pairs: the call's is median / ratio."""
    alone, ratio = (_baseline(row, COMPILED, field) for field in ("median_us", "ratio"))
    return None if alone is None or ratio is None else alone / ratio - alone


# On an H200, 4 bits: M, at least this many times faster than cuBLAS in bfloat16 (KERNELS.md, "must").
H200_CUBLAS = {1: 2.8, 2: 2.8, 4: 2.8, 8: 2.8, 64: 3.0} | dict.fromkeys((256, 512, 1024, 2048, 4096, 8192), 0.97)
H200_FP8 = dict.fromkeys((2048, 4096, 8192), 1.7)
H200_PEERS = ("_weight_int4pack_mm", "Humming", "GemLite", "bitsandbytes NF4")


def _h200(op: str, value: Callable[[dict], float | None], **params) -> Pick:
    """``_where`` on an H200 alone: the bars are stated for one."""
    on_cuda = _where("cuda", op, value, **params)
    return lambda section, row: on_cuda(section, row) if "H200" in section["machine"].get("gpu", "") else None


def _h200_bars() -> Iterator[Bar]:
    shape, needs = f"{MAIN_GPU[0]}x{MAIN_GPU[1]}", "an H200"
    where = {"shape": shape, "bits": 4, "dtype": "bfloat16"}
    for m, limit in H200_CUBLAS.items():
        pick = _h200("linear", _ratio("cuBLAS bfloat16"), m=m, **where)
        yield Bar(f"H200 linear 4-bit M={m}: cuBLAS bfloat16", limit, pick, needs)
    for m in (1, 2, 4, 8):
        pick = _h200("linear", lambda row: row.get("of_copy"), m=m, **where)
        yield Bar(f"H200 linear 4-bit M={m}: of the copy bandwidth", 0.65, pick, needs, unit="")
        for peer in H200_PEERS:
            pick = _h200("linear", _ratio(peer), m=m, **where)
            yield Bar(f"H200 linear 4-bit M={m}: {peer}", 1.0, pick, f"{needs} with {peer}")
    for m, limit in H200_FP8.items():
        pick = _h200("linear_fp8", _ratio("cuBLAS bfloat16"), m=m, **where)
        yield Bar(f"H200 linear_fp8 4-bit M={m}: cuBLAS bfloat16", limit, pick, needs)
    for rule in ("max", "mse"):
        pick = _h200("partition", lambda row: row["time"]["median_us"] / 1e3, shape="VGG-16", exponent=rule)
        yield Bar(f"H200 partition VGG-16, {rule}: time", 1.0, pick, needs, at_least=False, unit="ms")
    for op in ("masked_adamw", "masked_sgd"):
        pick = _h200(op, lambda row: _inverse(_baseline(row, "torch fused, no mask")), shape="ResNet-50")
        yield Bar(f"H200 {op}: time, of torch's fused step without a mask", 1.02, pick, needs, at_least=False)


BARS = (*_linear_bars(), *_other_bars(), *_h200_bars())


def evaluate(results: dict, bars: tuple[Bar, ...] = BARS) -> list[dict]:
    """For each bar its name, limit, unit, ``value`` (the worst), ``rows`` (how many rows had a value) and ``status``:
    pass, fail, or open (nothing to decide it by).

    A red row fails the bars it belongs to, as far as its values can still be asked for, and is never left out silently.
    """
    found = []
    for bar in bars:
        values, red = [], False
        for section in results["sections"]:
            for row in section.get("rows", ()):
                if row["error"] is None:
                    value = bar.value(section, row)
                    values += [] if value is None else [value]
                else:
                    red |= _red_belongs(bar, section, row)
        worst = (min if bar.at_least else max)(values) if values else None
        if red:
            status = "fail: a check is red"
        elif worst is None:
            status = f"open: needs {bar.needs}"
        else:
            status = "pass" if (worst >= bar.limit if bar.at_least else worst <= bar.limit) else "fail"
        row = {"name": bar.name, "limit": bar.limit, "unit": bar.unit, "value": worst, "rows": len(values)}
        found.append(row | {"status": status})
    return found


class _Anything(dict):
    """Facts, times and baselines of a red row: every question has an answer, to see whether the row is asked at all."""

    def __missing__(self, name: str) -> float:
        return 1.0

    def get(self, name: str, default: object = None) -> float:
        return 1.0


def _red_belongs(bar: Bar, section: dict, row: dict) -> bool:
    names = ("dense bfloat16", "dense float32", "int4 g128", "torch topk", "torch fused, no mask", COMPILED, COPY)
    names += ("cuBLAS bfloat16", *H200_PEERS)
    baselines = [{"name": name, "ratio": 1.0, "median_us": 1.0} for name in names]
    as_if = {**row, "of_copy": 1.0, "facts": _Anything(), "time": _Anything(), "baselines": baselines}
    as_if["facts"]["peak_extra_bytes"] = 1
    return bar.value(section, as_if) is not None
