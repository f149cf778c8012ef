"""A training run that is killed with SIGKILL again and again and goes on from its checkpoint each time.

``python tests/kill_training.py DIR KILLS SEED`` prints one JSON line: the weight hash of the uninterrupted run, those
of the runs that were killed, and how many kills there were. Children are forked from this process, which imports torch
but computes nothing, so that a life costs milliseconds.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import inq_kernels as inq

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
    torch.set_num_threads(1)
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


def fork(path: Path, result: Path) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            digest = live(path)
            result.write_text(digest)
            code = 0
        finally:
            # Not sys.exit: the parent's buffers and handlers are not the child's.
            os._exit(code)
    return child


def main(folder: Path, kills: int, seed: int) -> None:
    path, result = folder / "run.safetensors", folder / "hash"
    moments = random.Random(seed)
    os.waitpid(fork(folder / "whole.safetensors", result), 0)
    whole, killed, done = result.read_text(), [], 0
    while done < kills:
        result.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        while not result.exists():
            child = fork(path, result)
            if done < kills:
                time.sleep(moments.uniform(0.0, 0.4))
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if os.WIFSIGNALED(status):
                done += 1
            elif os.waitstatus_to_exitcode(status) != 0:
                raise RuntimeError("a life ended with an error: see its traceback above")
        killed.append(result.read_text())
    print(json.dumps({"whole": whole, "killed": killed, "kills": done}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
