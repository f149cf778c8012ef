"""Packed models to files and back: ``save``, ``load``, ``inspect``, ``verify``. What is inside: ``file_format``."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from . import files, ops, reference
from .file_format import (
    CONFIG_FILE,
    MODEL_FILE,
    Checkpoint,
    Entries,
    Entry,
    code_pieces,
    config,
    json_text,
    module_name,
    open_checkpoint,
    part_names,
    some,
    stays_float,
    write_file,
)  # fmt: skip
from .files import CheckpointError
from .format import N1_MIN, Format
from .nn import _PackedModule, _why_not, prepack, replacement
from .ops import PackedWeight


def save(
    model: nn.Module | Mapping[str, PackedWeight | Tensor], path: str | os.PathLike, compress: bool = False
) -> None:
    """Write a converted model, whole or not at all: after any error an older file or directory is as it was.

    Args:
        model: a model with ``inq.Linear`` or ``inq.Conv2d`` modules (``inq.convert`` makes them), on any real device,
            or a mapping as ``load`` returns it. Parameters and persistent buffers are stored; tied ones for each name.
        path: a name ending in ``.safetensors``: one file. Else a directory with model.safetensors and inq.json, which
            may replace an older checkpoint. The parent directory must exist.
        compress: entropy-code the codes, losslessly: a smaller file, of format version 2, that ``load`` decodes. Needs
            zstandard (the extra ``compress``), here and wherever the file is read.

    Raises:
        CheckpointError: a name that files cannot have, codes that are not canonical, or a directory at ``path`` that is
            no checkpoint. ValueError, TypeError: nothing is packed, or state that is no tensor with values.
        OSError: no space, no directory, no permission. ImportError: zstandard is missing.
    """
    path = Path(path)
    if isinstance(model, nn.Module):
        entries, ignore = _model_entries(model)
    elif isinstance(model, Mapping):
        entries = dict(model)
        ignore = [module_name(name) for name, value in entries.items() if stays_float(name, value)]
    else:
        raise TypeError(f"inq.save: model: expected a torch.nn.Module or a mapping, got {type(model).__name__}")
    formats = {module_name(name): value.format for name, value in entries.items() if isinstance(value, PackedWeight)}
    if not formats:
        raise ValueError("inq.save: model: expected at least one packed module, got none: call inq.convert first")
    configuration = config(formats, ignore, compress)
    dtypes = _source_dtypes(path, entries)
    if path.suffix == ".safetensors":
        write_file(path, entries, dtypes, configuration, compress)
        return

    def fill(directory: Path) -> None:
        write_file(directory / MODEL_FILE, entries, dtypes, compress=compress)
        files.write_text(directory / CONFIG_FILE, json_text(configuration))
        open_checkpoint(directory)

    files.write_directory(path, fill)


def _slots(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Every name of a parameter or persistent buffer, as in ``state_dict``: its module and its name there."""
    slots = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        buffers = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for name, tensor in {**module._parameters, **buffers}.items():
            if tensor is not None:
                slots[f"{prefix}.{name}" if prefix else name] = (module, name)
    return slots


def _model_entries(model: nn.Module) -> tuple[Entries, list[str]]:
    """What of ``model`` is stored, and the names of its Linear and convolution modules that stayed float."""
    slots = _slots(model)
    if odd := set(model.state_dict()) ^ set(slots):
        raise ValueError(
            f"inq.save: model: expected a state_dict of parameters and persistent buffers, got {some(odd)} "
            "besides (extra state, or hooks that rename)"
        )
    entries: Entries = {}
    ignore = []
    for name, (module, attribute) in slots.items():
        if not isinstance(module, _PackedModule):
            entries[name] = getattr(module, attribute)
        elif attribute == "weight":
            entries[name] = module.packed
        elif attribute not in ("weight_exp", "weight_scale"):
            entries[name] = getattr(module, attribute)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and not isinstance(module, _PackedModule):
            ignore.append(name)
    return entries, ignore


def _source_dtypes(path: Path, entries: Mapping[str, PackedWeight | Tensor]) -> dict[str, torch.dtype]:
    """The dtype to unpack each packed weight to: its bias's, else the most common one of the float tensors, if that
    holds all its values (so not with a row scale); else float32."""
    common = Counter(
        value.dtype for value in entries.values() if isinstance(value, Tensor) and value.dtype in ops.FLOATS
    )
    fallback = common.most_common(1)[0][0] if common else torch.float32
    dtypes = {}
    for name, value in entries.items():
        if not isinstance(value, PackedWeight):
            continue
        bias = entries.get(f"{name.removesuffix('weight')}bias")
        dtype = bias.dtype if isinstance(bias, Tensor) and bias.dtype in ops.FLOATS else fallback
        n1 = files.plain(f"{path}: tensor {part_names(name)[1]!r}", value.weight_exp).flatten().tolist()
        low, high = reference.exponent_limits(dtype)
        # Levels under N1_MIN are in no file, so only float16's narrower limits can be missed.
        fits = low == N1_MIN or all(low <= value.format.n2(n) and n <= high for n in n1)
        dtypes[name] = dtype if fits and value.weight_scale is None else torch.float32
    return dtypes


def load(path: str | os.PathLike, model: nn.Module | None = None) -> Entries | nn.Module:
    """Read what ``save`` wrote, after checking all of it; never pickle.

    Args:
        path: a .safetensors file, or a directory with model.safetensors (or shards and their index) and inq.json (or a
            config.json with ``quantization_config``).
        model: None, or the model to fill. Packed weights go into its ``inq.Linear`` and ``inq.Conv2d`` of the same
            format and shape, or replace torch.nn.Linear and torch.nn.Conv2d of the same shape; all else must be there
            under the same name, in the same dtype and shape. Values go to the device where the model's are; from the
            meta device to the CPU, with new Parameters. Buffers that are not persistent are the caller's matter.

    Returns:
        Without a model, name → ``PackedWeight`` (under NAME.weight) or tensor, on the CPU. Else ``model``, changed in
        place; after any error it is bit for bit as it was.

    Raises:
        CheckpointError: a file or the model is not as expected. OSError: a file cannot be read. ImportError: it is
            entropy-coded, and zstandard is not installed.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"inq.load: model: expected a torch.nn.Module, got {type(model).__name__}")
    checkpoint = open_checkpoint(path)
    if model is None:
        return dict(checkpoint.entries())
    _fill_model(model, checkpoint)
    return prepack(model)


# --- into a model -----------------------------------------------------------------------------------------------------


def _fill_model(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Everything that can fail comes first: checks without data, then data, then new modules; then one short commit."""
    slots = _slots(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    targets = {name: _packed_target(model, modules, owners, checkpoint, name) for name in checkpoint.parts}
    _check_names(checkpoint, slots, targets)
    _check_tied(checkpoint, slots, targets)

    values: dict[int, Tensor] = {}  # by the id of the tensor of the model that each is for
    replacements: dict[int, nn.Module] = {}  # by the id of the module that each replaces
    codes: dict[int, tuple[_PackedModule, PackedWeight]] = {}
    for name, value in checkpoint.entries():
        if name not in targets:
            module, attribute = slots[name]
            old = getattr(module, attribute)
            # Its strides, too: a channels-last model stays one.
            values[id(old)] = torch.empty_like(old.detach(), device=_device(old)).copy_(value)
            continue
        module, packed = targets[name], _to(value, _device(targets[name].weight))
        if isinstance(module, _PackedModule):
            codes[id(module)] = (module, packed)
        elif id(module) not in replacements:
            replacements[id(module)] = replacement(module, packed)

    undo = _Undo()
    try:
        for module, attribute in slots.values():
            if id(old := getattr(module, attribute)) in values:
                undo.remember(module, old)
                _assign(replacements.get(id(module), module), attribute, old, values)
        for module, packed in codes.values():
            undo.remember(module)
            module._set_codes(packed.weight, packed.weight_exp, packed.weight_scale)
        for parent in list(model.modules()):
            for child_name, child in parent._modules.items():
                if id(child) in replacements:
                    undo.remember(parent)
                    parent._modules[child_name] = replacements[id(child)]
    except BaseException:
        undo.all()
        raise


def _device(tensor: Tensor) -> torch.device:
    return torch.device("cpu") if tensor.device.type == "meta" else tensor.device


def _to(packed: PackedWeight, device: torch.device) -> PackedWeight:
    scale = None if packed.weight_scale is None else packed.weight_scale.to(device)
    return PackedWeight(packed.weight.to(device), packed.weight_exp.to(device), scale, packed.format, packed.shape)


def _packed_target(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    owners: Mapping[int, list[str]],
    checkpoint: Checkpoint,
    name: str,
) -> nn.Module | None:
    """The module that the packed weight ``name`` goes into or replaces; None where the model has none of that name."""
    where = f"{checkpoint.file_of[name]}: tensor {name!r}"
    module, entry = modules.get(module_name(name)), checkpoint.manifest[name]
    if module is None:
        return None
    if isinstance(module, _PackedModule):
        if module.format != entry.format:
            raise CheckpointError(f"{where}: expected {module.format} of the model's module, got {entry.format}")
        shape = module.shape
    else:
        reason = _why_not(model, module_name(name), module, owners)
        if reason is None and module is model:
            reason = "is the model itself: load into an inq.Linear or inq.Conv2d"
        if reason is not None:
            raise CheckpointError(
                f"{where}: expected a module that can be packed, got {type(module).__name__}: {reason}"
            )
        shape = tuple(module.weight.shape)
    if shape != entry.shape:
        raise CheckpointError(f"{where}: expected shape {list(shape)} of the model's module, got {list(entry.shape)}")
    return module


def _check_names(
    checkpoint: Checkpoint,
    slots: Mapping[str, tuple[nn.Module, str]],
    targets: Mapping[str, nn.Module | None],
) -> None:
    """That the file has just the model's names, and dtypes and shapes are the model's."""
    for name, (module, attribute) in slots.items():
        if isinstance(module, _PackedModule) and attribute == "weight" and name not in targets:
            entry = checkpoint.manifest.get(name)
            got = "none" if entry is None else f"{entry.dtype} {list(entry.shape)}"
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name!r}: expected a packed weight for the model's "
                f"inq.{type(module).__name__}, got {got}"
            )
    packed_parts = {part for name, module in targets.items() if module is not None for part in part_names(name)}
    expected = {name for name in slots if name not in packed_parts}
    got = {name for name in checkpoint.manifest if name not in packed_parts}
    missing, unexpected = expected - got, got - expected
    if missing or unexpected:
        raise CheckpointError(
            f"{checkpoint.path}: expected the model's names, missing {some(missing) or 'none'}; "
            f"unexpected {some(unexpected) or 'none'}"
        )
    for name in expected:
        module, attribute = slots[name]
        old, entry = getattr(module, attribute), checkpoint.manifest[name]
        if (entry.dtype, entry.shape) != (old.dtype, tuple(old.shape)):
            raise CheckpointError(
                f"{checkpoint.file_of[name]}: tensor {name!r}: expected {old.dtype} {list(old.shape)} of the model, "
                f"got {entry.dtype} {list(entry.shape)}"
            )


def _check_tied(
    checkpoint: Checkpoint,
    slots: Mapping[str, tuple[nn.Module, str]],
    targets: Mapping[str, nn.Module | None],
) -> None:
    """Names that are one tensor in the model must have one value in the file."""
    first: dict[tuple[int, str], tuple[str, Entry | None]] = {}

    def compare(key: tuple[int, str], name: str) -> None:
        entry = checkpoint.manifest.get(name)
        other, expected = first.setdefault(key, (name, entry))
        if entry != expected:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name!r}: expected the values of {other!r}, "
                "with which the model shares it, got others"
            )

    for name, module in targets.items():
        for part in part_names(name):
            compare((id(module), part[len(name) :]), part)
    for name, (module, attribute) in slots.items():
        if name in checkpoint.manifest and name not in targets:
            compare((id(getattr(module, attribute)), ""), name)


def _assign(module: nn.Module, attribute: str, old: Tensor, values: dict[int, Tensor]) -> None:
    """Give a parameter or buffer its new values. The object stays the same, for optimizers and tied weights, unless it
    is on the meta device; then all its names get one new object."""
    new = values[id(old)]
    if old.device.type != "meta":
        old.data = new
        return
    if isinstance(old, nn.Parameter) and not isinstance(new, nn.Parameter):
        new = values[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad)
    setattr(module, attribute, new)


class _Undo:
    """The way back from a commit that failed halfway."""

    def __init__(self) -> None:
        self._contents: dict[int, tuple[dict, dict]] = {}
        self._data: list[tuple[Tensor, Tensor]] = []

    def remember(self, module: nn.Module, tensor: Tensor | None = None) -> None:
        """Before ``module``'s own tensors and children change, or the values of ``tensor``."""
        for content in (module._parameters, module._buffers, module._modules):
            self._contents.setdefault(id(content), (content, dict(content)))
        if tensor is not None:
            self._data.append((tensor, tensor.data))

    def all(self) -> None:
        for tensor, data in reversed(self._data):
            if tensor.device.type != "meta":
                tensor.data = data
        for content, before in self._contents.values():
            content.clear()
            content.update(before)


# --- what is inside ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One packed weight: stored bits a weight (with exponents and scales), the range of its exponents, the fraction of
    zeros, the entropy of its codes in bits a weight, under which no lossless code of single weights can go, the stored
    bytes (again with exponents and scales), and how the codes are stored: "packed", or the name of their coder."""

    name: str
    shape: tuple[int, ...]
    format: Format
    bits: float
    exponents: tuple[int, int]
    zeros: float
    entropy: float
    bytes: int
    coding: str


@dataclass(frozen=True)
class Summary:
    """A checkpoint that passed every check: its packed layers and its sizes in bytes. ``float32_bytes`` is what all
    its floating tensors and packed weights would take in float32, and the others as they are."""

    path: Path
    layers: list[Layer]
    tensors: int
    files: int
    file_bytes: int
    float32_bytes: int

    @property
    def weights(self) -> int:
        """How many weights are packed."""
        return sum(math.prod(layer.shape) for layer in self.layers)

    @property
    def bits(self) -> float:
        """Stored bits of a packed weight, as ``Layer.bits``, over all layers."""
        return 8 * sum(layer.bytes for layer in self.layers) / self.weights

    @property
    def entropy(self) -> float:
        """The bound of ``Layer.entropy`` over all layers: each coded by itself."""
        return sum(layer.entropy * math.prod(layer.shape) for layer in self.layers) / self.weights

    @property
    def ratio(self) -> float:
        """How many times smaller than float32 the files are."""
        return self.float32_bytes / self.file_bytes


def inspect(path: str | os.PathLike) -> Summary:
    """Read and check a whole checkpoint, one tensor at a time, and describe it. Raises as ``load``."""
    checkpoint = open_checkpoint(path)
    layers, float32_bytes = [], 0
    for name, value in checkpoint.entries():
        if isinstance(value, PackedWeight):
            layers.append(_layer(checkpoint, name, value))
            float32_bytes += 4 * math.prod(value.shape)
        else:
            float32_bytes += value.numel() * (4 if value.is_floating_point() else value.element_size())
    size = sum(file.stat().st_size for file in checkpoint.headers)
    return Summary(checkpoint.path, layers, len(checkpoint.manifest), len(checkpoint.headers), size, float32_bytes)


def verify(path: str | os.PathLike) -> int:
    """Read and check a whole checkpoint, one tensor at a time; how many tensors it holds. Raises as ``load``."""
    checkpoint = open_checkpoint(path)
    for _ in checkpoint.entries():
        pass
    return len(checkpoint.manifest)


def _layer(checkpoint: Checkpoint, name: str, packed: PackedWeight) -> Layer:
    counts = torch.zeros(1 << packed.format.bits, dtype=torch.int64, device=packed.weight.device)
    for piece in code_pieces(packed):
        codes = reference.unpack_codes(piece.weight, piece.format.bits, piece.k)
        counts += torch.bincount(codes.reshape(-1), minlength=counts.numel())
    numel = math.prod(packed.shape)
    portions = [count / numel for count in counts.tolist() if count]
    infos = [checkpoint.headers[checkpoint.file_of[part]].tensors[part] for part in checkpoint.parts[name]]
    stored = sum(info.end - info.begin for info in infos)
    coding = checkpoint.manifest[name].coding
    return Layer(
        module_name(name),
        packed.shape,
        packed.format,
        8 * stored / numel,
        (int(packed.weight_exp.min()), int(packed.weight_exp.max())),
        int(counts[0]) / numel,
        -sum(p * math.log2(p) for p in portions) + 0.0,
        stored,
        "packed" if coding is None else coding.name,
    )
