"""A training run that is killed with SIGKILL again and again and goes on from its checkpoint each time.

``python tests/faults/lives.py FOLDER KILLS [--by-time]`` prints one JSON line: the weight hash of the uninterrupted
run, those of the runs that were killed, how many kills there were and at how many different points. A point is a system
call of the step that the checkpoint on the disk had reached (``--by-time``: a moment). Children are forked from this
process after the uninterrupted run, in one thread: what torch imports and prepares at a first step, a second of it, is
there then, and a life costs milliseconds.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    # With a GPU in sight, torch refuses a backward pass in the children of a process that has had one.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import torch.nn.functional as F
from torch import nn

import inq_kernels as inq
from faults import shim
from inq_kernels.files import read_header

STEPS_A_PORTION = 20
PORTIONS = inq.PAPER_PORTIONS[4]


def build():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(288, 10)
    )
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [5, 15])
    run = inq.INQ(model, optimizer, inq.Format(4), PORTIONS, "random", lr_schedulers=[scheduler], seed=3)
    return model, optimizer, scheduler, run


def live(path: Path, every: int = 1) -> str:
    """Train from the checkpoint at ``path``, if there is one, to the end; the hash of the final state."""
    model, optimizer, scheduler, run = build()
    step = 0
    if path.exists():
        step = inq.load_training(path, model, optimizer, run)["step"]
    data = torch.Generator().manual_seed(1)
    x, t = torch.randn(256, 1, 8, 8, generator=data), torch.randint(10, (256,), generator=data)
    for portion in run:
        while step < STEPS_A_PORTION * (PORTIONS.index(portion) + 1):
            # Batches and dropout come from torch's global generator, whose state the checkpoint holds.
            index = torch.randint(256, (16,))
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), t[index]).backward()
            optimizer.step()
            scheduler.step()
            step += 1
            if step % every == 0:
                inq.save_training(path, model, optimizer, run, {"step": step})
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def fork(path: Path, result: Path, call: int = 0, half: bool = False) -> int:
    """A life in a child process, that ends at its ``call``-th system call about files, or lasts."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if call:
                shim.arm(path.parent, shim.KILL_HALF if half else shim.KILL, call)
            digest = live(path)
            result.write_text(digest)
            code = 0
        finally:
            # Not sys.exit: the parent's buffers and handlers are not the child's.
            os._exit(code)
    return child


def step_on_disk(path: Path) -> int:
    """Whatever the kill has left, the header of the checkpoint is whole."""
    if not path.exists():
        return 0
    return json.loads(read_header(path).metadata["inq_training"])["extra"]["step"]


def main(folder: Path, kills: int, by_time: bool) -> dict:
    torch.set_num_threads(1)
    runs, result = folder / "runs", folder / "hash"
    runs.mkdir()
    path = runs / "run.safetensors"
    moments, points = random.Random(0), set()
    with shim.counted(runs) as calls:
        model, optimizer, _, run = build()
        inq.save_training(path, model, optimizer, run, {"step": 0})
    # Lives end within their load and the first two or three saves, so that most get one step further; the stride visits
    # every call of those before it comes to one again.
    most = 3 * len(calls)
    stride = next(s for s in (11, 7, 13, 17) if most % s)
    path.unlink()
    whole, killed, done = live(folder / "whole.safetensors"), [], 0
    while done < kills:
        result.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        while not result.exists():
            call = 1 + done * stride % most if done < kills and not by_time else 0
            point = (step_on_disk(path), call, done // most % 2 == 1)
            child = fork(path, result, call, point[2])
            if done < kills and by_time:
                time.sleep(moments.uniform(0.0, 0.4))
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if os.WIFSIGNALED(status):
                done += 1
                points.add(point)
            elif os.waitstatus_to_exitcode(status) != 0:
                raise RuntimeError("a life ended with an error: see its traceback above")
        killed.append(result.read_text())
    litter = [name for name in os.listdir(runs) if name != path.name]
    if not all(name.startswith(".") for name in litter):
        raise RuntimeError(f"left: {litter}")
    return {"whole": whole, "killed": killed, "kills": done, "points": len(points), "left": len(litter)}


if __name__ == "__main__":
    place = Path(sys.argv[1]).resolve()
    shim.install(place)
    print(json.dumps(main(place, int(sys.argv[2]), "--by-time" in sys.argv)))
