"""One-shot quantization that looks at activations, for those who cannot retrain: ``calibrate``.

GPTQ's update (arXiv 2210.17323) on the power-of-two grid: the columns of a weight are rounded one after the other, and
the columns that are not rounded yet move so that the layer's outputs on a few batches change as little as they can.

With H = Σ x·xᵀ over the inputs x [K] of a layer, an error d [K] in a row costs dᵀ·H·d in its outputs. Factor H = R·Rᵀ
with R upper triangular, U = R⁻¹, so that H⁻¹ = Uᵀ·U. Rounding column k, w_k → q_k, is made up for by
w_j −= (w_k − q_k) / U_kk · U_kj for all j > k. Everything here is in float64, which decides no tie by chance.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops, reference
from .format import MSE_OCTAVES, Format
from .nn import ConvertReport, Planned, plan, replacement, sqnr_db, swap
from .table import render

# Columns whose updates of all later columns are made at once, as one product.
_BLOCK = 128
# Elements of unfolded images that exist at a time.
_CHUNK = 1 << 24
# Row scales that are tried: 2^(i / _SCALE_STEPS), an octave down and an octave up.
_SCALE_STEPS = 8

Forward = Callable[[nn.Module, object], object]


@dataclass(frozen=True)
class Calibrated:
    """One calibrated layer: its ``format``, whether it got ``row_scales``, how many ``inputs`` (vectors of K values) it
    saw, and the signal to noise of its outputs on them in dB, Σy² / Σ(y − ŷ)² without the bias: as packed
    (``output_db``), and as plain rounding would have made it (``plain_db``)."""

    name: str
    format: Format
    row_scales: bool
    inputs: int
    output_db: float
    plain_db: float


@dataclass(frozen=True)
class CalibrateReport(ConvertReport):
    """What ``calibrate`` did: a ``ConvertReport``, and a ``Calibrated`` for each layer; ``print`` it for two tables."""

    layers: list[Calibrated] = field(default_factory=list)

    def __str__(self) -> str:
        headers = ("layer", "inputs", "outputs dB", "plain rounding dB", "row scales")
        rows = [
            (c.name, c.inputs, f"{c.output_db:.1f}", f"{c.plain_db:.1f}", "yes" if c.row_scales else "no")
            for c in self.layers
        ]
        return f"{super().__str__()}\n\n{render(headers, rows)}"


def calibrate(
    model: nn.Module,
    batches: Iterable,
    fmt: Format | Mapping[str, Format],
    skip: str | Iterable[str] = (),
    only: str | Iterable[str] = (),
    *,
    row_scales: bool = False,
    sequential: bool = True,
    damping: float = 0.01,
    forward: Forward | None = None,
) -> CalibrateReport:
    """``inq.convert`` without retraining but with a few batches: rounding errors are made up for, column by column.

    Linear and Conv2d modules become ``inq.Linear`` and ``inq.Conv2d`` in place. n1 follows the format's rule; ``"mse"``
    weighs the error of each column by the energy of its inputs. Weights on the grid already stay exactly as they are.
    All or nothing: after an error, the forward pass's own included, the model is as it was. It runs without gradients
    and in evaluation mode, and gets its modes back. INQ retraining loses much less: use this where it is impossible.

    Args:
        model: as for ``inq.convert``, which says what stays float.
        batches: what the model shall work on, a few hundred to a few thousand inputs a layer and many more than K. Each
            is a Tensor, given to the model; a tuple or list, its positional arguments; or a dict, its keyword ones.
            All are kept: an iterator must not yield the same memory again.
        fmt, skip, only: as for ``inq.convert``.
        row_scales: a real ``weight_scale`` a row (output channel), float32 [N, 1], searched and then fitted by least
            squares: 4 bytes a row, and less error where rows do not suit the powers of two.
        sequential: calibrate each layer, in the order in which they run, on what the layers packed before it give it.
            The batches run once for each layer, and again; K·K float64 values exist for one layer at a time. False: all
            layers on the inputs of the float model, in one pass over the batches, which keeps all layers' K·K values.
        damping: this much of the mean of H's diagonal is added to it: more trusts the batches less.
        forward: how to run a batch, ``forward(model, batch)``; e.g. ``lambda model, batch: model(batch[0])`` for a
            data loader's (images, labels).

    Returns:
        A ``CalibrateReport``: as of ``inq.convert``, and for each layer the signal to noise of its outputs.

    Warns:
        UserWarning: under half of the parameter bytes were packed.

    Raises:
        TypeError, ValueError: arguments that are not as above, no batches, NaN or Inf in a weight or in a layer's
            inputs, a layer that no batch reached, or an H that cannot be factored (``damping`` 0).
    """
    if isinstance(batches, (Tensor, Mapping)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"inq.calibrate: batches: expected an iterable of batches, got {type(batches).__name__}: "
            "put a single batch into a list"
        )
    if isinstance(damping, bool) or not isinstance(damping, (int, float)):
        raise TypeError(f"inq.calibrate: damping: expected a number ≥ 0, got {damping!r}")
    if not 0 <= damping < math.inf:
        raise ValueError(f"inq.calibrate: damping: expected a finite number ≥ 0, got {damping!r}")
    for name, value in (("row_scales", row_scales), ("sequential", sequential)):
        if not isinstance(value, bool):
            raise TypeError(f"inq.calibrate: {name}: expected a bool, got {value!r}")
    if forward is not None and not callable(forward):
        raise TypeError(f"inq.calibrate: forward: expected a function of model and batch, got {forward!r}")
    planned = plan("inq.calibrate", model, fmt, skip, only)
    layers = [each for each in planned if each.format is not None]
    for each in layers:
        ops.check_weight(f"inq.calibrate: layer {each.name!r}: weight", each.module.weight)
    given, batches = batches, list(batches)
    if not batches:
        raise ValueError("inq.calibrate: batches: expected at least one, got none")
    if not isinstance(given, Sequence):
        _check_own_memory(batches)

    run = _Run(model, batches, forward or _call, float(damping), row_scales)
    with _untouched(model), torch.no_grad():
        if sequential:
            for each in run.order(layers):
                run.quantize(each, *run.hessians([each])[each.name])
                # What the layers after it shall see.
                w_hat = ops.unpack(run.packed[each.name], torch.float64).to(each.module.weight.dtype)
                each.module._parameters["weight"] = nn.Parameter(w_hat, requires_grad=False)
        else:
            by_name = {each.name: each for each in layers}
            for name, collected in run.hessians(layers).items():
                run.quantize(by_name[name], *collected)

    report = CalibrateReport()
    replacements: dict[int, nn.Module] = {}
    for each in planned:
        if each.format is None:
            report.modules.append(each.left_float())
            continue
        new = replacement(each.module, run.packed[each.name])
        replacements[id(each.module)] = new
        report.modules.append(each.packed_as(new))
        report.layers.append(run.reports[each.name])
    swap("inq.calibrate", model, replacements, report)
    return report


def _check_own_memory(batches: list) -> None:
    """ValueError if what was iterated over filled the same memory again: all batches would be the last one. Of batches
    of plain tensors alone: others may differ in what is not looked at."""
    seen: dict[tuple, int] = {}
    for i, batch in enumerate(batches):
        values = [batch] if isinstance(batch, Tensor) else batch.values() if isinstance(batch, Mapping) else batch
        if not isinstance(batch, (Tensor, Mapping, tuple, list)) or not all(map(_has_memory, values)):
            continue
        memory = tuple((v.device, v.data_ptr(), v.shape, v.stride()) for v in values)
        if memory and (first := seen.setdefault(memory, i)) != i:
            raise ValueError(
                f"inq.calibrate: batches: expected memory of its own for each, got batches {first} and {i} in the "
                "same: what fills one buffer again and again must yield clones of it"
            )


def _has_memory(value: object) -> bool:
    return type(value) is Tensor and value.layout == torch.strided and value.device.type != "meta" and value.numel() > 0


def _call(model: nn.Module, batch: object) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


@contextmanager
def _untouched(model: nn.Module):
    """Evaluation mode, and in the end every module's mode, every Linear's and Conv2d's weight and all buffers as they
    were: a ``forward`` may train a batch norm's statistics, or count."""
    modules = list(model.modules())
    modes = [module.training for module in modules]
    weights = [module._parameters.get("weight") for module in modules]
    buffers = [dict(module._buffers) for module in modules]
    values = {id(buffer): (buffer, buffer.clone()) for each in buffers for buffer in each.values() if _is_held(buffer)}
    try:
        model.eval()
        yield
    finally:
        for module, mode, weight, before in zip(modules, modes, weights, buffers, strict=True):
            module.training = mode
            if weight is not None:
                module._parameters["weight"] = weight
            module._buffers.update(before)
        with torch.no_grad():
            for buffer, value in values.values():
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _is_held(buffer: Tensor | None) -> bool:
    return buffer is not None and buffer.device.type != "meta" and buffer.layout == torch.strided


class _Run:
    """One calibration: what the batches say of each layer, and what became of it."""

    def __init__(self, model: nn.Module, batches: list, forward: Forward, damping: float, row_scales: bool):
        self.model, self.batches, self.forward = model, batches, forward
        self.damping, self.row_scales = damping, row_scales
        self.packed: dict[str, ops.PackedWeight] = {}
        self.reports: dict[str, Calibrated] = {}

    def _watch(self, layers: Sequence[Planned], see: Callable[[Planned, Tensor], None]) -> None:
        """Run all batches; ``see`` gets each input of each of ``layers``."""
        handles = []
        try:
            for each in layers:

                def hook(module, args, kwargs, each=each):
                    see(each, args[0] if args else kwargs["input"])

                handles.append(each.module.register_forward_pre_hook(hook, with_kwargs=True))
            for batch in self.batches:
                self.forward(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()

    def order(self, layers: Sequence[Planned]) -> list[Planned]:
        """``layers`` in the order in which they run first."""
        seen: dict[str, Planned] = {}
        self._watch(layers, lambda each, _: seen.setdefault(each.name, each))
        _check_reached(each.name for each in layers if each.name not in seen)
        return list(seen.values())

    def hessians(self, layers: Sequence[Planned]) -> dict[str, tuple[Tensor, int]]:
        """For each of ``layers``: H, float64 [groups, K, K], over all batches, and of how many inputs."""
        found: dict[str, tuple[Tensor, int]] = {}

        def see(each: Planned, x: Tensor) -> None:
            bad = x.numel() - int(torch.isfinite(x).sum())
            if bad:
                nan = int(torch.isnan(x).sum())
                raise ops.not_finite(f"inq.calibrate: layer {each.name!r}: inputs", nan, bad, x.numel())
            for part in _columns(each.module, x):
                h = part @ part.mT
                before, count = found.get(each.name, (0.0, 0))
                found[each.name] = (h + before, count + part.shape[2])

        self._watch(layers, see)
        _check_reached(each.name for each in layers if found.get(each.name, (None, 0))[1] == 0)
        return found

    def quantize(self, each: Planned, h: Tensor, inputs: int) -> None:
        """Pack one layer, given its H [groups, K, K]."""
        fmt, weight = each.format, each.module.weight.detach()
        w = weight.double().reshape(h.shape[0], -1, h.shape[1])  # [groups, rows a group, K]
        damped = _damped(h, self.damping)
        n1, scale = _grid(weight, w, damped.diagonal(dim1=1, dim2=2), fmt, self.row_scales)
        # Values under the least exponent of the weight's dtype do not exist in it.
        lowest = 2.0 ** reference.exponent_limits(weight.dtype)[0]

        def round_rows(values: Tensor) -> Tensor:
            q = reference.quantize(values.reshape(-1), n1.view(-1), fmt)
            return torch.where(q.abs() < lowest, 0.0, q).view(values.shape)

        relative = w if scale is None else w / scale.double().view(*w.shape[:2], 1)
        q = _compensated(f"inq.calibrate: layer {each.name!r}", relative, damped, round_rows)
        packed = ops.pack(q.reshape(weight.shape), fmt, n1)
        if scale is not None:
            scale = _fitted(relative, q, damped, scale)
            if fmt.granularity == "tensor":
                packed, scale = _one_exponent(packed, scale, weight)
            packed = dataclasses.replace(packed, weight_scale=scale)
        self.packed[each.name] = packed

        plain = reference.quantize(weight, reference.exponents(weight, fmt), fmt)
        signal = _energy(w, h)
        noise, plain_noise = (
            _energy(w - w_hat.double().reshape(w.shape), h) for w_hat in (ops.unpack(packed, torch.float64), plain)
        )
        self.reports[each.name] = Calibrated(
            each.name, fmt, self.row_scales, inputs, sqnr_db(signal, noise), sqnr_db(signal, plain_noise)
        )


def _check_reached(names: Iterable[str]) -> None:
    if missing := list(names):
        raise ValueError(
            f"inq.calibrate: layers {missing}: expected some input from the batches, got none: "
            "skip them, or add batches that reach them"
        )


def _columns(module: nn.Linear | nn.Conv2d, x: Tensor) -> Iterable[Tensor]:
    """A layer's inputs as float64 [groups, K, inputs], in parts that fit into memory."""
    if isinstance(module, nn.Linear):
        if x.numel():
            yield x.double().reshape(-1, x.shape[-1]).T[None]
        return
    x = x[None] if x.dim() == 3 else x
    k = module.weight[0].numel()
    # Padding as the module's forward does it, "same" and the modes other than zeros included.
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    pixels = x.shape[2] * x.shape[3] * k * module.groups
    for part in x.split(max(_CHUNK // max(pixels, 1), 1)) if x.numel() else ():
        padded = F.pad(part.double(), module._reversed_padding_repeated_twice, mode=mode)
        patches = F.unfold(padded, module.kernel_size, module.dilation, 0, module.stride)  # [B, C·kh·kw, places]
        patches = patches.view(len(part), module.groups, k, -1)
        yield patches.permute(1, 2, 0, 3).reshape(module.groups, k, -1)


def _energy(d: Tensor, h: Tensor) -> float:
    """Σ dᵀ·H·d over the rows of d [groups, rows, K]: the energy of their outputs."""
    return float(((d @ h) * d).sum())


def _damped(h: Tensor, damping: float) -> Tensor:
    """H with ``damping`` times its mean diagonal added. An input that was always 0 stands alone, and rounds plainly."""
    diagonal = h.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(dim=1, keepdim=True)
    diagonal = diagonal + damping * mean
    diagonal = torch.where(diagonal > 0, diagonal, torch.where(mean > 0, mean, 1.0))
    return h.diagonal_scatter(diagonal, dim1=1, dim2=2)


def _grid(weight: Tensor, w: Tensor, energy: Tensor, fmt: Format, row_scales: bool) -> tuple[Tensor, Tensor | None]:
    """(n1 int8 [N, 1], row scale float32 [N, 1] or None) for w [groups, rows, K], ``weight`` as float64, with the least
    Σ energy·(w − ŵ)² for plain rounding; ``energy`` [groups, K]. With row scales each row has its own n1."""
    rule = dataclasses.replace(fmt, exponent="max", granularity="channel" if row_scales else fmt.granularity)
    n1 = reference.exponents(weight, rule)
    rows = w.reshape(len(n1), -1)

    def error(n1: Tensor, scale: float = 1.0) -> Tensor:
        d = rows - reference.quantize(rows / scale, n1, fmt) * scale
        return (d.view(w.shape).square() * energy[:, None]).sum(dim=2).view(-1, 1)

    if fmt.exponent == "mse":
        # As reference.exponents looks: ties go to the larger n1, since argmin finds the first.
        least = reference.exponent_limits(weight.dtype)[0]
        candidates = [(n1.int() - octave).clamp(min=least).to(torch.int8) for octave in range(MSE_OCTAVES + 1)]
        errors = torch.stack([error(candidate) for candidate in candidates])
        if rule.granularity == "tensor":
            errors = errors.sum(dim=1, keepdim=True).expand_as(errors)
        n1 = torch.stack(candidates).gather(0, errors.argmin(dim=0, keepdim=True))[0]
    if not row_scales:
        return n1, None
    best, scale = error(n1), torch.ones(len(n1), 1, dtype=torch.float32, device=w.device)
    for step in range(-_SCALE_STEPS, _SCALE_STEPS + 1):
        # As float32 will hold it.
        candidate = float(torch.tensor(2.0 ** (step / _SCALE_STEPS), dtype=torch.float32))
        found = error(n1, candidate)
        scale = torch.where(found < best, candidate, scale)
        best = torch.minimum(best, found)
    return n1, scale


def _compensated(where: str, w: Tensor, h: Tensor, round_rows: Callable[[Tensor], Tensor]) -> Tensor:
    """w [groups, rows, K] rounded column by column, each error made up for by the columns after it.

    Columns go by falling energy, the diagonal of H [groups, K, K]: those whose errors cost most come while there are
    many left to make up for them. ``round_rows`` takes float64 [groups, rows].
    """
    order = h.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)  # [groups, K]
    by_column = order[:, None].expand_as(w)
    w = w.gather(2, by_column)
    h = h.gather(1, order[:, :, None].expand_as(h)).gather(2, order[:, None].expand_as(h))
    # Upper times lower is lower times upper, read backwards.
    factor, info = torch.linalg.cholesky_ex(h.flip(1, 2))
    # What is left of a pivot that should be 0 is rounding errors.
    least = w.shape[2] * torch.finfo(h.dtype).eps * h.diagonal(dim1=1, dim2=2).amax(dim=1)
    if bool(info.any()) or bool((factor.diagonal(dim1=1, dim2=2).amin(dim=1).square() <= least).any()):
        raise ValueError(f"{where}: expected a positive definite H, got one that is not: raise damping, or add batches")
    k = w.shape[2]
    identity = torch.eye(k, dtype=w.dtype, device=w.device).expand_as(h)
    u = torch.linalg.solve_triangular(factor.flip(1, 2), identity, upper=True)
    q = torch.empty_like(w)
    for start in range(0, k, _BLOCK):
        end = min(start + _BLOCK, k)
        errors = torch.empty(*w.shape[:2], end - start, dtype=w.dtype, device=w.device)
        for column in range(start, end):
            q[..., column] = round_rows(w[..., column])
            error = (w[..., column] - q[..., column]) / u[:, column, column, None]
            w[..., column + 1 : end] -= error[..., None] * u[:, column, None, column + 1 : end]
            errors[..., column - start] = error
        w[..., end:] -= errors @ u[:, start:end, end:]
    return torch.empty_like(q).scatter_(2, by_column, q)


def _fitted(w: Tensor, q: Tensor, h: Tensor, scale: Tensor) -> Tensor:
    """``scale`` [N, 1] times the factor of each row of q that brings its outputs nearest to those of w; float32."""
    hq = q @ h
    energy, product = (hq * q).sum(dim=2), (hq * w).sum(dim=2)
    factor = torch.where((energy > 0) & (product > 0), product / energy, 1.0)
    return (scale.double() * factor.view(-1, 1)).float()


def _one_exponent(packed: ops.PackedWeight, scale: Tensor, weight: Tensor) -> tuple[ops.PackedWeight, Tensor]:
    """The same values with one n1 for all rows, as the granularity "tensor" has it: the scales take the difference."""
    n1 = reference.exponents(weight, packed.format)
    octaves = packed.weight_exp.int() - n1.int()
    # A row of zeros has no exponent of its own.
    octaves = torch.where(weight.detach().reshape(len(n1), -1).abs().amax(dim=1, keepdim=True) == 0, 0, octaves)
    return dataclasses.replace(packed, weight_exp=n1), (scale.double() * 2.0 ** octaves.double()).float()
