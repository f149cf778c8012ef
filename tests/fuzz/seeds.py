"""The files that fuzzing begins with, generated: small ones, since most of an execution's time is its tensors'."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import nn

import inq_kernels as inq
from fuzz import structure
from inq_kernels.file_format import write_file
from inq_kernels.format import BITS, LEVELS
from inq_kernels.integrations import exports
from inq_kernels.transcode import export_dense

# Above this, nothing is fuzzed: time goes into copying.
MAX_BYTES = 1 << 15
# The kinds of seeds that are directories.
DIRECTORIES = {"directory", "sharded", "quantized", "packed"}


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


def _powers() -> Iterator[bytes]:
    """Floats that are powers of two, as ``inq import`` takes them, beside some that are not."""
    w = torch.tensor([[0.5, -0.25, 0.125], [1.0, 0.0, -2.0]])
    rows = torch.tensor([[2.0**-20, 2.0**-21], [2.0**9, -(2.0**8)]])
    yield save({"fc.weight": w, "fc.bias": torch.ones(2), "norm.weight": torch.rand(2)}, {"format": "pt"})
    yield save({"weight": rows, "b.weight": rows.bfloat16(), "c.weight": torch.tensor([[1.5, 1.0]])}, {"format": "pt"})
    yield save({"conv.weight": w.view(2, 1, 1, 3).half(), "wte.weight": w, "ids": torch.arange(3)})
    yield save({"a.weight": w.double() * 2.0**90, "z.weight": torch.zeros(2, 2)})


def _read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _wide(fmt: inq.Format, scale: bool = False) -> inq.PackedWeight:
    """[2, 32]: MXFP4 has groups of 32."""
    g = torch.Generator().manual_seed(fmt.bits)
    w = inq.pack(inq.quantize(torch.randn(2, 32, generator=g), fmt), fmt)
    row_scale = torch.tensor([[0.5], [3.0]]) if scale else None
    return inq.PackedWeight(w.weight, w.weight_exp, row_scale, fmt, w.shape)


def _exported(folder: Path) -> Iterator[bytes]:
    """What the three exports take, of which MXFP4 alone refuses some."""
    conv = inq.pack(inq.quantize(torch.ones(2, 1, 1, 3), inq.Format(3)), inq.Format(3))
    half = {"fc.weight": _wide(inq.Format(2)), "fc.bias": torch.zeros(2, dtype=torch.float16)}
    plain = {"fc.weight": _wide(inq.Format(4)), "fc.bias": torch.ones(2), "n.weight": torch.ones(2, 2)}
    channel = {"fc.weight": _wide(inq.Format(3, "dense", "channel")), "conv.weight": conv}
    scaled = {"fc.weight": _wide(inq.Format(4), scale=True), "b.weight": _wide(inq.Format(5))}
    for i, entries in enumerate((plain, half, channel, scaled)):
        yield from _packed_directories(folder / f"exported{i}", entries)


def _quantized(folder: Path) -> Iterator[bytes]:
    """Directories as ``inq import`` takes them: MXFP4 and FP8, as the exports write them and with scales as other tools
    do, and floats; in one file, and in two."""
    entries = {"fc.weight": _wide(inq.Format(4)), "fc.bias": torch.ones(2), "n.weight": torch.ones(2, 2)}
    for i, source in enumerate(_packed_directories(folder / "imported", entries)):
        place = folder / f"import{i}"
        place.mkdir()
        for name, content in structure.read_files(source).items():
            (place / name).write_bytes(content)
        for to, export in (("mxfp4", exports.export_mxfp4), ("fp8", exports.export_fp8), ("dense", export_dense)):
            export(place, folder / f"import{i}-{to}")
            yield structure.write_files(_read(folder / f"import{i}-{to}"))
    files = _read(folder / "import0-fp8")
    for strategy, scales in (("tensor", torch.tensor(0.5)), ("group", torch.tensor([[0.5, 1.0], [2.0, 1.0]]))):
        content, config = load(files["model.safetensors"]), json.loads(files["config.json"])
        content["fc.weight_scale"] = scales.bfloat16()
        group = config["quantization_config"]["config_groups"]["group_0"]
        group["weights"] |= {"strategy": strategy, "group_size": 16 if strategy == "group" else None}
        changed = {"model.safetensors": save(content), "config.json": json.dumps(config).encode()}
        yield structure.write_files({**files, **changed})


def _directories(folder: Path) -> Iterator[bytes]:
    entries = {"fc.weight": packed(inq.Format(4), scale=True), "fc.bias": torch.ones(2), "n.weight": torch.ones(2, 2)}
    return _packed_directories(folder / "directories", entries)


def _packed_directories(folder: Path, entries: dict) -> Iterator[bytes]:
    """One file, shards with their index, and a configuration inside a model's config.json."""
    folder.mkdir()
    whole = folder / "whole"
    inq.save(entries, whole)
    files = _read(whole)
    yield structure.write_files(files)
    config = json.loads(files.pop("inq.json"))
    files["config.json"] = json.dumps({"model_type": "llama", "eps": 1e-6, "quantization_config": config}).encode()
    yield structure.write_files(files)
    del files["model.safetensors"]
    first, *others = entries
    weight_map = {}
    for name, names in (("a.safetensors", [first]), ("b.safetensors", others)):
        write_file(folder / name, {key: entries[key] for key in names}, {})
        files[name] = (folder / name).read_bytes()
        weight_map |= dict.fromkeys(structure.take_apart(files[name]).entries, name)
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


def _sharded(folder: Path) -> Iterator[bytes]:
    """A sharded training checkpoint: before the first portion, within it, and by two ranks. The last one's Python state
    is cut short, as in ``_training_files``."""
    net, optimizer, run = training()
    inq.save_sharded(folder / "before", net, optimizer, run, {"step": 0, "best": float("inf")})
    yield structure.write_files(_read(folder / "before"))
    for _ in run:
        net(torch.ones(4, 3)).sum().backward()
        optimizer.step()
        inq.save_sharded(folder / "within", net, optimizer, run, {"ema": torch.ones(2)})
        break
    files = _read(folder / "within")
    yield structure.write_files(files)
    yield structure.write_files(_of_two_ranks(files))
    own = json.loads(files["rank-00000.json"])
    own["state"]["rng"]["python"] = {"$tuple": [3, {"$tuple": [1, 2, 3]}, None]}
    files["rank-00000.json"] = json.dumps(own).encode()
    structure.sign_index(files)
    yield structure.write_files(files)


def _of_two_ranks(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same checkpoint as two ranks would have written it, by rows."""
    files = dict(files)
    first, second = (name for name in structure.FILES if name.startswith("shard-"))
    whole, places = load(files[first]), structure.take_apart(files[first]).nested[structure.PLACES]
    halves = [{name: t[: len(t) // 2] for name, t in whole.items() if len(t) > 1}, {}]
    halves[1] = {name: t[len(t) // 2 :] for name, t in whole.items()}
    for file, half in zip((first, second), halves, strict=True):
        begin = {}
        for name, part in half.items():
            at = whole[name].shape[0] - part.shape[0] if file == second else 0
            begin[name] = {"saved_offsets": [at, *places[name]["saved_offsets"][1:]]}
        tensors = {name: part.contiguous() for name, part in half.items()}
        files[file] = save(tensors, {"format": "pt", structure.PLACES: json.dumps(begin)})
    files["rank-00001.json"] = files["rank-00000.json"]
    index, content = structure.open_index(files)
    content["world_size"] = 2
    content["files"] |= dict.fromkeys((second, "rank-00001.json"), "")
    files[structure.TRAINING_INDEX] = structure.close_index(index, content)
    structure.sign_index(files)
    return files


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
    """By what kind of reader they are for. ``folder`` is for scratch."""
    (folder / "malformed").mkdir()
    bad_files, bad_directories = _malformed(folder / "malformed")
    made = {
        "file": (whole := [*_files(folder), *bad_files, *compressed(folder)]),
        "model": [_fitting(folder), *whole[::4]],
        "float": list(_float_files()),
        "directory": [*_directories(folder), *bad_directories],
        "training": list(_training_files(folder)),
        "sharded": list(_sharded(folder)),
        "powers": list(_powers()),
        "quantized": list(_quantized(folder)),
        "packed": list(_exported(folder)),
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
