"""The experiment of ``inq demo``: a small network on handwritten digits, and one row of its table for one seed.

A row is float32, or INQ from the float32 weights of the same seed to one format. Everything here is deterministic for a
seed on one thread, so that rows and seeds may run in any number of processes.
"""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import checkpoint, files
from ..format import Format
from ..inq import INQ, PAPER_PORTIONS
from ..nn import Conv2d, Linear, convert

PACKED = (Linear, Conv2d)


@dataclass(frozen=True)
class Recipe:
    """How every row is trained. Chosen once, on images held out of the training ones (see the report's notes), and the
    same for all bit-widths: only the portions differ, and they are the paper's."""

    epochs: int = 20
    lr: float = 0.05
    retrain_epochs: int = 3  # after each portion
    retrain_lr: float = 0.03
    batch: int = 32
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1


# Enough to see that everything works, too short for the accuracies to mean anything; with QUICK_ROWS.
QUICK = Recipe(epochs=4, retrain_epochs=1, batch=128)


@dataclass(frozen=True)
class Row:
    """One row of the table. Without a format: float32, and if ``longer``, retrained as often as the longest row."""

    key: str
    format: Format | None = None
    partition: str = "magnitude"
    longer: bool = False

    @property
    def portions(self) -> tuple[float, ...]:
        return () if self.format is None else PAPER_PORTIONS[self.format.bits]

    @property
    def title(self) -> str:
        if self.format is None:
            return "float32, trained as long" if self.longer else "float32"
        notes = [self.format.exponent]
        notes += [] if self.format.levels == "paper" else [self.format.levels]
        notes += [] if self.partition == "magnitude" else [self.partition]
        return f"{self.format.bits} bits, {', '.join(notes)}"


FLOAT = Row("float32")
LONGER = Row("float32-longer", longer=True)
ROWS = (
    FLOAT,
    LONGER,
    *(Row(f"mse-{bits}", Format(bits)) for bits in (5, 4, 3, 2)),
    *(Row(f"max-{bits}", Format.paper(bits)) for bits in (5, 4, 3, 2)),
    Row("mse-5-random", Format(5), "random"),
    Row("mse-4-dense", Format(4, "dense")),
)
QUICK_ROWS = tuple(row for row in ROWS if row.key in ("float32", "mse-5", "mse-2", "max-5", "max-2", "mse-5-random"))
BY_KEY = {row.key: row for row in ROWS}


def digits_net() -> nn.Sequential:
    """Three convolutions with batch norm and two linear layers on 1×8×8 images: 123,680 weights."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 32, 3, padding=1, bias=False),
            bn1=nn.BatchNorm2d(32),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(32, 64, 3, padding=1, bias=False),
            bn2=nn.BatchNorm2d(64),
            relu2=nn.ReLU(),
            conv3=nn.Conv2d(64, 64, 3, padding=1, bias=False),
            bn3=nn.BatchNorm2d(64),
            relu3=nn.ReLU(),
            pool3=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(256, 256),
            relu4=nn.ReLU(),
            fc2=nn.Linear(256, 10),
        )
    )


@dataclass(frozen=True)
class Digits:
    """float32 images [n, 1, 8, 8] in [0, 1] and int64 labels [n]."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Places:
    """Where one row of one seed keeps its files, under the demo's output folder."""

    out: Path
    key: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.key}-seed{self.seed}.safetensors"

    @property
    def model(self) -> Path:
        """The trained network, as ``inq.save`` or, in float32, as its own writer of files writes it."""
        return self.out / "models" / self.name

    @property
    def expected(self) -> Path:
        """What ``check`` compares a packed network with."""
        return self.out / "expected" / self.name


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """The network's output in evaluation mode."""
    return model.eval()(images)


def accuracy(output: Tensor, labels: Tensor) -> float:
    """Percent."""
    return 100 * int((output.argmax(1) == labels).sum()) / len(labels)


class _Trainer:
    """SGD with momentum and one cosine from ``lr`` to 0 over ``epochs``."""

    def __init__(self, model: nn.Module, digits: Digits, recipe: Recipe, lr: float, epochs: int, seed: int):
        self.model, self.digits, self.recipe, self.epochs = model, digits, recipe, epochs
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
        steps = epochs * -(-len(digits.train_labels) // recipe.batch)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.start = copy.deepcopy(self.scheduler.state_dict())
        # Its own, so that every row of a seed sees the images in the same order.
        self.generator = torch.Generator().manual_seed(seed)

    def train(self) -> None:
        """``epochs`` epochs."""
        self.model.train()
        images, labels = self.digits.train_images, self.digits.train_labels
        for _ in range(self.epochs):
            for index in torch.randperm(len(labels), generator=self.generator).split(self.recipe.batch):
                self.optimizer.zero_grad()
                output = self.model(images[index])
                F.cross_entropy(output, labels[index], label_smoothing=self.recipe.label_smoothing).backward()
                self.optimizer.step()
                self.scheduler.step()

    def restart(self) -> None:
        """What INQ does with the schedule at every portion, for the float32 row that trains as long."""
        self.scheduler.load_state_dict(copy.deepcopy(self.start))
        for group, lr in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["lr"] = lr


def run_row(row: Row, seed: int, digits: Digits, recipe: Recipe, out: Path) -> dict:
    """Train one row for one seed, write its files, and return its numbers.

    ``FLOAT`` first: the others start from the file that it wrote.
    """
    began = time.process_time()
    places = Places(out, row.key, seed)
    # INQ and the data order have generators of their own: this one makes the first weights.
    torch.manual_seed(seed)
    model = digits_net()
    if row == FLOAT:
        _Trainer(model, digits, recipe, recipe.lr, recipe.epochs, seed).train()
    else:
        model.load_state_dict(load_file(Places(out, FLOAT.key, seed).model))
    result: dict = {"row": row.key, "seed": seed}
    trainer = _Trainer(model, digits, recipe, recipe.retrain_lr, recipe.retrain_epochs, seed)
    if row.format is not None:
        result |= _quantize(row, seed, trainer, places)
    elif row.longer:
        for _ in PAPER_PORTIONS[2]:
            trainer.restart()
            trainer.train()
    if row.format is None:
        result["accuracy"] = accuracy(logits(model, digits.test_images), digits.test_labels)
        files.write_safetensors(places.model, model.state_dict(), {"format": "pt"})
        weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
        result |= {"weights": weights, "weight_bytes": 4 * weights}
    result["file_bytes"] = places.model.stat().st_size
    result["cpu_s"] = time.process_time() - began
    return result


def _quantize(row: Row, seed: int, trainer: _Trainer, places: Places) -> dict:
    """INQ, then pack and save; and next to it what the saved network must reproduce."""
    model, digits = trainer.model, trainer.digits
    assert row.format is not None
    run = INQ(
        model,
        trainer.optimizer,
        row.format,
        portions=row.portions,
        partition=row.partition,
        lr_schedulers=trainer.scheduler,
        seed=seed,
    )
    curve = list(_curve(run, trainer))
    run.close()
    layers = [
        {
            "name": layer.name,
            "weights": layer.numel,
            "n1": layer.n1,
            "zeros": layer.zeros,
            "sqnr_db": layer.sqnr_db,
            "exponents": {str(k): count for k, count in sorted(layer.histogram.items())},
        }
        for layer in run.report()
    ]
    fake = {f"fake.{name}": model.get_submodule(name).weight.detach().clone() for name in run.formats}
    float_logits = logits(model, digits.test_images)
    report = convert(model, run.formats)
    inexact = [m.name for m in report.modules if m.packed and m.sqnr_db != float("inf")]
    if inexact:
        raise RuntimeError(
            f"inq demo: {row.key}, seed {seed}: expected weights on the grid after INQ, not in {inexact}"
        )
    output = logits(model, digits.test_images)
    checkpoint.save(model, places.model)
    files.write_safetensors(places.expected, {"logits": output, "float_logits": float_logits, **fake}, {})
    packed = [module for module in model.modules() if isinstance(module, PACKED)]
    return {
        "accuracy": accuracy(output, digits.test_labels),
        "curve": curve,
        "layers": layers,
        "weights": sum(m.packed.k * m.shape[0] for m in packed),
        "weight_bytes": sum(m.state_dict()["weight"].numel() + m.weight_exp.numel() for m in packed),
    }


def _curve(run: INQ, trainer: _Trainer) -> Iterator[dict]:
    """Test accuracy before INQ, and for each portion just after it was quantized and after retraining."""
    digits = trainer.digits

    def measure() -> float:
        return accuracy(logits(trainer.model, digits.test_images), digits.test_labels)

    start = measure()
    yield {"portion": 0.0, "quantized": start, "retrained": start}
    for portion in run:
        quantized = measure()
        trainer.train()
        yield {"portion": portion, "quantized": quantized, "retrained": measure()}
