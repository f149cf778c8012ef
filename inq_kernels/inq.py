"""Incremental Network Quantization: freeze the weights of a model portion by portion while the rest is retrained.

The algorithm is Algorithm 1 of the paper (arXiv 1702.03044). It works beside any torch optimizer: a hook zeroes the
gradients of frozen weights as they are accumulated, and another writes the frozen values back after every step, so
that neither weight decay nor momentum moves them by a bit. ``inq.optim``'s optimizers take the masks into their step
instead, and nothing is written back.

Under DistributedDataParallel every rank holds all weights and decides alike. Under FSDP2 each rank holds some rows of
a weight (``distributed.Rows``), and of its mask, codes and n1; portions are decided together.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import distributed, hooks, ops, reference
from .distributed import Rows, is_sharded, local_part
from .format import Format, frozen_count
from .nn import as_patterns, check_patterns, first_match, sqnr_db
from .optim import MaskedOptimizer
from .table import render

# The accumulated portions of the paper's ResNet-18 at each bit-width (section 3.1 and 3.3).
PAPER_PORTIONS: dict[int, tuple[float, ...]] = {
    5: (0.5, 0.75, 0.875, 1.0),
    4: (0.3, 0.5, 0.8, 0.9, 0.95, 1.0),
    3: (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0),
    2: (0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 1.0),
}
STATE_VERSION = 1

# Weights whose error is summed at once, in float64.
_PIECE = 1 << 20
_LAYER_KEYS = ("format", "shape", "mask", "keep", "codes", "n1", "signal", "noise")
_RUN_KEYS = (
    *("version", "portions", "partition", "seed", "reset_optimizer", "index", "in_progress", "layers"),
    *("lr_schedulers", "initial_lr_schedulers", "initial_groups"),
)

_op = torch.ops.inq


@dataclass(frozen=True)
class LayerReport:
    """One layer: ``portion`` and ``frozen`` of ``numel`` weights (pruned ones not counted), the range of ``n1``
    (None before the first portion), SQNR in dB of what was frozen at the moment it was, zeros among the frozen, and
    how many frozen weights have each exponent."""

    name: str
    shape: tuple[int, ...]
    format: Format
    portion: float
    frozen: int
    numel: int
    n1: tuple[int, int] | None
    sqnr_db: float
    zeros: int
    histogram: dict[int, int]


class Report(list[LayerReport]):
    """``LayerReport`` for each layer; ``print`` it for a table."""

    def __str__(self) -> str:
        headers = ("layer", "shape", "format", "portion", "frozen", "n1", "SQNR dB", "zeros", "exponents: weights")
        rows = []
        for r in self:
            n1 = "-" if r.n1 is None else str(r.n1[0]) if r.n1[0] == r.n1[1] else f"{r.n1[0]}…{r.n1[1]}"
            shape = "×".join(map(str, r.shape))
            histogram = " ".join(f"2^{k}:{count}" for k, count in sorted(r.histogram.items(), reverse=True))
            sqnr = f"{r.sqnr_db:.1f}" if r.frozen else "-"
            frozen = f"{r.frozen}/{r.numel}"
            rows.append((r.name, shape, r.format, f"{r.portion:g}", frozen, n1, sqnr, r.zeros, histogram))
        return render(headers, rows)


class _Layer:
    """One weight under INQ: one bit a weight for the mask, the frozen values as packed codes.

    Where ``rows`` is not None, the weight is a DTensor and everything here is of the rows that this rank holds, but for
    ``total`` and ``frozen``, which count the whole weight.
    """

    def __init__(self, name: str, weight: nn.Parameter, fmt: Format, prune_mask: Tensor | None, seed: int):
        self.name, self.weight, self.format = name, weight, fmt
        self.rows = Rows.of(self.where, weight)
        numel, device, local = weight.numel(), weight.device, self.local
        self.k = numel // weight.shape[0]
        self.mask = torch.zeros((local.numel() + 7) // 8, dtype=torch.uint8, device=device)
        mine = prune_mask if prune_mask is None or self.rows is None else self.rows.take(prune_mask)
        self.keep = None if mine is None else reference.pack_bits(mine.to(device))
        self.total = numel if prune_mask is None else int(prune_mask.sum())
        self.codes = torch.zeros(local.shape[0], fmt.row_bytes(self.k), dtype=torch.uint8, device=device)
        self.n1: Tensor | None = None
        self.frozen = 0
        # Σw² and Σ(w − ŵ)² of the frozen weights, each taken when it was frozen.
        self.signal = self.noise = 0.0
        self.seed = hooks.layer_seed(seed, name)

    @property
    def local(self) -> Tensor:
        """The values that this process holds, in the weight's memory: all of them, or some rows, perhaps none."""
        return local_part(self.weight)

    def follow_device(self) -> None:
        """``model.to(device)`` moves parameters in place, under us."""
        device = self.weight.device
        if self.mask.device != device:
            self.mask, self.codes = self.mask.to(device), self.codes.to(device)
            self.keep = None if self.keep is None else self.keep.to(device)
            self.n1 = None if self.n1 is None else self.n1.to(device)

    def frozen_mask(self) -> Tensor:
        return reference.unpack_bits(self.mask, self.local.shape)

    def kept_mask(self) -> Tensor | None:
        return None if self.keep is None else reference.unpack_bits(self.keep, self.local.shape)

    def held_mask(self) -> Tensor:
        """T = 0: the frozen weights, and the pruned ones, which stay zero."""
        self.follow_device()
        frozen, kept = self.frozen_mask(), self.kept_mask()
        return frozen if kept is None else frozen | ~kept

    def held_bits(self) -> Tensor | None:
        """``held_mask`` with one bit a weight, as ``inq.optim`` takes it; None before the first portion."""
        if self.n1 is None:
            return None
        self.follow_device()
        return self.mask if self.keep is None else self.mask | ~self.keep

    def frozen_values(self) -> Tensor:
        """The frozen weights' values, and 0 elsewhere, in the weight's (local) shape and dtype."""
        w, fmt = self.local, self.format
        if not w.numel():
            return torch.zeros_like(w)
        return _op.unpack(self.codes, self.n1, None, self.k, fmt.bits, fmt.levels, w.dtype).reshape(w.shape)

    @torch.no_grad()
    def restore(self) -> None:
        """Write the held weights back, whatever a step did to them."""
        if self.n1 is not None:
            held, local = self.held_mask(), self.local
            local.copy_(torch.where(held, self.frozen_values(), local))

    @torch.no_grad()
    def mask_gradient(self, weight: Tensor) -> None:
        # masked_fill, not a product: an Inf or NaN gradient of a frozen weight must not survive as NaN.
        if weight.grad is not None and self.n1 is not None:
            local_part(weight.grad).masked_fill_(self.held_mask(), 0.0)

    @torch.no_grad()
    def begin(self, portion: float) -> _Portion:
        """What the next portion works on. Values that are not finite are 0 there, and an error in the end."""
        self.follow_device()
        ops.check_kind(self.where, self.weight)
        weight, count = self.local.detach(), frozen_count(portion, self.total)
        finite = torch.isfinite(weight)
        w = torch.where(finite, weight, 0.0).contiguous()
        nonzero = weight != 0
        if self.keep is not None:
            kept = self.kept_mask()
            w.masked_fill_(~kept, 0.0)
            nonzero &= kept
        n1 = torch.empty(w.shape[0], 1, dtype=torch.int8, device=w.device) if self.n1 is None else self.n1
        facts = [(~finite).sum(), torch.isnan(weight).sum(), nonzero.any()]
        return _Portion(self, w, self.mask.clone(), n1, count, facts)

    @property
    def where(self) -> str:
        """How errors name the weight."""
        return f"inq.INQ: weight of layer {self.name!r}"

    @torch.no_grad()
    def take(self, new: _Portion, signal: float, noise: float) -> None:
        """The end of a portion."""
        self.local.copy_(new.w)
        self.mask, self.codes, self.n1, self.frozen = new.mask, new.codes, new.n1, new.count
        self.signal, self.noise = self.signal + signal, self.noise + noise

    def report(self, portion: float) -> LayerReport:
        histogram: dict[int, int] = {}
        zeros, n1 = 0, None
        if self.n1 is not None:
            self.follow_device()
            n1 = self._n1_range()
            _, e = torch.frexp(self.frozen_values().double()[self.frozen_mask()].abs())
            values, counts = torch.unique(e, return_counts=True)
            # frexp writes 2^k as 0.5·2^(k+1), and 0 with exponent 0, which 2^-1 has too: count zeros apart.
            zeros = self.frozen - self._sum((self.frozen_values() != 0).sum())
            histogram = {int(v) - 1: int(c) for v, c in zip(values, counts, strict=True)}
            if self.rows is not None:
                histogram = self.rows.sum_histogram(histogram)
            if zeros:
                histogram[-1] -= zeros
            histogram = {k: c for k, c in histogram.items() if c}
        return LayerReport(
            self.name, tuple(self.weight.shape), self.format, portion, self.frozen, self.total, n1,
            sqnr_db(self.signal, self.noise), zeros, histogram,
        )  # fmt: skip

    def _sum(self, count: Tensor) -> int:
        """An integer of this process's part, summed over the ranks that hold the weight together."""
        return int(count if self.rows is None else self.rows.sum(count))

    def _n1_range(self) -> tuple[int, int]:
        if self.rows is None:
            return int(self.n1.min()), int(self.n1.max())
        ends = [-int(self.n1.min()), int(self.n1.max())] if self.n1.numel() else [-128, -128]
        low, high = self.rows.max(torch.tensor(ends)).tolist()
        return -low, high

    def state_dict(self) -> dict:
        tensors = {"mask": self.mask, "keep": self.keep, "codes": self.codes, "n1": self.n1}
        for key, value in tensors.items():
            if value is None:
                continue
            if self.rows is not None and key in ("mask", "keep"):
                value = distributed.row_bits(value, self.local.shape)
            tensors[key] = value.clone() if self.rows is None else self.rows.wrap(value.clone())
        return {
            "format": dataclasses.asdict(self.format),
            "shape": list(self.weight.shape),
            **tensors,
            "signal": self.signal,
            "noise": self.noise,
        }

    def check_state(self, state: Mapping, started: bool) -> None:
        where = f"inq.INQ.load_state_dict: layer {self.name!r}"
        hooks.check_keys(where, state, _LAYER_KEYS)
        for key, expected in (("format", dataclasses.asdict(self.format)), ("shape", list(self.weight.shape))):
            if state[key] != expected:
                raise ValueError(f"{where}: {key}: expected {expected}, got {state[key]}")
        own = self.state_dict()
        for key in ("mask", "codes", "keep"):
            like = own[key]
            if (state[key] is None) != (like is None):
                raise ValueError(f"{where}: {key}: one of the two runs has it, the other has not")
            if not isinstance(state[key], (Tensor, type(None))):
                raise ValueError(f"{where}: {key}: expected a tensor, got {state[key]!r}")
            if like is not None and (state[key].dtype != like.dtype or state[key].shape != like.shape):
                raise ValueError(
                    f"{where}: {key}: expected {like.dtype} {list(like.shape)}, "
                    f"got {state[key].dtype} {list(state[key].shape)}"
                )
        if (state["n1"] is not None) != started:
            raise ValueError(f"{where}: n1: expected it once a portion has begun, and only then")
        if not started and bool(local_part(state["mask"]).any()):
            raise ValueError(f"{where}: mask: expected no frozen weights before the first portion, got some")
        for key in ("mask", "codes", "keep", "n1"):
            if state[key] is not None and is_sharded(state[key]) != (self.rows is not None):
                raise ValueError(f"{where}: {key}: expected the state of a run whose weight is sharded as here")
        if started and self.local.numel():
            ops.check_n1(f"{where}: n1", local_part(state["n1"]).to(self.weight.device), self.local)
        for key in ("signal", "noise"):
            if not isinstance(state[key], float):
                raise ValueError(f"{where}: {key}: expected a float, got {state[key]!r}")

    def load_state(self, state: Mapping) -> None:
        self.follow_device()
        device = self.weight.device
        if self.rows is not None:
            state = {k: local_part(v) if isinstance(v, Tensor) else v for k, v in state.items()}
            for key in ("mask", "keep"):
                if state[key] is not None:
                    state[key] = distributed.flat_bits(state[key], self.local.shape)
        self.mask = state["mask"].to(device, copy=True)
        self.keep = None if state["keep"] is None else state["keep"].to(device, copy=True)
        self.codes = state["codes"].to(device, copy=True)
        self.n1 = None if state["n1"] is None else state["n1"].to(device, copy=True)
        self.total = self.weight.numel() if self.keep is None else self._sum(self.kept_mask().sum())
        self.frozen = self._sum(self.frozen_mask().sum())
        self.signal, self.noise = state["signal"], state["noise"]
        self.restore()


@dataclass(eq=False)
class _Portion:
    """The next portion of one layer, on copies, so that nothing is changed if some layer cannot be quantized.

    The numbers that decide about that are tensors: the host reads those of all layers at once.
    """

    layer: _Layer
    w: Tensor
    mask: Tensor
    n1: Tensor
    count: int
    facts: list[Tensor]
    codes: Tensor | None = None

    @torch.no_grad()
    def finish(self) -> None:
        """After freezing: the codes, and Σw² and Σ(w − ŵ)² of what was added, as two more facts."""
        layer, fmt = self.layer, self.layer.format
        self.facts += self._energies()
        frozen = reference.unpack_bits(self.mask, self.w.shape)
        self.codes = layer.codes
        if self.w.numel():
            self.codes = _op.pack(torch.where(frozen, self.w, 0.0), self.n1, fmt.bits, fmt.levels)

    def _energies(self) -> list[Tensor]:
        """Σw² and Σ(w − ŵ)² of what was added, in float64: a piece at a time, or the temporaries of a large layer would
        take ten times its memory."""
        before, after = self.layer.local.detach().reshape(-1), self.w.view(-1)
        added = self.mask ^ self.layer.mask
        energies = before.new_zeros(2, dtype=torch.float64)
        for i in range(0, len(before), _PIECE):
            w, rounded = before[i : i + _PIECE], after[i : i + _PIECE]
            here = reference.unpack_bits(added[i // 8 : (i + _PIECE) // 8], w.shape)
            w, rounded = torch.where(here, w, 0.0).double(), torch.where(here, rounded, 0.0).double()
            energies += torch.stack([w.square().sum(), (w - rounded).square_().sum()])
        return list(energies)

    def check(self, bad: float, nan: float, nonzero: float, *_: float) -> None:
        """ValueError unless the weight can be quantized."""
        layer = self.layer
        if bad:
            raise ops.not_finite(layer.where, int(nan), int(bad), layer.weight.numel())
        if layer.n1 is None and not nonzero:
            raise ValueError(f"{layer.where}: expected some nonzero values to choose n1 from, got {layer.total} zeros")


def _freeze(portions: list[_Portion], partition: str) -> list[list[float]]:
    """Equations (4) and (5) for the weights of all layers: freeze up to the portion, quantize what was added.

    One operator for all weights of a dtype, a format and a device, which a GPU runs in the same launches, and one
    answer from each device, in the end: the ``facts`` of each layer.
    """
    alike: dict[tuple, list[_Portion]] = {}
    for each in portions:
        rows = each.layer.rows
        # Sharded weights go together where the same ranks hold them.
        ranks = None if rows is None else (rows.mesh_dim, rows.group)
        alike.setdefault((each.w.device, each.w.dtype, each.layer.format, ranks), []).append(each)
    for (_, _, fmt, ranks), group in alike.items():
        layers = [each.layer for each in group]
        arguments = (
            [each.w for each in group],
            [each.mask for each in group],
            [each.n1 for each in group],
            [layer.keep for layer in layers],
            [each.count - each.layer.frozen for each in group],
            # Fixed at the first portion, from all weights: what is frozen then stays representable for ever.
            layers[0].n1 is None,
        )
        how = (partition == "random", [layer.seed for layer in layers])
        if ranks is None:
            _op.freeze_portion_(*arguments, fmt.bits, fmt.levels, fmt.granularity, fmt.exponent, *how)
        else:
            distributed.freeze_portion_([layer.rows for layer in layers], *arguments, fmt, *how)
    of_devices: dict[tuple, list[_Portion]] = {}
    for each in portions:
        each.finish()
        rows = each.layer.rows
        of_devices.setdefault((each.w.device, None if rows is None else rows.group), []).append(each)
    facts: dict[int, list[float]] = {}
    for group in of_devices.values():
        numbers = torch.stack([fact.double() for each in group for fact in each.facts])
        if (rows := group[0].layer.rows) is not None:
            numbers = rows.sum(numbers)
        facts |= zip(map(id, group), numbers.view(len(group), -1).tolist(), strict=True)
    return [facts[id(each)] for each in portions]


class INQ:
    """Incremental quantization of ``model`` while ``optimizer`` retrains what is not frozen yet.

    Algorithm 1 of the paper, with the partition of equation (5), the values of (4) and the update of (8). Weights are
    float64, float32, bfloat16 or float16; each costs one bit for the mask and ``bits`` for its code, and a copy of it
    while a portion begins: all layers are quantized at once, on copies, and none is changed if one cannot be.

    ``for portion in run:`` partitions, quantizes and freezes at each turn, then the body retrains. After the last
    turn every weight is 0 or ±2^k and ``inq.convert(model, run.formats)`` packs them exactly. Leaving the loop early
    and iterating again goes on with the portion in progress, and so does a run after ``load_state_dict``.

    On several devices: give the model as it is trained, in DistributedDataParallel or after FSDP2's ``fully_shard``
    (weights are DTensors then, split by rows), and every rank makes the run with the same arguments. With FSDP2 the
    steps of the loop, ``report`` and ``load_state_dict`` are collective. Which weights freeze, and n1, are the same as
    on one process with these weights, bit for bit.

    Args:
        model: its Conv1d, Conv2d, Conv3d and Linear weights are quantized, first and last layer included; chosen by
            module type, shared weights once, under their first name; in DistributedDataParallel its module's names.
        optimizer: any torch.optim.Optimizer. ``inq.optim.SGD`` and ``inq.optim.AdamW`` hold frozen weights, and their
            momenta too, inside the step, which saves writing them back. torch.optim.LBFGS's history is dropped at
            every portion: it would move weights that are frozen now.
        fmt: the format of all layers that ``overrides`` does not name.
        portions: accumulated fractions σ, increasing, the last 1. ``inq.PAPER_PORTIONS[bits]`` has the paper's.
        partition: which weights freeze next in a layer: ``"magnitude"``, the largest |w|, or ``"random"``.
        overrides: formats by name pattern of modules (fnmatch); the first that matches wins.
        skip: name patterns of modules to leave alone.
        prune_masks: bool masks by module name, True = kept (as in torch.nn.utils.prune), of the weight's shape (plain
            tensors, also for sharded weights). Pruned weights are set to 0 and stay 0, and the portions are of the kept
            ones.
        lr_schedulers: at every portion these and their optimizers' parameter groups (learning rate, momentum, …) get
            back the state they have now: the paper's "reset the learning rate and its policy".
        reset_optimizer: drop the optimizer's state (momenta) at every portion.
        seed: for the ``"random"`` partition.

    Raises:
        TypeError, ValueError: an argument is not as above, no layer is left, a pattern matches nothing, or a weight
            cannot be quantized. Nothing is changed then. Iterating raises ValueError, before any layer is touched,
            for NaN or Inf in a weight or a layer of zeros.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        fmt: Format,
        portions: Sequence[float] = (0.5, 0.75, 0.875, 1.0),
        partition: str = "magnitude",
        overrides: Mapping[str, Format] | None = None,
        skip: str | Iterable[str] = (),
        prune_masks: Mapping[str, Tensor] | None = None,
        lr_schedulers: object | Iterable[object] = (),
        reset_optimizer: bool = False,
        seed: int = 0,
    ):
        if partition not in ops.PARTITIONS:
            raise ValueError(f"inq.INQ: partition: expected one of {ops.PARTITIONS}, got {partition!r}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"inq.INQ: seed: expected an int, got {seed!r}")
        if not isinstance(reset_optimizer, bool):
            raise TypeError(f"inq.INQ: reset_optimizer: expected a bool, got {reset_optimizer!r}")
        for what, value in (("overrides", overrides), ("prune_masks", prune_masks)):
            if value is not None and not isinstance(value, Mapping):
                raise TypeError(f"inq.INQ: {what}: expected a mapping from names, got {type(value).__name__}")
        model = hooks.checked_model("inq.INQ", model, optimizer)
        self.model, self.optimizer, self.partition, self.seed = model, optimizer, partition, seed
        self.reset_optimizer = reset_optimizer
        self.portions = _checked_portions(portions)
        self.lr_schedulers = list(lr_schedulers) if isinstance(lr_schedulers, (list, tuple)) else [lr_schedulers]
        for scheduler in self.lr_schedulers:
            if not (hasattr(scheduler, "state_dict") and hasattr(scheduler, "optimizer")):
                raise TypeError(f"inq.INQ: lr_schedulers: expected torch LR schedulers, got {type(scheduler).__name__}")
        self._layers = _choose_layers(model, fmt, overrides or {}, as_patterns(skip), prune_masks or {}, seed)
        self._by_id = {id(layer.weight): layer for layer in self._layers.values()}
        self._weights = {name: layer.weight for name, layer in self._layers.items()}
        hooks.warn_of_strangers("inq.INQ", optimizer, self._weights)
        self._initial_schedulers = [copy.deepcopy(s.state_dict()) for s in self.lr_schedulers]
        self._initial_groups = [_hyperparameters(s.optimizer) for s in self.lr_schedulers]
        self._index = -1
        # True while the body of the loop runs for portion ``_index``, and after it was left early.
        self._in_progress = False
        self._hooked: set[str] = set()
        self._handles: list[RemovableHandle] = []
        self._hook_gradients()
        # The layers that the optimizer's own step does not hold.
        self._written_back: list[_Layer] = []
        self._hand_over_masks()
        self._handles.append(hooks.first_after_step(optimizer, lambda *_: self._restore(self._written_back)))
        hooks.hold("inq.INQ", self._weights)

    def _hook_gradients(self) -> None:
        """Once for each weight, as soon as it takes gradients."""
        for name, layer in self._layers.items():
            if layer.weight.requires_grad and name not in self._hooked:
                self._handles.append(layer.weight.register_post_accumulate_grad_hook(layer.mask_gradient))
                self._hooked.add(name)

    def _check_attached(self) -> None:
        hooks.check_attached("inq.INQ", self.model, self._weights)

    def _restore(self, layers: Iterable[_Layer]) -> None:
        for layer in layers:
            layer.restore()

    def _hand_over_masks(self) -> None:
        """Give what is held now to an optimizer that holds it itself; what it does not step is written back."""
        masked = isinstance(self.optimizer, MaskedOptimizer)
        ours = {id(p) for group in self.optimizer.param_groups for p in group["params"]} if masked else set()
        self._written_back = [layer for layer in self._layers.values() if id(layer.weight) not in ours]
        for layer in self._layers.values():
            if id(layer.weight) in ours:
                self.optimizer.set_mask(layer.weight, layer.held_bits())

    def __iter__(self) -> Iterator[float]:
        if self._in_progress:
            yield self.portion
            self._in_progress = False
        while self._index + 1 < len(self.portions):
            self._advance()
            yield self.portion
            self._in_progress = False

    def _advance(self) -> None:
        """The start of one portion in Algorithm 1."""
        self._check_attached()
        self._hook_gradients()
        # A checkpoint of an earlier portion may have been loaded into the model since.
        self._restore(self._layers.values())
        portions = [layer.begin(self.portions[self._index + 1]) for layer in self._layers.values()]
        facts = _freeze(portions, self.partition)
        for each, numbers in zip(portions, facts, strict=True):
            each.check(*numbers)
        for each, (*_, signal, noise) in zip(portions, facts, strict=True):
            each.layer.take(each, signal, noise)
        self._hand_over_masks()
        if self.reset_optimizer or isinstance(self.optimizer, torch.optim.LBFGS):
            self.optimizer.state.clear()
        for scheduler, state, groups in zip(
            self.lr_schedulers, self._initial_schedulers, self._initial_groups, strict=True
        ):
            scheduler.load_state_dict(copy.deepcopy(state))
            _restore_hyperparameters(scheduler.optimizer, groups)
        self._index += 1
        self._in_progress = True

    @property
    def portion(self) -> float:
        """The accumulated fraction σ that is frozen now; 0 before the first turn."""
        return self.portions[self._index] if self._index >= 0 else 0.0

    @property
    def rows(self) -> dict[str, Rows | None]:
        """Which rows of each quantized module's weight this process holds, by its name; None for all of them."""
        return {name: layer.rows for name, layer in self._layers.items()}

    @property
    def formats(self) -> dict[str, Format]:
        """The format of each quantized module by its name, as ``inq.convert`` takes it."""
        self._check_attached()
        return {name: layer.format for name, layer in self._layers.items()}

    def _layer(self, weight: Tensor | str) -> _Layer:
        layer = self._layers.get(weight) if isinstance(weight, str) else self._by_id.get(id(weight))
        if layer is None:
            what = repr(weight) if isinstance(weight, str) else f"a tensor of shape {list(weight.shape)}"
            raise KeyError(f"inq.INQ: expected a quantized weight or the name of its module, got {what}")
        return layer

    def frozen(self, weight: Tensor | str) -> Tensor:
        """The bool mask, of the weight's shape, of what is frozen (pruned weights are not). By weight or module name.
        A DTensor for a weight that is one, split alike.

        Raises:
            KeyError: that weight is not quantized by this run.
        """
        layer = self._layer(weight)
        layer.follow_device()
        return layer.frozen_mask() if layer.rows is None else layer.rows.wrap(layer.frozen_mask())

    def n1(self, weight: Tensor | str) -> Tensor | None:
        """n1 of each row, int8 [N, 1], fixed at the first portion; None before it. As ``frozen`` in all else."""
        layer = self._layer(weight)
        layer.follow_device()
        if layer.n1 is None:
            return None
        return layer.n1.clone() if layer.rows is None else layer.rows.wrap(layer.n1.clone())

    def report(self) -> Report:
        """What is frozen, a ``LayerReport`` for each layer. ValueError if the model's weights were replaced."""
        self._check_attached()
        return Report(layer.report(self.portion) for layer in self._layers.values())

    def close(self) -> None:
        """Take the hooks off the parameters and the optimizer: nothing holds the frozen weights any more. A second time
        it does nothing: another run may hold the weights by then."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        hooks.release(self._weights)
        for layer in self._layers.values():
            if isinstance(self.optimizer, MaskedOptimizer) and layer not in self._written_back:
                self.optimizer.set_mask(layer.weight, None)

    def state_dict(self) -> dict:
        """All it takes to go on bit for bit, the LR schedulers' state included; model and optimizer have their own.

        Tensors, numbers, strings, lists and dicts only. ``inq.save_training`` writes it without pickle, and where
        weights are DTensors, ``inq.save_sharded``: their masks, codes and n1 are DTensors then, split as they are.
        """
        self._check_attached()
        return {
            "version": STATE_VERSION,
            "portions": list(self.portions),
            "partition": self.partition,
            "seed": self.seed,
            "reset_optimizer": self.reset_optimizer,
            "index": self._index,
            "in_progress": self._in_progress,
            "layers": {name: layer.state_dict() for name, layer in self._layers.items()},
            "lr_schedulers": [
                {"type": type(s).__name__, "state": copy.deepcopy(s.state_dict())} for s in self.lr_schedulers
            ],
            "initial_lr_schedulers": copy.deepcopy(self._initial_schedulers),
            "initial_groups": copy.deepcopy(self._initial_groups),
        }

    def check_state(self, state: Mapping) -> None:
        """Raise ValueError unless ``state`` (as from ``state_dict``) is of a run with these arguments on a model like
        this: portions, partition, seed, layers, formats, kinds of LR schedulers; shapes and dtypes of its tensors."""
        where = "inq.INQ.load_state_dict"
        hooks.check_keys(where, state, _RUN_KEYS)
        expected = {
            "version": STATE_VERSION,
            "portions": list(self.portions),
            "partition": self.partition,
            "seed": self.seed,
            "reset_optimizer": self.reset_optimizer,
        }
        for key, value in expected.items():
            if state.get(key) != value:
                raise ValueError(f"{where}: {key}: expected {value!r}, as this run was made, got {state.get(key)!r}")
        if list(state["layers"]) != list(self._layers):
            raise ValueError(f"{where}: layers: expected {list(self._layers)}, got {list(state['layers'])}")
        index, in_progress = state["index"], state["in_progress"]
        if type(index) is not int or not -1 <= index < len(self.portions):
            raise ValueError(f"{where}: index: expected −1 to {len(self.portions) - 1}, got {index!r}")
        if not isinstance(in_progress, bool) or (in_progress and index < 0):
            raise ValueError(f"{where}: in_progress: expected a bool that fits index {index}, got {in_progress!r}")
        kinds = [type(s).__name__ for s in self.lr_schedulers]
        if (got := [s["type"] for s in state["lr_schedulers"]]) != kinds:
            raise ValueError(f"{where}: lr_schedulers: expected {kinds}, got {got}")
        for key in ("initial_lr_schedulers", "initial_groups"):
            if len(state[key]) != len(kinds):
                raise ValueError(f"{where}: {key}: expected {len(kinds)}, got {len(state[key])}")
        saved = [s["state"] for s in state["lr_schedulers"]]
        for scheduler, values in zip(self.lr_schedulers * 2, [*saved, *state["initial_lr_schedulers"]], strict=True):
            # torch makes attributes of them, whatever they are called: "step" would take the method's place.
            hidden = [key for key in values if callable(getattr(type(scheduler), key, None))]
            if hidden:
                raise ValueError(f"{where}: lr_schedulers: expected no methods in a state, got {hidden}")
        for name, layer in self._layers.items():
            layer.check_state(state["layers"][name], started=index >= 0)

    def load_state_dict(self, state: Mapping) -> None:
        """Take over a ``state_dict``. Load the model and the optimizer too; frozen weights are written into the model.

        Raises:
            ValueError: it belongs to another run (portions, partition, seed, layers, formats); nothing is changed.
        """
        self.check_state(state)
        for name, layer in self._layers.items():
            layer.load_state(state["layers"][name])
        self._hand_over_masks()
        for scheduler, current in zip(self.lr_schedulers, state["lr_schedulers"], strict=True):
            scheduler.load_state_dict(copy.deepcopy(current["state"]))
        self._initial_schedulers = copy.deepcopy(state["initial_lr_schedulers"])
        self._initial_groups = copy.deepcopy(state["initial_groups"])
        self._index, self._in_progress = state["index"], state["in_progress"]


def _checked_portions(portions: Sequence[float]) -> tuple[float, ...]:
    portions = tuple(portions)
    for portion in portions:
        ops.check_portion("inq.INQ: portions", portion)
    increasing = all(a < b for a, b in zip((0.0, *portions), portions, strict=False))
    if not portions or not increasing or portions[-1] != 1:
        raise ValueError(f"inq.INQ: portions: expected increasing fractions above 0, the last 1, got {portions}")
    return tuple(float(p) for p in portions)


def _choose_layers(
    model: nn.Module,
    fmt: Format,
    overrides: Mapping[str, Format],
    skip: tuple[str, ...],
    prune_masks: Mapping[str, Tensor],
    seed: int,
) -> dict[str, _Layer]:
    for where, value in (("fmt", fmt), *((f"overrides[{k!r}]", v) for k, v in overrides.items())):
        ops.check_format(f"inq.INQ: {where}", value)
    weights = hooks.choose_weights("inq.INQ", model, skip)
    check_patterns("inq.INQ: overrides", overrides, hooks.quantizable(model))
    layers: dict[str, _Layer] = {}
    for name, weight in weights.items():
        mask = prune_masks.get(name)
        if mask is not None:
            _check_prune_mask(f"inq.INQ: weight of layer {name!r}", mask, weight)
        pattern = first_match(overrides, name)
        layers[name] = _Layer(name, weight, fmt if pattern is None else overrides[pattern], mask, seed)
    unknown = [name for name in prune_masks if name not in layers]
    if unknown:
        raise ValueError(f"inq.INQ: prune_masks: expected names of quantized layers {list(layers)}, got {unknown}")
    return layers


def _check_prune_mask(where: str, mask: Tensor, weight: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != weight.shape or is_sharded(mask):
        kind = "a DTensor, " if isinstance(mask, Tensor) and is_sharded(mask) else ""
        got = f"{kind}{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
        raise ValueError(f"{where}: prune mask: expected a plain bool tensor of shape {list(weight.shape)}, got {got}")
    if not bool(mask.any()):
        raise ValueError(f"{where}: prune mask: expected some weight to be kept, got none")


def _hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict]:
    """A copy of each parameter group without its parameters."""
    return [{k: copy.deepcopy(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def _restore_hyperparameters(optimizer: torch.optim.Optimizer, groups: list[dict]) -> None:
    for group, saved in zip(optimizer.param_groups, groups, strict=False):
        for key, value in saved.items():
            if isinstance(value, Tensor) and isinstance(group.get(key), Tensor):
                # Capturable optimizers and compiled steps hold on to the tensor itself.
                group[key].copy_(value)
            else:
                group[key] = copy.deepcopy(value)
