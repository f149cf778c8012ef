"""examples/imagenet.py on a tiny network and made-up pictures, without torchvision.

``python tests/imagenet_tiny.py DIR ARGUMENTS…`` runs it as torchrun would, in two processes, to the end (DIR/whole);
then with one that is killed in a step (DIR/killed), and again; then with folders that they do not share. They are
forked from this process, which imports torch but computes nothing, so that a process costs no second import.
"""

import importlib.util
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch
import torch._dynamo  # DistributedDataParallel's, which takes a second of each process
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import Dataset

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "imagenet.py"
PER_CLASS = 16


def load():
    """The example as a module of its own."""
    spec = importlib.util.spec_from_file_location("imagenet", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["imagenet"] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


class OwnStatistics(nn.Module):
    """A buffer that training sets otherwise in each process, as batch statistics are, and without rank 0's nothing is
    right."""

    def __init__(self):
        super().__init__()
        self.register_buffer("keep", torch.ones(()))

    def forward(self, x):
        if self.training:
            self.keep.fill_(os.environ.get("RANK", "0") == "0")
            return x
        return x * self.keep


def network(name, weights, classes):
    """With what makes a training depend on more than its weights: batch statistics and dropout."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), OwnStatistics(), nn.Linear(64, classes)),
    )


class Pictures(Dataset):
    """A pattern of each class with noise: other noise each time to train on, always the same to test with."""

    def __init__(self, folder, train):
        self.classes, self.train = sum(f.is_dir() for f in folder.iterdir()), train

    def __len__(self):
        return self.classes * PER_CLASS

    def __getitem__(self, index):
        label = index % self.classes
        pattern = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(label))
        fixed = None if self.train else torch.Generator().manual_seed(1000 + index)
        return pattern + 0.5 * torch.randn(3, 8, 8, generator=fixed), label


def folder(path, classes=6):
    """A folder as the example wants it."""
    for part in ("train", "val"):
        for label in range(classes):
            (path / part / f"n{label}").mkdir(parents=True)
            (path / part / f"n{label}" / "0.jpeg").touch()
    return path


def tiny():
    """The example with these."""
    example = load()
    example.network, example.pictures = network, Pictures
    return example


PROCESSES, KILL_AT = 2, 14


def kill_at(step):
    """Kill this process in that optimizer step."""
    steps = iter(range(1, step))
    register_optimizer_step_post_hook(lambda *_: next(steps, None) or os.kill(os.getpid(), signal.SIGKILL))


def together(arguments, kill=False, second=()):
    """Exit statuses of the processes, −9 for one that was killed. When one fails the others are ended. ``second``: more
    arguments for the second one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = {}
    for rank in range(PROCESSES):
        child = os.fork()
        if child:
            children[child] = rank
            continue
        status = 1
        try:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            if kill and rank == 1:
                kill_at(KILL_AT)
            tiny().main([*arguments, *(second if rank else ())])
            status = 0
        except SystemExit as stop:
            print(stop.code, file=sys.stderr, flush=True)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    found = [0] * PROCESSES
    while children:
        child, status = os.wait()
        found[children.pop(child)] = os.waitstatus_to_exitcode(status)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
    return found


def main(folder, *arguments):
    torch.set_num_threads(1)
    assert together([*arguments, "--out", f"{folder}/whole"]) == [0, 0]
    assert together([*arguments, "--out", f"{folder}/killed"], kill=True)[1] == -signal.SIGKILL
    assert not Path(folder, "killed", "results.json").exists()
    assert together([*arguments, "--out", f"{folder}/killed"]) == [0, 0]
    # The second one does not see the first one's folder.
    assert 1 in together([*arguments, "--out", f"{folder}/whole"], second=("--out", f"{folder}/elsewhere"))


if __name__ == "__main__":
    main(*sys.argv[1:])
