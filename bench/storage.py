"""``pack``, ``unpack``, ``prepack`` and ``unprepack``: codes in and out of the layouts, bound by memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .. import fragments, layouts, ops, reference, slices
from ..format import Format
from . import shapes
from .case import DTYPES, Case, Context, Op, Request, Work, attempt, nbytes, runner, some
from .timing import Runner
from .weights import RandomWeights

COPY = "copy of as many bytes"
# The plain torch implementation holds int64 temporaries of eight times the weights.
_SHAPE, _SHAPE_QUICK = shapes.MAIN, (4096, 1024)


def _cases(op: str):
    def cases(request: Request) -> Iterator[Case]:
        if request.isa != "native":
            return
        for k, n in request.shapes or (_SHAPE_QUICK if request.quick else _SHAPE,):
            for bits in request.bits or (4, 5):
                for dtype in request.dtypes or ("float32",) if "prepack" not in op else ("uint8",):
                    for out in ("existing", "new") if op == "unpack" else ("",):
                        params = {"shape": f"{k}x{n}", "k": k, "n": n, "bits": bits, "dtype": dtype}
                        params |= {"out": out} if out else {}

                        def build(context: Context, k=k, n=n, bits=bits, dtype=dtype, out=out) -> Work:
                            weights = RandomWeights(n, k, Format(bits), device=context.device)
                            return _WORK[op](context, weights, bits, dtype, **({"out": out} if out else {}))

                        yield Case(op, params, build)

    return cases


def _ones(context: Context, count: int) -> torch.Tensor:
    return torch.ones(count, dtype=torch.uint8, device=context.device)


def _copy(context: Context, moved: int) -> Runner:
    """A copy that moves as many bytes, half of them read and half of them written: what the memory can do."""
    buffers = context.copies("buffers", lambda: _ones(context, max(moved // 2, 1)))
    buffers = buffers if len(buffers) > 1 else [*buffers, buffers[0].clone()]
    return runner(torch.Tensor.copy_, [(a, buffers[i - 1]) for i, a in enumerate(buffers)], moved)


def _pack(context: Context, w: RandomWeights, bits: int, dtype: str) -> Work:
    packed, dense = w.packed(), context.copies("dense", lambda: w.dense(DTYPES[dtype]))
    moved = nbytes(dense[0], packed.weight, w.n1)
    candidate = runner(torch.ops.inq.pack, [(each, w.n1, bits, w.fmt.levels) for each in dense], moved)

    def check() -> str | None:
        return None if torch.equal(candidate.run(), packed.weight) else "other codes than the weights were made from"

    plain = attempt(lambda: runner(reference.pack, [(each, w.n1, w.fmt) for each in dense], moved))
    return Work(candidate, {COPY: _copy(context, moved), "plain torch": plain}, check)


def _unpack(context: Context, w: RandomWeights, bits: int, dtype: str, out: str) -> Work:
    """Into memory that exists, beside a copy into such; or into new memory, whose pages take longer than decoding."""
    packed = w.packed()
    codes = context.copies("codes", lambda: packed.weight)
    dense = w.dense(DTYPES[dtype])
    moved = nbytes(packed.weight, w.n1, dense)
    tail = (w.k, bits, w.fmt.levels)
    if out == "existing":
        made = context.copies("values", lambda: torch.zeros_like(dense))
        arguments = [(made[i % len(made)], each, w.n1, None, *tail) for i, each in enumerate(codes)]
        candidate = runner(_unpack_into, arguments, moved)
        copy = _copy(context, moved)
    else:
        candidate = runner(torch.ops.inq.unpack, [(each, w.n1, None, *tail, DTYPES[dtype]) for each in codes], moved)
        copy = runner(torch.clone, [(_ones(context, moved // 2),)], moved)

    def check() -> str | None:
        return None if torch.equal(candidate.run(), dense) else "other values than the codes mean"

    plain = [(each, w.n1, None, w.k, w.fmt, DTYPES[dtype]) for each in codes]
    baselines = {COPY: copy, "plain torch": attempt(lambda: runner(reference.unpack, plain, moved))}
    return Work(candidate, baselines, check)


def _unpack_into(out: torch.Tensor, *arguments) -> torch.Tensor:
    torch.ops.inq.unpack_(out, *arguments)
    return out


def _prepack(context: Context, w: RandomWeights, bits: int, dtype: str, inverse: bool = False) -> Work:
    packed = w.packed()
    on_gpu = fragments.BF16 if context.backend == "cuda" else slices.best(torch.bfloat16, w.fmt)
    ready = ops.prepack(packed, layouts.CPU16 if context.device == "cpu" else on_gpu)
    together = 1 if ready.layout in slices.LAYOUTS else 16  # rows of a panel
    moved = nbytes(packed.weight, ready.weight)
    there = [(each, w.k, bits, w.fmt.levels, ready.layout) for each in context.copies("codes", lambda: packed.weight)]
    copies = context.copies("ready", lambda: ready.weight)
    back = [(each, w.n, w.k, bits, w.fmt.levels, ready.layout) for each in copies]
    forward, backward = runner(torch.ops.inq.prepack, there, moved), runner(torch.ops.inq.unprepack, back, moved)

    def check() -> str | None:
        # Some panels of rows against the definition; then all of it there and back against the storage bytes.
        made, panels = forward.run(), some(ready.weight.shape[0], 16)
        rows = (panels[:, None] * together + torch.arange(together)).view(-1)
        expected = layouts.prepack(packed.weight[rows[rows < w.n]], w.k, w.fmt, ready.layout)
        if not torch.equal(made[panels], expected):
            return "other bytes than those of inq_kernels.layouts.prepack"
        if not torch.equal(made, ready.weight):  # which is what unprepack is given
            return "two calls of prepack differ"
        return None if torch.equal(backward.run(), packed.weight) else "other bytes than the storage layout had"

    facts = {"layout": ready.layout}
    return Work(backward if inverse else forward, {COPY: _copy(context, moved)}, check, facts=facts)


_WORK = {
    "pack": _pack,
    "unpack": _unpack,
    "prepack": _prepack,
    "unprepack": lambda *arguments: _prepack(*arguments, inverse=True),
}
OPS = tuple(Op(op, ("unpack", "unpack_") if op == "unpack" else (op,), _cases(op)) for op in _WORK)
