"""Bytes on disk, for every method by the same rules: codes, indices, padding, codebooks, exponents, scales, tables,
headers, and what stayed float, each apart. docs/comparisons.md says what is counted and why.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import save
from torch import Tensor, nn

from .. import reference
from ..nn import PACKED_TYPES
from ..ops import PackedWeight
from ..table import render

# What a compressed weight is made of, in bits; ``LayerSize`` explains each.
PARTS = ("codes", "indices", "padding", "codebooks", "exponents", "scales", "tables")


@dataclass(frozen=True)
class LayerSize:
    """One compressed weight; the parts are in bits, each of a stream of whole bytes (``padding`` fills them up).

    Attributes:
        name: of the module; its weight is ``name.weight`` in the model's ``state_dict``.
        shape: of the weight.
        nonzero: how many weights are not 0.
        entropy: a bound for the codes, in bits: weights × the entropy of the quantized weight's values, zeros included,
            each value for itself (order 0). No code of single values is shorter; one that sees neighbours may be.
        codes: what names the values.
        indices: where the nonzero ones are, in sparse formats.
        padding: what carries nothing: filler entries of relative indices (their codes too), codes that fill up a row,
            bits that fill up a byte.
        codebooks: the values that codes name.
        exponents: n1 of INQ's rows.
        scales: float factors.
        tables: what a decoder of variable-length codes needs to know of them.
    """

    name: str
    shape: tuple[int, ...]
    nonzero: int
    entropy: float
    codes: int = 0
    indices: int = 0
    padding: int = 0
    codebooks: int = 0
    exponents: int = 0
    scales: int = 0
    tables: int = 0

    @property
    def numel(self) -> int:
        """All weights, zeros included."""
        return math.prod(self.shape)

    @property
    def bits(self) -> int:
        """All parts."""
        return sum(getattr(self, part) for part in PARTS)

    @property
    def bits_per_weight(self) -> float:
        """All parts, over all weights."""
        return self.bits / self.numel


@dataclass(frozen=True)
class Size:
    """A model's size by one method; ``print`` it for a table.

    Attributes:
        method: what the table is headed with.
        layers: the compressed weights.
        floats: bytes of every other tensor by its name: biases, norms and their statistics, layers left float.
        header: bytes of the container's header: names, shapes, places.
        float32_bytes: of the whole model in float32, without a header.
    """

    method: str
    layers: tuple[LayerSize, ...]
    floats: Mapping[str, int]
    header: int
    float32_bytes: int

    @property
    def weight_bytes(self) -> int:
        """The compressed weights alone, all parts."""
        return sum(layer.bits for layer in self.layers) // 8

    @property
    def bytes(self) -> int:
        """Everything: the size of the file."""
        return self.weight_bytes + sum(self.floats.values()) + self.header

    @property
    def ratio(self) -> float:
        """How many times smaller than float32 the whole file is: everything counts."""
        return self.float32_bytes / self.bytes

    @property
    def weight_ratio(self) -> float:
        """The same of the compressed weights alone, without header and what stayed float; 1 if there are none."""
        if not self.layers:
            return 1.0
        return 4 * sum(layer.numel for layer in self.layers) / self.weight_bytes

    def part(self, name: str) -> float:
        """Bytes of one of ``PARTS`` over all layers."""
        return sum(getattr(layer, name) for layer in self.layers) / 8

    @property
    def entropy_bytes(self) -> float:
        """The layers' entropy bounds: compare with the parts ``codes``, ``indices`` and ``padding`` together."""
        return sum(layer.entropy for layer in self.layers) / 8

    def __str__(self) -> str:
        used = [part for part in PARTS if any(getattr(layer, part) for layer in self.layers)]
        headers = ("layer", "weights", "nonzero", *used, "bytes", "bits/weight", "entropy bound")
        rows: list[tuple] = [
            (
                *(layer.name, layer.numel, layer.nonzero, *(f"{getattr(layer, part) / 8:g}" for part in used)),
                *(layer.bits // 8, f"{layer.bits_per_weight:.3f}", f"{layer.entropy / 8:.0f}"),
            )
            for layer in self.layers
        ]
        blank = ("",) * len(used)
        rows += [(name, "", "", *blank, size, "", "") for name, size in self.floats.items()]
        rows.append(("header", "", "", *blank, self.header, "", ""))
        parts = (f"{self.part(part):g}" for part in used)
        numel, nonzero = (sum(getattr(layer, what) for layer in self.layers) for what in ("numel", "nonzero"))
        rows.append(("all", numel, nonzero, *parts, self.bytes, "", f"{self.entropy_bytes:.0f}"))
        return (
            f"{self.method}: {self.ratio:.2f}× smaller than float32 ({self.weight_ratio:.2f}× its weights alone)\n"
            f"{render(headers, rows)}"
        )


def measure(model: nn.Module, layers: Iterable[LayerSize], method: str) -> Size:
    """The size of ``model`` with these weights compressed, and every other tensor of its state stored as it is.

    Args:
        model: quantized; packed or plain.
        layers: sizes of compressed weights by the name of their module. Every packed module must be among them.
        method: what to call it.

    Raises:
        ValueError: a layer is not the model's, or not of its shape, or a packed module's size is missing.
    """
    layers = tuple(layers)
    modules = dict(model.named_modules(remove_duplicate=False))
    packed = {name for name, module in modules.items() if isinstance(module, tuple(PACKED_TYPES.values()))}
    by_name = {layer.name: layer for layer in layers}
    if len(by_name) != len(layers):
        raise ValueError(f"meter.measure: layers: expected each module once, got {[layer.name for layer in layers]}")
    if missing := packed - by_name.keys():
        raise ValueError(
            f"meter.measure: layers: expected the sizes of all packed modules, got none of {min(missing)!r}"
        )
    counted: set[int] = set()
    for name, layer in by_name.items():
        module = modules.get(name)
        if not isinstance(getattr(module, "weight", None), Tensor):
            raise ValueError(f"meter.measure: layers: expected modules with a weight, got {name!r}")
        shape = module.shape if name in packed else tuple(module.weight.shape)
        if shape != layer.shape:
            raise ValueError(f"meter.measure: layer {name!r}: expected shape {list(shape)}, got {list(layer.shape)}")
        parts = (getattr(module, part, None) for part in ("weight", "weight_exp", "weight_scale"))
        counted |= {id(part) for part in parts if part is not None}
    floats: dict[str, Tensor] = {}
    for prefix, module in modules.items():
        buffers = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for name, tensor in {**module._parameters, **buffers}.items():
            # Shared tensors are stored once.
            if tensor is not None and id(tensor) not in counted:
                counted.add(id(tensor))
                floats[f"{prefix}.{name}" if prefix else name] = tensor
    weights = sum(layer.numel for layer in layers)
    others = sum(t.numel() * (4 if t.is_floating_point() else t.element_size()) for t in floats.values())
    return Size(
        method, layers, {name: t.nbytes for name, t in floats.items()}, _header(layers, floats), 4 * weights + others
    )


def _header(layers: Iterable[LayerSize], floats: Mapping[str, Tensor]) -> int:
    """Bytes of the safetensors header for one tensor a part of each layer and one for each float, and the shapes of the
    layers' weights."""
    tensors = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in floats.items()}
    for layer in layers:
        for part in PARTS:
            # Padding lies in the others.
            if part != "padding" and (bits := getattr(layer, part)):
                tensors[f"{layer.name}.{part}"] = torch.empty(-(-bits // 8), dtype=torch.uint8)
    shapes = json.dumps({layer.name: layer.shape for layer in layers}, separators=(",", ":"))
    return len(save(tensors, {"shapes": shapes})) - sum(tensor.nbytes for tensor in tensors.values())


def entropy_bits(symbols: Tensor) -> float:
    """Values × the entropy of their frequencies: what no code of single values goes below."""
    counts = torch.unique(symbols, return_counts=True)[1].double()
    return float((counts * (counts.sum() / counts).log2()).sum())


def fill(bits: int) -> int:
    """Bits that fill the last byte of a stream of ``bits``."""
    return -bits % 8


# --- INQ --------------------------------------------------------------------------------------------------------------


def inq_layer(name: str, packed: PackedWeight, coded_bytes: int | None = None) -> LayerSize:
    """A weight that INQ packed: its codes and one byte a row for n1, as its file holds them.

    Args:
        name: of its module.
        packed: the weight, in any layout.
        coded_bytes: the size of its codes after entropy coding, all that the decoder needs of them included; None: as
            they are packed, ``bits`` a weight and rows filled up to whole bytes.
    """
    fmt, n, k = packed.format, packed.shape[0], packed.k
    storage = packed.weight
    if packed.layout != "storage":
        storage = torch.ops.inq.unprepack(storage, n, k, fmt.bits, fmt.levels, packed.layout)
    codes = reference.unpack_codes(storage, fmt.bits, k)
    raw = 8 * n * fmt.row_bytes(k)
    size = {"codes": fmt.bits * n * k, "padding": raw - fmt.bits * n * k}
    if coded_bytes is not None:
        size = {"codes": 8 * coded_bytes}
    return LayerSize(
        name,
        tuple(packed.shape),
        int((codes != 0).sum()),
        entropy_bits(codes),
        **size,
        exponents=8 * packed.weight_exp.nbytes,
        scales=0 if packed.weight_scale is None else 8 * packed.weight_scale.nbytes,
    )


def inq_layers(model: nn.Module, coded_bytes: Mapping[str, int] | None = None) -> list[LayerSize]:
    """``inq_layer`` of each packed module of a converted model (``inq.convert``).

    Args:
        model: with ``inq.Linear`` or ``inq.Conv2d`` modules.
        coded_bytes: sizes of entropy-coded codes by module name; what it does not name is counted as packed.

    Raises:
        ValueError: ``coded_bytes`` names a module that is not packed.
    """
    coded_bytes = coded_bytes or {}
    packed = {n: m.packed for n, m in model.named_modules() if isinstance(m, tuple(PACKED_TYPES.values()))}
    if unknown := coded_bytes.keys() - packed.keys():
        raise ValueError(f"meter.inq_layers: coded_bytes: expected packed modules {list(packed)}, got {min(unknown)!r}")
    return [inq_layer(name, value, coded_bytes.get(name)) for name, value in packed.items()]
