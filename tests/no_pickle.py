"""Goes through every load path while anything that unpickles raises: ``python tests/no_pickle.py FOLDER``.

Also with files that are pickles under every name that a loader might take for its own. test_no_pickle.py runs this.
"""

import contextlib
import io
import json
import os
import pickle
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import inq_kernels as inq
from inq_kernels import cli
from inq_kernels.checkpoint import inspect, verify
from inq_kernels.file_format import write_file
from inq_kernels.integrations.exports import export_fp8, export_mxfp4
from inq_kernels.integrations.imports import import_packed
from inq_kernels.transcode import export_dense, quantize

FMT = inq.Format(4)
# A process that runs what a file says does one of these. Imports do, too, so that all of them come first.
EVENTS = (
    "pickle.find_class",
    "marshal.loads",
    "marshal.load",
    "exec",
    "compile",
    "import",
    "os.system",
    "subprocess.Popen",
)
MARKER = "unpickled"


class Unpickled(BaseException):
    """Not an Exception: no loader may take it for a malformed file."""


class Payload:
    """Unpickling this makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def model() -> nn.Module:
    # Widths of which MXFP4 has whole groups.
    return nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 3))


def run() -> tuple:
    made = model()
    optimizer = torch.optim.AdamW(made.parameters(), 0.01)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2])
    return made, optimizer, inq.INQ(made, optimizer, FMT, (0.5, 1.0), lr_schedulers=[scheduler])


def prepare(folder: Path) -> None:
    """Files of every kind that something here loads."""
    made, optimizer, steps = run()
    for _ in steps:
        made(torch.ones(2, 32)).sum().backward()
        optimizer.step()
        break
    extra = {"ema": torch.ones(2), "seen": (1, {2: 3})}
    inq.save_training(folder / "run.safetensors", made, optimizer, steps, extra)
    inq.save_sharded(folder / "sharded", made, optimizer, steps, extra)
    steps.close()
    entries = {"0.weight": inq.pack(inq.quantize(torch.randn(32, 32), FMT), FMT), "0.bias": torch.ones(32)}
    entries |= {"1.weight": inq.pack(inq.quantize(torch.randn(3, 32), FMT), FMT), "1.bias": torch.ones(3)}
    inq.save(entries, folder / "model.safetensors")
    inq.save(entries, folder / "model")
    inq.save(entries, folder / "small.safetensors", compress=True)
    shards = folder / "shards"
    shutil.copytree(folder / "model", shards)
    (shards / "model.safetensors").unlink()
    parts = {"a.safetensors": ["0.weight", "0.bias"], "b.safetensors": ["1.weight", "1.bias"]}
    weight_map = {}
    for name, names in parts.items():
        write_file(shards / name, {key: entries[key] for key in names}, {})
        weight_map |= dict.fromkeys([*names, *(f"{key}_exp" for key in names if key.endswith("weight"))], name)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    export_dense(folder / "model", folder / "dense")
    export_dense(folder / "model.safetensors", folder / "dense.safetensors")
    export_mxfp4(folder / "model", folder / "mxfp4")
    export_fp8(folder / "model", folder / "fp8")


# What loads something: a reader joins with one line. Each gets the folder of ``prepare``, and may write to it/out.
PATHS = {
    "load a file": lambda d: inq.load(d / "model.safetensors"),
    "load a directory": lambda d: inq.load(d / "model"),
    "load entropy-coded": lambda d: inq.load(d / "small.safetensors"),
    "load shards": lambda d: inq.load(d / "shards"),
    "load into a model": lambda d: inq.load(d / "model.safetensors", model()),
    "load into a converted model": lambda d: inq.load(d / "model", converted()),
    "load_training": lambda d: inq.load_training(d / "run.safetensors", *run()),
    "load_sharded": lambda d: inq.load_sharded(d / "sharded", *run()),
    "inspect": lambda d: inspect(d / "model"),
    "verify": lambda d: verify(d / "shards"),
    "export": lambda d: export_dense(d / "shards", d / "out" / "dense"),
    "quantize": lambda d: quantize(d / "dense", d / "out" / "packed", FMT),
    "export to MXFP4": lambda d: export_mxfp4(d / "shards", d / "out" / "mxfp4"),
    "export to FP8": lambda d: export_fp8(d / "shards", d / "out" / "fp8"),
    "import a file": lambda d: import_packed(d / "dense.safetensors", d / "out" / "file.safetensors"),
    "import floats": lambda d: import_packed(d / "dense", d / "out" / "floats"),
    "import MXFP4": lambda d: import_packed(d / "mxfp4", d / "out" / "from_mxfp4"),
    "import FP8": lambda d: import_packed(d / "fp8", d / "out" / "from_fp8"),
    "inq inspect": lambda d: command("inspect", d / "model"),
    "inq verify": lambda d: command("verify", d / "model.safetensors"),
    "inq quantize": lambda d: command("quantize", d / "dense", d / "out" / "again"),
    "inq save": lambda d: command("save", d / "small.safetensors", d / "out" / "plain", "--compress"),
    "inq export": lambda d: command("export", d / "model", d / "out" / "float", "--to", "dense"),
    "inq export --to mxfp4": lambda d: command("export", d / "model", d / "out" / "e2m1", "--to", "mxfp4"),
    "inq export --to fp8": lambda d: command("export", d / "model", d / "out" / "e4m3", "--to", "fp8"),
    "inq import": lambda d: command("import", d / "mxfp4", d / "out" / "imported"),
}


def converted() -> nn.Module:
    made = model()
    inq.convert(made, FMT)
    return made


def command(*words: object) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        status = cli.main([str(word) for word in words])
    assert status == 0, words


def go_through(folder: Path) -> None:
    for function in PATHS.values():
        (folder / "out").mkdir()
        function(folder)
        shutil.rmtree(folder / "out")


# Names that loaders look for, in copies of these directories. torch.distributed.checkpoint's own readers unpickle
# ".metadata".
MODEL_NAMES = ("model.safetensors", "model.pt", "pytorch_model.bin", "config.json")
POISONED = {
    "model": (*MODEL_NAMES, "inq.json", "run.safetensors"),
    "dense": MODEL_NAMES,
    "mxfp4": MODEL_NAMES,
    "fp8": MODEL_NAMES,
    "sharded": (
        "inq_training.json",
        "rank-00000.json",
        "shard-00001-model-00001-of-00001.safetensors",
        "__0_0.distcp",
        ".metadata",
    ),
}


def pickles(folder: Path) -> list[Path]:
    """The payload as a plain pickle and in a ZIP, as torch.save writes it, under names that loaders look for."""
    payload = pickle.dumps(Payload(folder / MARKER))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3")
    places = []
    for i, content in enumerate((payload, buffer.getvalue())):
        for source, names in POISONED.items():
            for name in names:
                directory = folder / f"{i}-{source}-{name}"
                shutil.copytree(folder / source, directory)
                (directory / name).write_bytes(content)
                places.append(directory / name)
    return places


def written(convert: Callable[[Path, Path], object]) -> Callable[[Path], object]:
    """What writes, as a reader."""

    def reader(path: Path) -> None:
        with tempfile.TemporaryDirectory() as place:
            convert(path, Path(place) / "out")

    return reader


READERS = (
    inq.load,
    inspect,
    verify,
    lambda path: inq.load_training(path, *run()),
    lambda path: inq.load_sharded(path, *run()),
    written(lambda path, out: quantize(path, out, FMT)),
    written(import_packed),
    written(export_dense),
    written(export_mxfp4),
    written(export_fp8),
)


def refuse(places: list[Path]) -> None:
    for place in places:
        for path in (place, place.parent):
            for reader in READERS:
                # A directory with a .bin beside good files is loaded, without the .bin.
                with contextlib.suppress(ValueError):
                    reader(path)


def forbidden(*args: object, **kwargs: object) -> None:
    raise Unpickled("something unpickles")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    prepare(folder)
    places = pickles(folder)
    go_through(folder)  # all imports happen here
    refuse(places)

    before = pickle.loads, torch.load
    state = {"on": False}

    def audit(event: str, arguments: tuple) -> None:
        if state["on"] and event in EVENTS:
            state["on"] = False
            raise Unpickled(f"{event}: {arguments!r}"[:300])

    sys.addaudithook(audit)
    # Pickles without classes raise no event. Those who took the functions before us are seen by the event.
    for module in (pickle, sys.modules["_pickle"]):
        for name in ("load", "loads", "Unpickler"):
            setattr(module, name, forbidden)
    torch.load = torch.serialization.load = torch.jit.load = torch.export.load = forbidden

    # The trap works: else the silence below would say nothing.
    for trap in (
        lambda: before[0](pickle.dumps(Payload(folder / "trap"))),
        lambda: pickle.loads(b"N."),
        lambda: torch.load("x"),
    ):
        state["on"] = True
        try:
            trap()
        except Unpickled:
            continue
        raise SystemExit("the trap does not work")
    assert not (folder / "trap").exists()

    state["on"] = True
    go_through(folder)
    refuse(places)
    assert state["on"]
    assert not (folder / MARKER).exists()
    print(f"{len(PATHS)} load paths, no pickle")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
