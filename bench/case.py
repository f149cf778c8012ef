"""What a benchmark is made of: a request (what the user asks for), cases, and the work of one case."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from . import gpu, machine
from .timing import Runner

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Request:
    """Which cases are wanted. Empty tuples stand for the grid's own; ``isa`` is "native" or what the machine is held
    down to, where only products are repeated."""

    quick: bool = False
    isa: str = "native"
    shapes: tuple[tuple[int, int], ...] = ()
    ms: tuple[int, ...] = ()
    bits: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    device: str = "cpu"


@dataclass
class Work:
    """A case with its data: what ``run`` checks and times.

    Attributes:
        candidate: our operator.
        baselines: other ways of doing the same by name; a string is the reason why one cannot run here.
        check: None if the candidate's results are right, else what is wrong.
        flops: of one call (2 a multiply-add); 0 where the operator only moves data.
        product: the dtype whose product ceiling the flops are held against.
        facts: numbers that are not times, for example bits a weight.
        longer: how many times the seconds of other cases it gets, where a bar is within a few percent of the ratio.
    """

    candidate: Runner
    baselines: dict[str, Runner | str]
    check: Callable[[], str | None]
    flops: int = 0
    product: str = "float32"
    facts: dict[str, object] = field(default_factory=dict)
    longer: float = 1.0


@dataclass(frozen=True)
class Case:
    """One line of the report. ``params`` name it, ``group`` says with which others it shares its data."""

    op: str
    params: dict[str, object]
    build: Callable[[Context], Work]
    group: Hashable = None


@dataclass(frozen=True)
class Op:
    """A benchmark: its name, the operators of ``torch.ops.inq`` that it covers, and its cases for a request."""

    name: str
    covers: tuple[str, ...]
    cases: Callable[[Request], Iterator[Case]]


class Context:
    """Where cases of one group share their data, and which backend they run, on which type of device."""

    def __init__(self, backend: str, device: str = "cpu"):
        self.backend, self.device = backend, device
        self._group: Hashable = None
        self._kept: dict[Hashable, object] = {}
        self.inside_cache = False  # whether copies since ``enter`` fit into the cache together

    def enter(self, group: Hashable) -> None:
        """Forget the data of another group."""
        self.inside_cache = False
        if group != self._group or group is None:
            self._kept.clear()
        self._group = group

    def get(self, key: Hashable, make: Callable[[], object]):
        """What ``make`` returned when this group first asked for ``key``."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def rotation(self, size: int) -> int:
        """How many copies of ``size`` bytes to go round: they exceed the caches, unless it would take too many."""
        if self.device == "cuda":
            count, cache = gpu.copies(size), gpu.cache_bytes()
        else:
            count, cache = machine.copies(size), machine.last_level_cache()
        self.inside_cache |= count * size <= cache
        return count

    def copies(self, key: Hashable, make: Callable[[], Tensor]) -> list[Tensor]:
        """A tensor and as many clones of it as ``rotation`` says."""
        first = self.get((key, "first"), make)
        count = self.rotation(nbytes(first))
        return self.get(key, lambda: [first, *(first.clone() for _ in range(count - 1))])


def attempt(build: Callable[[], Runner]) -> Runner | str:
    """``build()``, run once to see that it can; or the reason why not, which the report shows."""
    try:
        runner = build()
        runner.run()
    except (RuntimeError, NotImplementedError, AttributeError, ImportError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return runner


def runner(function: Callable, arguments: list[tuple], moved: int) -> Runner:
    """``function`` on each of ``arguments`` in turn."""
    return Runner([partial(function, *each) for each in arguments], moved)


def nbytes(*tensors: Tensor) -> int:
    """Bytes of tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors)


def normal(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> Tensor:
    """Normal values of ``dtype``."""
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def as_good_as_dense(y: Tensor, exact: Tensor, dense: Tensor, unit: Tensor | float = 1.0) -> str | None:
    """The numeric contract of products: against ``exact`` (float64) the error is at most twice that of torch's product
    in y's dtype plus one rounding. ``unit``: the size of an output channel's weights, broadcast; errors are compared in
    it. None, or what is wrong."""
    finfo = torch.finfo(y.dtype)
    rounding = (exact.abs() * finfo.eps / 2).clamp(min=finfo.smallest_normal * finfo.eps / 2)
    error = (y.double() - exact).abs()
    allowed = 2 * ((dense.double() - exact).abs() / unit).amax() * unit + rounding
    wrong = int((~(error <= allowed)).sum())  # NaN is wrong too
    if wrong == 0:
        return None
    worst = float((error - allowed).nan_to_num(torch.inf).max())
    return f"expected at most twice the error of the dense product; {wrong} of {y.numel()} exceed it, by up to {worst}"


def some(count: int, limit: int = 64) -> Tensor:
    """Indices to check of ``count``: all up to ``limit``, else the first and last ones and random others, sorted."""
    if count <= limit:
        return torch.arange(count)
    edge = limit // 4
    middle = torch.randint(edge, count - edge, (limit - 2 * edge,), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.arange(edge), middle.unique(), torch.arange(count - edge, count)])
