"""The first INQ portion of a network's weights: ``freeze_portion_``, which ``inq.INQ`` calls."""

from __future__ import annotations

import math
from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from .. import reference
from ..format import MSE_OCTAVES, Format, frozen_count
from . import gpu, machine, shapes
from .case import Case, Context, Op, Request, Work
from .timing import Runner

PORTION = 0.5
_CHUNK = 1 << 24
_NAMED = {"VGG-16": shapes.VGG16, "one tensor": ((1, sum(map(prod, shapes.VGG16))),)}


def _cases(request: Request) -> Iterator[Case]:
    if request.isa != "native":
        return
    named = {f"{k}x{n}": ((n, k),) for k, n in request.shapes or ((4096, 4096),)}
    for name, layers in (named if request.quick or request.shapes else _NAMED).items():
        for bits in request.bits or (5,):
            for rule in ("max", "mse"):
                params = {"shape": name, "weights": sum(map(prod, layers)), "bits": bits, "exponent": rule}

                def build(context: Context, layers=layers, bits=bits, rule=rule) -> Work:
                    return _partition(context, layers, Format(bits, exponent=rule))

                yield Case("partition", params | {"dtype": "float32"}, build, layers)


def _weights(layers: tuple[tuple[int, int], ...], device: str = "cpu") -> list[Tensor]:
    g = torch.Generator(device).manual_seed(0)
    # Spread as in trained networks: √(2/K) of each layer.
    return [torch.randn(n, k, generator=g, device=device).mul_((2 / k) ** 0.5) for n, k in layers]


def _partition(context: Context, layers: tuple[tuple[int, int], ...], fmt: Format) -> Work:
    originals = context.get("weights", lambda: _weights(layers, context.device))
    weights = context.get("working", lambda: [w.clone() for w in originals])
    masks = context.get("masks", lambda: [w.new_zeros((w.numel() + 7) // 8, dtype=torch.uint8) for w in weights])
    counts = [frozen_count(PORTION, w.numel()) for w in weights]
    n1s = context.get("n1s", lambda: [w.new_zeros((w.shape[0], 1), dtype=torch.int8) for w in weights])
    rule = (fmt.bits, fmt.levels, fmt.granularity, fmt.exponent)
    none = [None] * len(weights), [0] * len(weights)

    def reset() -> None:
        for w, original, mask in zip(weights, originals, masks, strict=True):
            w.copy_(original)
            mask.zero_()

    def ours() -> None:
        torch.ops.inq.freeze_portion_(weights, masks, n1s, none[0], counts, True, *rule, False, none[1])

    def check() -> str | None:
        reset()
        candidate.run()
        for i, (w, original, mask, count) in enumerate(zip(weights, originals, masks, counts, strict=True)):
            if wrong := _wrong(w, original, mask, count, fmt):
                return f"tensor {i} of {list(w.shape)}: {wrong}"
        return None

    frozen = [w.new_zeros(w.numel(), dtype=torch.bool) for w in weights]

    def reset_all() -> None:
        reset()
        for each in frozen:
            each.zero_()

    def topk() -> None:
        for w, held, count in zip(weights, frozen, counts, strict=True):
            _with_topk(w, held, count, fmt)

    numel = sum(w.numel() for w in weights)
    moved = numel * 8 + sum(map(torch.numel, masks))
    candidate = Runner([ours], moved, reset)
    reset()
    ours()  # pages of libraries and buffers that later calls keep are not this call's
    reset()
    peak_extra = gpu.peak_extra if context.device == "cuda" else machine.peak_extra
    facts = {"peak_extra_bytes": peak_extra(ours), "weight_bytes": 4 * numel, "portion": PORTION}
    return Work(candidate, {"torch topk": Runner([topk], moved, reset_all)}, check, facts=facts)


def _wrong(w: Tensor, original: Tensor, mask: Tensor, count: int, fmt: Format) -> str | None:
    """What is not as the definition says: piece by piece, since the reference would take many times the memory."""
    n1 = reference.exponents(original, fmt)
    flat, old = w.view(-1), original.view(-1)
    rows = n1.view(-1, 1).expand(original.shape).reshape(-1) if w.shape[0] > 1 else n1.view(1).expand(old.numel())
    chosen_least, left_most, chosen_count, at_least_last, left_first = float("inf"), -1.0, 0, -1, old.numel()
    for start in range(0, old.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        size = old[part].abs()
        chosen = reference.unpack_bits(mask[start // 8 : (start + size.numel() + 7) // 8], size.shape)
        expected = reference.quantize(old[part], rows[part], fmt)
        if not torch.equal(flat[part], torch.where(chosen, expected, old[part])):
            return "other values than equation (4) of what the mask holds, and the weights elsewhere"
        chosen_count += int(chosen.sum())
        least = float(size[chosen].min()) if chosen.any() else float("inf")
        most = float(size[~chosen].max()) if not chosen.all() else -1.0
        # Of equal ones at the boundary the last frozen stands before the first left.
        for value, where, is_chosen in ((least, chosen, True), (most, ~chosen, False)):
            if value in (float("inf"), -1.0):
                continue
            at = ((size == value) & where).nonzero()[:, 0] + start
            if is_chosen and value <= chosen_least:
                chosen_least, at_least_last = value, int(at[-1])
            elif not is_chosen and value > left_most:
                left_most, left_first = value, int(at[0])
    if chosen_count != count:
        return f"expected {count} frozen weights, got {chosen_count}"
    if chosen_least < left_most or (chosen_least == left_most and at_least_last > left_first):
        return f"a frozen weight of size {chosen_least} although one of {left_most} is not"
    return None


def _exponent(flat: Tensor, fmt: Format) -> int:
    """n1 of a tensor by ``fmt.exponent``, as one would write it with torch.

    For ``mse``, counts and sums of |w| in bins of half an octave (all that is rounded to a level is in whole bins),
    then Σ(level² − 2·level·|w|) of each candidate. Sums are float64's, where the definition's are exact.
    """
    lo, hi = reference.exponent_limits(flat.dtype)
    m, e = math.frexp(max(map(abs, torch.stack(flat.aminmax()).tolist())))
    top = min(max(e if m >= 0.75 else e - 1, lo), hi)
    if fmt.exponent == "max":
        return top
    candidates = range(top, max(top - MSE_OCTAVES, lo) - 1, -1)
    # Below the smallest level of the last candidate, and 0: bin 0, which no candidate asks for.
    first = candidates[-1] - fmt.magnitudes
    bins = 2 * (e - first + 1)
    counts = torch.zeros(bins, dtype=torch.int64, device=flat.device)
    sums = torch.zeros(bins, dtype=torch.float64, device=flat.device)
    for part in flat.split(_CHUNK):
        size = part.abs()
        m, e = torch.frexp(size)
        where = torch.where(m > 0, (e - first) * 2 + (m >= 0.75), 0).clamp_(min=0)
        counts += torch.bincount(where, minlength=bins)
        sums += torch.bincount(where, size.double(), minlength=bins)
    octave, half = torch.arange(bins) // 2 + first, torch.arange(bins) % 2
    counts, sums, scores = counts.cpu(), sums.cpu(), []
    for n1 in candidates:
        n2 = fmt.n2(n1)
        level = torch.where((octave == n2) & (half == 0), n2, (octave - 1 + half).clamp(max=n1))
        value = torch.where(level >= max(n2, lo), torch.exp2(level.double()), 0)
        scores.append(float((counts * value**2 - 2 * sums * value).sum()))
    return candidates[scores.index(min(scores))]


def _with_topk(w: Tensor, frozen: Tensor, count: int, fmt: Format) -> None:
    """The same operation as one would write it with torch: the largest by topk, rounded in place, the mask in bools."""
    flat = w.view(-1)
    top = _exponent(flat, fmt)
    size = torch.where(frozen, -1.0, flat.abs())
    index = torch.topk(size, count, sorted=False).indices
    frozen[index] = True
    m, e = torch.frexp(flat[index])
    level = torch.where(m.abs() >= 0.75, e, e - 1).clamp(max=top)
    bottom = fmt.n2(top)
    value = torch.ldexp(torch.sign(m), level.clamp(min=bottom))
    flat[index] = torch.where(m.abs() * torch.exp2(e.float()) >= 2.0 ** (bottom - 1), value, 0.0)


PARTITION = Op("partition", ("freeze_portion_",), _cases)
