"""``save_pretrained``: a packed transformers model as a directory with checksums, whole or not at all."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from .. import files
from ..checkpoint import _source_dtypes
from ..distributed import Ranks
from ..file_format import (
    INDEX_FILE,
    QUANTIZATION_CONFIG,
    TRANSFORMERS_CONFIG,
    config,
    is_weight,
    json_text,
    model_files,
    module_name,
    open_checkpoint,
    part_names,
    write_file,
)  # fmt: skip
from ..files import CheckpointError
from ..nn import _PackedModule
from ..ops import PackedWeight
from ..transcode import _write_index
from . import tensor_parallel
from .model_names import Names


def save_pretrained(model, directory: str | os.PathLike, *others, **kwargs) -> None:
    """``model.save_pretrained`` into a new directory, which then takes the place of ``directory`` in one step.

    transformers itself deletes old shards before it writes new ones, and writes no checksums: what this writes passes
    ``inq verify``, and after any exception an older checkpoint in ``directory`` is untouched. Under tensor parallelism
    every process calls it, and the first one writes.

    Args:
        model: a transformers model with packed modules, without adapters (PEFT saves those by themselves).
        directory: a name that is free, an empty directory or an older checkpoint, which is replaced as a whole.
        others: what else belongs into it and has ``save_pretrained(directory)``, as a tokenizer.
        kwargs: of ``model.save_pretrained``, as ``max_shard_size``; not ``is_main_process``, ``push_to_hub``,
            ``variant``.

    Raises:
        ValueError: nothing is packed, or adapters are loaded. CheckpointError: ``directory`` is something else, or
            codes are not canonical. OSError: no space, no permission. PeerError: one of these in another process.
    """
    packed = {name: module for name, module in model.named_modules() if isinstance(module, _PackedModule)}
    if not packed:
        raise ValueError(f"save_pretrained: expected a model with packed modules, got none in {type(model).__name__}")
    if (name := _adapted(model)) is not None:
        raise ValueError(
            f"save_pretrained: expected a model without adapters, got {name!r} with one: save those with "
            "model.save_pretrained, or take them away (merge_and_requantize, unload)"
        )
    if refused := {"is_main_process", "push_to_hub", "variant"} & kwargs.keys():
        raise ValueError(f"save_pretrained: expected none of these arguments, got {sorted(refused)}")

    def fill(new: Path) -> None:
        model.save_pretrained(new, **kwargs)
        for other in others:
            other.save_pretrained(new)
        _seal(new, model, packed)

    if tensor_parallel.world_size(model) == 1:
        files.write_directory(directory, fill)
        return
    ranks = Ranks()
    with ranks.together("save_pretrained"):
        # Before the first one asks the others for their parts of the weights.
        if ranks.rank == 0:
            files.check_directory(directory)
    with ranks.together("save_pretrained"):
        if ranks.rank == 0:
            files.write_directory(directory, fill)
        else:  # its parts of the weights are asked for; nothing is written
            with tempfile.TemporaryDirectory() as nowhere:
                model.save_pretrained(nowhere, is_main_process=False, **kwargs)


def _adapted(model) -> str | None:
    """The name of the first module that PEFT has changed, by ``add_adapter`` or ``get_peft_model``: what it makes of
    the names of the weights in it is nothing that ``from_pretrained`` could load."""
    peft = sys.modules.get("peft")
    if peft is None:
        return None
    kinds = (peft.tuners.tuners_utils.BaseTunerLayer, peft.utils.other.AuxiliaryTrainingWrapper)
    return next((name for name, module in model.named_modules() if isinstance(module, kinds)), None)


def _seal(directory: Path, model, packed: dict[str, _PackedModule]) -> None:
    """Give the files that transformers wrote their manifests, and put the configuration into the files' names."""
    names = Names(model)
    modules = {f"{names.in_files(name)}.weight": module for name, module in packed.items()}
    shards = model_files(directory)
    headers = {shard: files.read_header(shard) for shard in shards}
    file_of = {name: shard for shard, header in headers.items() for name in header.tensors}
    if missing := modules.keys() - file_of.keys():
        raise CheckpointError(
            f"{directory}: tensor {min(missing)!r}: expected it among what {type(model).__name__}.save_pretrained wrote"
        )
    # Exponents and scales first: transformers splits shards by size alone, and here they move to their weights.
    rows = {
        part: files.read_tensors(file_of[part], headers[file_of[part]], names=[part])[part]
        for name in modules
        for part in part_names(name)[1:]
        if part in file_of
    }
    # The dtype to unpack to where no bias tells.
    hint = {"dtype": torch.empty(0, dtype=model.dtype)}
    for shard in shards:
        entries: dict[str, PackedWeight | Tensor] = {}
        with files.open_tensors(shard, headers[shard]) as get:
            for name in headers[shard].tensors:
                if name in modules:
                    module = modules[name]
                    shape = getattr(module, "whole_shape", module.shape)
                    exponents, scale = (rows.get(part) for part in part_names(name)[1:])
                    entries[name] = PackedWeight(get(name), exponents, scale, module.format, shape)
                elif name not in rows:
                    entries[name] = get(name)
        if not entries:  # nothing but exponents, which have moved
            shard.unlink()
            continue
        weights = {name: value for name, value in entries.items() if isinstance(value, PackedWeight)}
        biases = {
            n: v for n, v in entries.items() if n.endswith("bias") and f"{n.removesuffix('bias')}weight" in weights
        }
        dtypes = _source_dtypes(shard, {**hint, **biases, **weights})
        write_file(shard, entries, dtypes)
    kept = [shard for shard in shards if shard.exists()]
    if (directory / INDEX_FILE).exists():
        _write_index(directory, {shard.name: files.read_header(shard) for shard in kept})
    ignore = [
        module_name(name)
        for name, shard in file_of.items()
        if is_weight(name) and name not in modules and len(headers[shard].tensors[name].shape) >= 2
    ]
    path = directory / TRANSFORMERS_CONFIG
    content = files.read_json(path, allow_nan=True)
    content[QUANTIZATION_CONFIG] = config({module_name(name): m.format for name, m in modules.items()}, ignore)
    files.write_text(path, json_text(content))
    open_checkpoint(directory)
