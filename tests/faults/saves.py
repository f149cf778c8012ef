"""Every call of every save fails, or is the last one: ``python tests/faults/saves.py FOLDER [SCENARIO …]``.

For each scenario the calls that change files (open, write, truncate, fsync, rename, mkdir, chmod, unlink) are counted.
Then each of them in turn fails with ENOSPC and with EIO: once, from there on, and after half a write; and at each of
them a process is killed, before it and in the middle of it. After each fault the checkpoint must load, as the old one
or as the new one, bit for bit; and as the new one, if the save said so. Of what writes to a new path, the old one is
that nothing is there. The last line is a summary as JSON.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from safetensors.torch import save_file
from torch import nn

import inq_kernels as inq
from faults import shim
from inq_kernels.integrations import exports, imports
from inq_kernels.transcode import export_dense, quantize


@dataclass(frozen=True)
class Scenario:
    """``save(place, i)`` writes state ``i``, 0 or 1, to a path under the folder ``place``; ``load(place)`` gives what
    came back in a form that == compares exactly, or raises. ``prepare(place)`` comes before all of that."""

    name: str
    save: Callable[[Path, int], object]
    load: Callable[[Path], object]
    prepare: Callable[[Path], object] = lambda place: None


def _bits(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, inq.PackedWeight):
        return _bits(value.weight), _bits(value.weight_exp), value.format
    if isinstance(value, dict):
        return {key: _bits(v) for key, v in value.items()}
    return value


FMT = inq.Format(4)
PACKED = [
    inq.pack(inq.quantize(torch.randn(32, 32, generator=torch.Generator().manual_seed(i)), FMT), FMT) for i in (0, 1)
]
# More than the buffers of what writes: Rust's has a mebibyte, and so there are writes in the middle of the data.
STATES = [
    {"a.weight": PACKED[i], "n.weight": torch.full((300_000,), float(i)), "b.bias": torch.ones(3)} for i in (0, 1)
]


def _run(i: int) -> tuple[nn.Module, torch.optim.Optimizer, inq.INQ]:
    """A run in the midst of its portion ``i``."""
    torch.manual_seed(i)
    model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    run = inq.INQ(model, optimizer, FMT, (0.3, 0.6, 1.0))
    for index, _ in enumerate(run):
        model(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
        if index == i:
            break
    return model, optimizer, run


RUNS = [_run(i) for i in (0, 1)]
EXTRA = [{"step": i, "ema": torch.full((5,), float(i))} for i in (0, 1)]


def _load_run(place: Path) -> object:
    model, optimizer, run = _run(0)
    extra = inq.load_training(place / "run.safetensors", model, optimizer, run)
    return _bits({"model": dict(model.state_dict()), "momenta": optimizer.state_dict()["state"], "extra": extra})


def _load_sharded(place: Path) -> object:
    model, optimizer, run = _run(0)
    extra = inq.load_sharded(place / "run", model, optimizer, run)
    return _bits({"model": dict(model.state_dict()), "momenta": optimizer.state_dict()["state"], "extra": extra})


# --- what writes to a new path ----------------------------------------------------------------------------------------


def _sources(place: Path) -> None:
    """A float model with a tokenizer, the same packed, and that in MXFP4."""
    floats = place / "float"
    floats.mkdir()
    tensors = {"fc.weight": inq.unpack(PACKED[0]), "fc.bias": torch.ones(32)}
    save_file(tensors, floats / "model.safetensors", {"format": "pt"})
    (floats / "config.json").write_text('{"model_type": "llama"}')
    (floats / "tokenizer.json").write_text('{"version": "1.0"}')
    quantize(floats, place / "packed", FMT)
    exports.export_mxfp4(place / "packed", place / "mxfp4")


def _all_files(place: Path) -> dict[str, dict[str, bytes]]:
    """Every visible directory, the sources and the target: names and bytes of its files."""
    visible = [folder for folder in place.iterdir() if not folder.name.startswith(".")]
    return {folder.name: {path.name: path.read_bytes() for path in folder.iterdir()} for folder in visible}


def _new(name: str, source: str, convert: Callable[[Path, Path], object]) -> Scenario:
    """State 0 is no target, state 1 all of it, byte for byte; the sources are the same in both."""

    def save(place: Path, i: int) -> None:
        if i:
            convert(place / source, place / "target")
        else:
            shutil.rmtree(place / "target", ignore_errors=True)

    return Scenario(name, save, _all_files, _sources)


# A writer of checkpoints joins with an entry.
SCENARIOS = (
    Scenario(
        "inq.save, a file",
        lambda place, i: inq.save(STATES[i], place / "model.safetensors"),
        lambda place: _bits(inq.load(place / "model.safetensors")),
    ),
    Scenario(
        "inq.save, a directory",
        lambda place, i: inq.save(STATES[i], place / "model"),
        lambda place: _bits(inq.load(place / "model")),
    ),
    Scenario(
        "inq.save_training",
        lambda place, i: inq.save_training(place / "run.safetensors", *RUNS[i], EXTRA[i]),
        _load_run,
    ),
    Scenario(
        "inq.save_sharded",
        lambda place, i: inq.save_sharded(place / "run", *RUNS[i], EXTRA[i]),
        _load_sharded,
    ),
    _new("inq quantize", "float", lambda source, target: quantize(source, target, FMT)),
    _new("inq export --to mxfp4", "packed", exports.export_mxfp4),
    _new("inq export --to fp8", "packed", exports.export_fp8),
    _new("inq export --to dense", "packed", export_dense),
    _new("inq import", "mxfp4", imports.import_packed),
)


class Trial:
    """One scenario in one folder: what it must look like, and what became of it."""

    def __init__(self, scenario: Scenario, place: Path):
        self.scenario, self.place = scenario, place
        place.mkdir()
        scenario.prepare(place)
        self.expected, self.names = [], set()
        for i in (0, 1):
            scenario.save(place, i)
            self.expected.append(scenario.load(place))
            self.names |= set(os.listdir(place))
        assert self.expected[0] != self.expected[1]
        scenario.save(place, 0)
        with shim.counted(place) as self.calls:
            scenario.save(place, 1)
        self.outcomes = {"old": 0, "new": 0}
        self.old_is_there = False

    def begin(self) -> None:
        """The old checkpoint, and nothing else."""
        litter = set(os.listdir(self.place)) - self.names
        for name in litter:
            path = self.place / name
            # What a fault leaves must be recognisable: hidden, and a temporary file's.
            assert name.startswith("."), f"{self.scenario.name}: left {name}"
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if litter:
            assert self.scenario.load(self.place) in self.expected, f"{self.scenario.name}: it needed {litter}"
        if not self.old_is_there:
            self.scenario.save(self.place, 0)

    def end(self, where: str, said_yes: bool) -> None:
        found = self.scenario.load(self.place)
        assert found in self.expected, f"{where}: neither the old checkpoint nor the new one"
        new = found == self.expected[1]
        assert new or not said_yes, f"{where}: the save said that it was done, and the old checkpoint is there"
        self.outcomes["new" if new else "old"] += 1
        self.old_is_there = not new

    def fail(self, how: str, n: int, code: int) -> None:
        where = f"{self.scenario.name}: call {n} ({self.calls[n - 1][0]}), {errno.errorcode[code]} {how}"
        self.begin()
        said_yes, told = False, None
        with warnings.catch_warnings():
            # What is replaced and cannot be deleted is a warning, after the new one is there.
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message=".*could not be deleted")
            try:
                with shim.armed(self.place, shim.FAILS[how], n, code):
                    self.scenario.save(self.place, 1)
                said_yes = True
            except OSError as error:
                told = error
        if not said_yes:
            # safetensors calls every failure to open a file so, without a number.
            unopened = isinstance(told, FileNotFoundError) and told.errno is None
            assert told.errno == code or unopened, f"{where}: {told!r}"
            assert str(self.place) in str(told), f"{where}: {told!r} does not say which file"
        # What is replaced may stay where it cannot be deleted, torch makes a directory that is there, and Python copies
        # otherwise where the system's copy fails; all else that fails has to be told.
        untold = ("unlink", "rmdir", "open", "mkdir", "copy")
        kind = self.calls[n - 1][0]
        assert not (said_yes and how == "once" and kind not in untold), f"{where}: nobody was told"
        self.end(where, said_yes)

    def kill(self, half: bool, n: int) -> None:
        where = f"{self.scenario.name}: killed {'in' if half else 'before'} call {n} ({self.calls[n - 1][0]})"
        self.begin()
        child = os.fork()
        if child == 0:
            try:
                shim.arm(self.place, shim.KILL_HALF if half else shim.KILL, n)
                self.scenario.save(self.place, 1)
            finally:
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status), f"{where}: it lived"
        assert os.WTERMSIG(status) == signal.SIGKILL, f"{where}: it died of signal {os.WTERMSIG(status)}"
        self.end(where, False)
        # The next save takes no notice of what the killed one has left.
        self.scenario.save(self.place, 1)
        self.old_is_there = False
        assert self.scenario.load(self.place) == self.expected[1], where


def main(folder: Path, names: list[str]) -> dict:
    torch.set_num_threads(1)
    report = {}
    for number, scenario in enumerate(s for s in SCENARIOS if s.name in names or not names):
        trial = Trial(scenario, folder / str(number))
        faults = kills = 0
        for n in range(1, len(trial.calls) + 1):
            for code in (errno.ENOSPC, errno.EIO):
                for how in shim.FAILS:
                    trial.fail(how, n, code)
                    faults += 1
            trial.kill(False, n)
            kills += 1
            if trial.calls[n - 1][1]:
                trial.kill(True, n)
                kills += 1
        report[scenario.name] = {
            "calls": [name for name, _ in trial.calls], "faults": faults, "kills": kills, **trial.outcomes,
        }  # fmt: skip
    return report


if __name__ == "__main__":
    shim.install(Path(sys.argv[1]).resolve())
    print(json.dumps(main(Path(sys.argv[1]).resolve(), sys.argv[2:])))
