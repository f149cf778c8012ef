"""The files that fuzzing begins with, generated: small ones, since most of an execution's time is its tensors'."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

import inq_kernels as inq
from fuzz import structure
from inq_kernels.file_format import write_file
from inq_kernels.format import BITS, LEVELS

# Above this, nothing is fuzzed: time goes into copying.
MAX_BYTES = 1 << 15


def packed(fmt: inq.Format, scale: bool = False) -> inq.PackedWeight:
    """[2, 5] of random codes; the rows end inside a byte group, so that there is padding to spoil."""
    g = torch.Generator().manual_seed(fmt.bits)
    w = inq.pack(inq.quantize(torch.randn(2, 5, generator=g), fmt), fmt)
    row_scale = torch.tensor([[0.5], [-3.0]]) if scale else None
    return inq.PackedWeight(w.weight, w.weight_exp, row_scale, fmt, w.shape)


def model() -> nn.Module:
    """What "load into a model" fills: packed and float modules, buffers of two dtypes, one tied weight."""
    fmt = inq.Format(4)
    net = nn.Module()
    net.fc = inq.Linear(5, 2, fmt=fmt)
    net.conv = nn.Conv2d(1, 2, (1, 3))
    net.norm = nn.BatchNorm1d(2)
    net.again = net.fc
    return net


def training() -> tuple[nn.Module, torch.optim.Optimizer, inq.INQ]:
    """A run as small as one can be."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3])
    return net, optimizer, inq.INQ(net, optimizer, inq.Format(3), (0.5, 1.0), lr_schedulers=[scheduler])


def _files(folder: Path) -> Iterator[bytes]:
    """Single files of every format, with and without what is optional."""
    path = folder / "seed.safetensors"

    def saved(content: object) -> bytes:
        inq.save(content, path)
        return path.read_bytes()

    for bits in BITS:
        for levels in LEVELS:
            yield saved({"weight": packed(inq.Format(bits, levels))})
    channel = inq.Format(4, granularity="channel", exponent="max")
    yield saved({"fc.weight": packed(channel, scale=True), "fc.bias": torch.tensor([1.0, 2.0])})
    # Two formats, so that there are overrides, and a float weight, so that there is something to ignore.
    yield saved({"a.weight": packed(inq.Format(5)), "b.weight": packed(inq.Format(3)), "n.weight": torch.ones(2, 2)})
    others = {f"t.{i}": torch.zeros(2).to(dtype) for i, dtype in enumerate(inq.files.DTYPES.values())}
    yield saved({"weight": packed(inq.Format(2)), **others, "empty": torch.empty(0, 3)})
    half = {"weight": packed(inq.Format(4)), "bias": torch.zeros(2, dtype=torch.float16)}
    yield saved(half)


def _fitting(folder: Path) -> bytes:
    """What fits ``model``, and so is taken over."""
    path = folder / "fitting.safetensors"
    entries = {name: value for name, value in model().state_dict().items() if "fc" not in name and "again" not in name}
    for name in ("fc", "again"):
        entries |= {f"{name}.weight": packed(inq.Format(4)), f"{name}.bias": torch.tensor([1.0, 2.0])}
    entries["conv.weight"] = inq.pack(inq.quantize(torch.ones(2, 1, 1, 3), inq.Format(4)), inq.Format(4))
    inq.save(entries, path)
    return path.read_bytes()


def _float_files() -> Iterator[bytes]:
    """Ordinary safetensors, as ``inq quantize`` reads them."""
    w = torch.tensor([[0.5, -0.25, 0.3], [1.0, 0.0, -2.0]])
    yield save({"fc.weight": w, "fc.bias": torch.ones(2)}, {"format": "pt"})
    yield save({"weight": w.bfloat16(), "wte.weight": w}, {"format": "pt"})
    yield save({"conv.weight": w.view(2, 1, 1, 3).half(), "ids": torch.arange(3)})


def _directories(folder: Path) -> Iterator[bytes]:
    """One file, shards with their index, and a configuration inside a model's config.json."""
    entries = {"fc.weight": packed(inq.Format(4), scale=True), "fc.bias": torch.ones(2), "n.weight": torch.ones(2, 2)}
    whole = folder / "whole"
    inq.save(entries, whole)
    files = {path.name: path.read_bytes() for path in whole.iterdir()}
    yield structure.write_files(files)
    config = json.loads(files.pop("inq.json"))
    files["config.json"] = json.dumps({"model_type": "llama", "eps": 1e-6, "quantization_config": config}).encode()
    yield structure.write_files(files)
    del files["model.safetensors"]
    parts = {"a.safetensors": ["fc.weight", "fc.bias"], "b.safetensors": ["n.weight"]}
    weight_map = {}
    for name, names in parts.items():
        write_file(folder / name, {key: entries[key] for key in names}, {})
        files[name] = (folder / name).read_bytes()
        weight_map |= dict.fromkeys(names, name)
    weight_map |= {"fc.weight_exp": "a.safetensors", "fc.weight_scale": "a.safetensors"}
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    yield structure.write_files(files)


def _training_files(folder: Path) -> Iterator[bytes]:
    """Before the first portion, within it, and with a long state of a random generator cut short, which is refused last
    of all and spares the others the time to read it."""
    path = folder / "run.safetensors"
    net, optimizer, run = training()
    inq.save_training(path, net, optimizer, run, {"step": 0, "best": float("inf"), "seen": (1, {2: 3})})
    yield path.read_bytes()
    for _ in run:
        net(torch.ones(4, 3)).sum().backward()
        optimizer.step()
        inq.save_training(path, net, optimizer, run, {"ema": torch.ones(2)})
        yield path.read_bytes()
        break
    parts = structure.take_apart(path.read_bytes())
    parts.nested["inq_training"]["rng"]["python"] = {"$tuple": [3, {"$tuple": [1, 2, 3]}, None]}
    yield structure.put_together(parts)


def _malformed(folder: Path) -> tuple[list[bytes], list[bytes]]:
    """The corpus of malformed checkpoints of the test suite, where it is regular files of a few kilobytes."""
    from malformed import CASES

    files, directories = [], []
    for name, case in CASES.items():
        (folder / name).mkdir()
        path = case.write(folder / name)
        inside = list(path.iterdir()) if path.is_dir() else [path]
        if not all(p.is_file() and not p.is_symlink() and p.stat().st_size < MAX_BYTES for p in inside):
            continue
        if path.is_file():
            files.append(path.read_bytes())
        elif inside and all(p.name in structure.FILES for p in inside):
            directories.append(structure.write_files({p.name: p.read_bytes() for p in inside}))
    return files, directories


def seeds(folder: Path) -> dict[str, list[bytes]]:
    """By what kind of reader they are for: file, model, float, directory, training. ``folder`` is for scratch."""
    (folder / "malformed").mkdir()
    bad_files, bad_directories = _malformed(folder / "malformed")
    made = {
        "file": (whole := [*_files(folder), *bad_files, *compressed(folder)]),
        "model": [_fitting(folder), *whole[::4]],
        "float": list(_float_files()),
        "directory": [*_directories(folder), *bad_directories],
        "training": list(_training_files(folder)),
    }
    return {kind: [content for content in contents if len(content) < MAX_BYTES] for kind, contents in made.items()}


def compressed(folder: Path) -> list[bytes]:
    """Entropy-coded files: zeros not taken out, once, more often, all codes zero; rows with padding; and malformed."""
    from malformed_compressed import CASES, bomb

    path, contents = folder / "compressed.safetensors", []
    for bits, shape, kept in (
        (3, (16, 61), 1),
        (5, (16, 64), 1),
        (4, (8, 61), 0.2),
        (2, (16, 61), 0.03),
        (4, (4, 64), 0),
    ):
        g = torch.Generator().manual_seed(bits)
        fmt = inq.Format(bits)
        w = torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) < kept)
        inq.save({"weight": inq.pack(inq.quantize(w, fmt), fmt)}, path, compress=True)
        contents.append(path.read_bytes())
    (folder / "coded").mkdir()
    contents += [case.write(folder / "coded").read_bytes() for name, case in CASES.items() if "directory" not in name]
    return [content for content in contents if bomb() not in content]
