"""What each row of a table does: a function from the float32 network of a seed to numbers.

Each takes ``recipe.further`` steps, of the same batches; INQ shares them among its portions. Where pruning comes first,
it takes as many more: DNS, then INQ; Deep Compression's pruning, then its centroids.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import inq_kernels as inq
from inq_kernels import checkpoint, hooks, reference
from inq_kernels.baselines import deep_compression as dc
from inq_kernels.baselines import meter
from inq_kernels.baselines.binary import BWN
from inq_kernels.baselines.straight_through import Method as Projection
from inq_kernels.baselines.straight_through import StraightThrough, first_and_last
from inq_kernels.baselines.ternary import TWN
from inq_kernels.nn import PACKED_TYPES

from .tasks import Task, shares

# What a gap may take in relative indices: Deep Compression gets the best of them for each layer.
INDEX_BITS = range(2, 9)
# Ternary INQ's. The paper has ten, each retrained for as long as others train a network; where all of them share
# ``recipe.further`` steps, few and long ones are better: chosen as ``recipe.coarse_lr`` was.
TERNARY_PORTIONS = (0.3, 0.6, 0.85, 1.0)
# In the file of what DNS leaves: the masks beside the network.
KEPT = "kept."


@dataclass(frozen=True)
class Given:
    """What a method works with.

    Attributes:
        task: the network and its training.
        seed: its number.
        tensors: what the methods named in ``Method.after`` have left.
        results: what they returned.
    """

    task: Task
    seed: int
    tensors: Mapping[str, dict[str, Tensor]]
    results: Mapping[str, dict]

    def model(self, method: str = "float32") -> nn.Module:
        """The network that ``method`` left."""
        model = self.task.build()
        model.load_state_dict({n: t for n, t in self.tensors[method].items() if not n.startswith(KEPT)})
        return model

    def masks(self) -> dict[str, Tensor]:
        """DNS's, by module."""
        return {n.removeprefix(KEPT): t for n, t in self.tensors["dns"].items() if n.startswith(KEPT)}


@dataclass(frozen=True)
class Method:
    """``run`` returns its numbers, and the tensors that others begin with."""

    run: Callable[[Given], tuple[dict, dict[str, Tensor]]]
    after: tuple[str, ...] = ("float32",)


# --- float32 ----------------------------------------------------------------------------------------------------------


def float32(given: Given) -> tuple[dict, dict[str, Tensor]]:
    """What everything starts from."""
    model = given.task.start(given.seed)
    result = {"value": given.task.measure(model), "steps": 0, "sizes": {"float32": _size(meter.measure(model, (), ""))}}
    return result, model.state_dict()


def longer(given: Given) -> tuple[dict, dict]:
    """float32, trained on for as long as the others: what more training alone does."""
    model, steps = given.model(), given.task.recipe.further
    given.task.further(model, steps, given.seed, given.task.recipe.further_lr).train(steps)
    return {"value": given.task.measure(model), "steps": steps}, {}


# --- INQ --------------------------------------------------------------------------------------------------------------


def incremental(given: Given, fmt: inq.Format, partition: str = "magnitude") -> tuple[dict, dict]:
    """INQ with the paper's portions."""
    lr = given.task.recipe.further_lr
    return _quantize(given, given.model(), fmt, inq.PAPER_PORTIONS[fmt.bits], lr, partition=partition), {}


def ternary(given: Given, fmt: inq.Format, partition: str = "magnitude", ends: bool = True) -> tuple[dict, dict]:
    """INQ at 2 bits for T4; without ``ends`` the first and the last layer stay float, as in TWN and BWN."""
    model = given.model()
    skip = () if ends else first_and_last(model)
    lr = given.task.recipe.coarse_lr
    return _quantize(given, model, fmt, TERNARY_PORTIONS, lr, partition=partition, skip=skip), {}


def _quantize(
    given: Given, model: nn.Module, fmt: inq.Format, portions: Sequence[float], lr: float, **how: object
) -> dict:
    """INQ, measured as packed."""
    task, parts = given.task, shares(given.task.recipe.further, len(portions))
    trainer = task.further(model, max(parts), given.seed, lr)
    run = inq.INQ(model, trainer.optimizer, fmt, portions, lr_schedulers=trainer.scheduler, seed=given.seed, **how)
    for _, steps in zip(run, parts, strict=True):
        trainer.train(steps)
    run.close()
    report = inq.convert(model, run.formats)
    if inexact := [m.name for m in report.modules if m.packed and m.sqnr_db != math.inf]:
        raise RuntimeError(f"tables: {fmt}: expected weights on the grid after INQ, not in {inexact}")
    layers = {"packed": meter.inq_layers(model), "coded": meter.inq_layers(model, coded_bytes(model))}
    layers["relative"] = [
        relative_layer(size, module.packed) for size, module in zip(layers["packed"], _packed(model), strict=True)
    ]
    sizes = {name: _size(meter.measure(model, each, name)) for name, each in layers.items()}
    return {"value": task.measure(model), "steps": sum(parts), "portions": list(portions), "sizes": sizes}


def _packed(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, tuple(PACKED_TYPES.values()))]


def coded_bytes(model: nn.Module) -> dict[str, int]:
    """What ``inq.save(compress=True)`` really stores of the codes of each layer; not of those that it leaves packed."""
    with tempfile.TemporaryDirectory() as folder:
        inq.save(model, Path(folder, "model.safetensors"), compress=True)
        layers = checkpoint.inspect(Path(folder, "model.safetensors")).layers
    # A layer's bytes there are with its exponents, one a row.
    return {layer.name: layer.bytes - layer.shape[0] for layer in layers if layer.coding != "packed"}


def relative_layer(size: meter.LayerSize, packed: inq.PackedWeight) -> meter.LayerSize:
    """INQ's codes as Deep Compression stores its own: relative indices and Huffman codes."""
    n, k, fmt = packed.shape[0], packed.k, packed.format
    storage = packed.weight
    if packed.layout != "storage":
        storage = torch.ops.inq.unprepack(storage, n, k, fmt.bits, fmt.levels, packed.layout)
    codes = reference.unpack_codes(storage, fmt.bits, k).reshape(-1).long()
    parts = _smallest(dc.sparse_parts(codes, fmt.bits, gap) for gap in INDEX_BITS)
    return meter.LayerSize(size.name, size.shape, size.nonzero, size.entropy, **parts, exponents=size.exponents)


def _smallest(all_parts: Iterable[dict[str, int]]) -> dict[str, int]:
    return min(all_parts, key=lambda parts: sum(parts.values()))


# --- ternary and binary -----------------------------------------------------------------------------------------------


def straight_through(given: Given, projection: Projection, ends: bool = False) -> tuple[dict, dict]:
    """TWN or BWN; without ``ends`` the first and the last layer stay float, as published."""
    model, recipe = given.model(), given.task.recipe
    steps = recipe.further
    trainer = given.task.further(model, steps, given.seed, recipe.coarse_lr)
    run = StraightThrough(model, trainer.optimizer, projection, skip=() if ends else first_and_last(model))
    trainer.train(steps)
    size = _size(meter.measure(model, run.sizes(), ""))
    result = {"value": given.task.measure(model), "steps": steps, "sizes": {"packed": size}}
    run.close()
    return result, {}


# --- pruning first ----------------------------------------------------------------------------------------------------


def surgery(given: Given) -> tuple[dict, dict[str, Tensor]]:
    """DNS; its thresholds by ``recipe.c_rates``."""
    model, task = given.model(), given.task
    steps = task.recipe.further
    trainer = task.further(model, steps, given.seed, task.recipe.coarse_lr)
    run = inq.DNS(
        model, trainer.optimizer, 0.0, overrides=_c_rates(model, task.recipe.c_rates), iter_stop=2 * steps // 3,
        gamma=1e-3, seed=given.seed,
    )  # fmt: skip
    trainer.train(steps)
    masks = run.finish()
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    result = {"value": task.measure(model), "steps": steps, "kept": kept, "fraction": _fraction(masks)}
    return result, {**model.state_dict(), **{KEPT + name: mask for name, mask in masks.items()}}


def _c_rates(model: nn.Module, rates: Sequence[float]) -> dict[str, float]:
    first, conv, linear, last = rates
    found = {n: linear if isinstance(m, nn.Linear) else conv for n, m in hooks.quantizable(model).items()}
    names = list(found)
    return found | {names[0]: first, names[-1]: last}


def _fraction(masks: Mapping[str, Tensor]) -> float:
    return sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


def surgery_incremental(given: Given, bits: int) -> tuple[dict, dict]:
    """INQ of the weights that DNS kept; its exponents by ``mse``."""
    model, masks, lr = given.model("dns"), given.masks(), given.task.recipe.coarse_lr
    result = _quantize(given, model, inq.Format(bits), inq.DNS_PORTIONS, lr, prune_masks=masks)
    return {**result, "steps": 2 * result["steps"], "fraction": _fraction(masks)}, {}


def deep_pruning(given: Given) -> tuple[dict, dict[str, Tensor]]:
    """Deep Compression's pruning: the largest weights, in each layer as many as DNS kept there."""
    model, steps, masks = given.model(), given.task.recipe.further, given.masks()
    dc.prune_(model, {name: int(mask.sum()) / mask.numel() for name, mask in masks.items()})
    given.task.further(model, steps, given.seed, given.task.recipe.coarse_lr).train(steps)
    dc.finish_pruning_(model)
    result = {"value": given.task.measure(model), "steps": steps, "fraction": _fraction(masks)}
    return result, model.state_dict()


def deep_compression(given: Given, conv: int, linear: int) -> tuple[dict, dict]:
    """Its codebooks, trained; the sizes with and without Huffman codes."""
    model, steps = given.model("dc-prune"), given.task.recipe.further
    bits = dc.conv_and_linear(model, conv, linear)
    dc.share_(model, bits)
    given.task.centroids(model, steps, given.seed).train(steps)
    dc.finish_sharing_(model)
    sizes = {}
    for name, coded in (("P+Q", False), ("P+Q+H", True)):
        layers = [
            min(
                (dc.layer_size(n, m.weight.detach(), bits[n], gap, coded=coded) for gap in INDEX_BITS),
                key=lambda layer: layer.bits,
            )
            for n, m in hooks.quantizable(model).items()
        ]
        sizes[name] = _size(meter.measure(model, layers, name))
    fraction = given.results["dc-prune"]["fraction"]
    return {"value": given.task.measure(model), "steps": 2 * steps, "fraction": fraction, "sizes": sizes}, {}


def _size(size: meter.Size) -> dict:
    """``streams`` is the compressed weights' ratio without codebooks, exponents, scales and tables, which weigh nothing
    on large networks."""
    weights = 4 * sum(layer.numel for layer in size.layers)
    streams = sum(size.part(part) for part in ("codes", "indices", "padding"))
    return {
        "bytes": size.bytes,
        "ratio": size.ratio,
        "weight_ratio": size.weight_ratio,
        "streams_ratio": weights / streams if streams else 1.0,
        "entropy_bytes": size.entropy_bytes,
    }


# --- all of them ------------------------------------------------------------------------------------------------------


def _inq(fmt: inq.Format, **how: object) -> Method:
    return Method(functools.partial(incremental, fmt=fmt, **how))


METHODS = {
    "float32": Method(float32, ()),
    "longer": Method(longer),
    **{f"inq-{bits}": _inq(inq.Format.paper(bits)) for bits in (5, 4, 3, 2)},
    "inq-5-random": _inq(inq.Format.paper(5), partition="random"),
    **{
        f"{name}{suffix}": Method(functools.partial(straight_through, projection=projection, ends=ends))
        for name, projection in (("twn", TWN()), ("bwn", BWN()))
        for suffix, ends in (("", False), ("-all", True))
    },
    "inq-2-mse": Method(functools.partial(ternary, fmt=inq.Format(2))),
    "inq-2-mse-random": Method(functools.partial(ternary, fmt=inq.Format(2), partition="random")),
    **{
        f"inq-2-mse-channel{suffix}": Method(
            functools.partial(ternary, fmt=inq.Format(2, granularity="channel"), ends=ends)
        )
        for suffix, ends in (("", True), ("-ends", False))
    },
    "inq-4-dense": _inq(inq.Format(4, "dense", "tensor", "max")),
    "inq-5-channel": _inq(inq.Format(5, "paper", "channel", "max")),
    "inq-4-dense-channel": _inq(inq.Format(4, "dense", "channel", "max")),
    "dns": Method(surgery),
    **{f"dns-inq-{b}": Method(functools.partial(surgery_incremental, bits=b), ("float32", "dns")) for b in (5, 4, 3)},
    "dc-prune": Method(deep_pruning, ("float32", "dns")),
    **{
        f"dc-{conv}-{linear}": Method(functools.partial(deep_compression, conv=conv, linear=linear), ("dc-prune",))
        for conv, linear in ((8, 5), (4, 2))
    },
}
