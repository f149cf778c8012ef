"""What the examples train: a small network on the handwritten digits that scikit-learn carries, without a download."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import inq_kernels as inq

BATCH = 64
# Halves of a batch, each with a batch norm of its own: two devices take one each, one process takes both in turn.
PARTS = 2


def network() -> nn.Sequential:
    """Two convolutions and two linear layers on images [1, 8, 8]: 43,632 weights; the same ones each time."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 33, 3, padding=1, bias=False), nn.BatchNorm2d(33), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(528, 72), nn.ReLU(), nn.Linear(72, 10)),
    )


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [n, 1, 8, 8] and labels to train with, and the last 300 to test with."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    return images[:-300], labels[:-300], images[-300:], labels[-300:]


def parts(step: int, examples: int) -> list[Tensor]:
    """The batch of a step, as the indices of its ``PARTS``: from the step's number alone, so any process can go on."""
    generator = torch.Generator().manual_seed(step)
    return list(torch.randint(examples, (BATCH,), generator=generator).chunk(PARTS))


def all_parts(steps: int, examples: int) -> Iterator[list[int]]:
    """The parts of all steps one after the other, as a batch sampler gives them."""
    for step in range(steps):
        for part in parts(step, examples):
            yield part.tolist()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent."""
    return 100 * float((model.eval()(images).argmax(1) == labels).float().mean())


def pack(model: nn.Module, run: inq.INQ) -> int:
    """Convert what the run has retrained, in place, which is exact after a whole schedule; the bytes that it takes."""
    report = inq.convert(model, run.formats)
    if rounded := [m.name for m in report.modules if m.packed and m.sqnr_db != math.inf]:
        raise RuntimeError(f"expected weights on the grid, got others in {rounded}")
    return report.bytes_after


def weight_hash(parameters: Mapping[str, Tensor]) -> str:
    """SHA-256 of all parameters by their names, which two trainings share if they gave the same bits."""
    digest = hashlib.sha256()
    for name in sorted(parameters):
        digest.update(name.encode() + parameters[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
