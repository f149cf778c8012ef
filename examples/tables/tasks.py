"""What all methods share: the data, the float32 start and the further training, and how a network is measured."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inq_kernels.demo.command import load_digits
from inq_kernels.demo.train import Digits, accuracy, logits

from .networks import NETWORKS


@dataclass(frozen=True)
class Recipe:
    """The same for all networks. What the demo of this package has, which was chosen on images held out of the training
    ones, where it has it; the rest was tried in the same way, on the last 297 training images and seeds that no table
    has.

    Attributes:
        steps: of the float32 network that everything starts from.
        further: steps after that, for each method; its portions share them. Pruning takes as many before quantizing.
        coarse_lr: in place of ``further_lr`` where more of the network changes: for TWN, BWN and ternary INQ (T4), for
            pruning and for INQ after it (T5). TWN, BWN, ternary INQ and DNS were better with it on LeNet-300-100; the
            first three no worse on the LeNet-5-shaped network and the CNN.
        centroid_lr: of Deep Compression's codebooks: a centroid has the summed gradients of its weights.
        c_rates: DNS's, of the first layer, the other convolutions, the other Linear layers, and the last layer: of
            three sets that lost nothing, the one that kept the fewest weights of the LeNet-5-shaped network.
    """

    steps: int = 760
    further: int = 720
    batch: int = 32
    lr: float = 0.05
    further_lr: float = 0.03
    coarse_lr: float = 0.1
    centroid_lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    c_rates: tuple[float, float, float, float] = (0.5, 1.5, 3.0, 1.5)


# Everything runs, and no number means anything. Weights that are hardly trained have no tail: higher thresholds would
# prune all of a layer.
QUICK = Recipe(steps=20, further=12, batch=16, c_rates=(0.0, 0.5, 0.5, 0.0))


def shares(steps: int, parts: int) -> list[int]:
    """``steps`` in so many parts, equal if they can be: the steps of each portion."""
    ends = [steps * part // parts for part in range(parts + 1)]
    return [end - begin for begin, end in itertools.pairwise(ends)]


class Trainer(Protocol):
    """Training that goes on: after each ``train`` INQ sets the scheduler back."""

    optimizer: torch.optim.Optimizer
    scheduler: Any

    def train(self, steps: int) -> None:
        """So many steps further."""


class Task(Protocol):
    """A network with its data."""

    recipe: Any

    def build(self) -> nn.Module:
        """The network, untrained."""

    def start(self, seed: int) -> nn.Module:
        """The float32 network of a seed, trained."""

    def further(self, model: nn.Module, phase: int, seed: int, lr: float) -> Trainer:
        """Training of ``model`` from then on, in phases of so many steps: the same batches for every method."""

    def measure(self, model: nn.Module) -> float:
        """What is compared; less is better."""


class DigitsTrainer:
    """SGD with momentum and a cosine from ``lr`` to 0 over each phase."""

    def __init__(self, model: nn.Module, recipe: Recipe, lr: float, phase: int, seed: int, weight_decay: float):
        self.model, self.recipe = model, recipe
        self.optimizer = torch.optim.SGD(model.parameters(), lr, momentum=recipe.momentum, weight_decay=weight_decay)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, phase)
        # Its own, so that every method of a seed sees the images in the same order.
        self._batches = _batches(digits(), recipe.batch, torch.Generator().manual_seed(seed))

    def train(self, steps: int) -> None:
        """So many steps further."""
        self.model.train()
        for _ in range(steps):
            images, labels = next(self._batches)
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(images), labels, label_smoothing=self.recipe.label_smoothing).backward()
            self.optimizer.step()
            self.scheduler.step()


def _batches(data: Digits, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        for index in torch.randperm(len(data.train_labels), generator=generator).split(size):
            yield data.train_images[index], data.train_labels[index]


@functools.cache
def digits() -> Digits:
    """The demo's images and its split: 1197 to train with, 600 to test with."""
    return load_digits()


@dataclass(frozen=True)
class DigitsTask:
    """One of ``networks.NETWORKS`` on handwritten digits; measured is the test error in percent."""

    network: str
    recipe: Recipe

    def build(self) -> nn.Module:
        """The network, untrained."""
        return NETWORKS[self.network].build()

    def start(self, seed: int) -> nn.Module:
        """The float32 network of a seed, trained."""
        torch.manual_seed(seed)
        model, recipe = self.build(), self.recipe
        DigitsTrainer(model, recipe, recipe.lr, recipe.steps, seed, recipe.weight_decay).train(recipe.steps)
        return model

    def further(self, model: nn.Module, phase: int, seed: int, lr: float) -> DigitsTrainer:
        """Training of ``model`` from then on."""
        return DigitsTrainer(model, self.recipe, lr, phase, seed + 1000, self.recipe.weight_decay)

    def centroids(self, model: nn.Module, phase: int, seed: int) -> DigitsTrainer:
        """The same for Deep Compression's codebooks, without weight decay: a centroid is no small weight."""
        return DigitsTrainer(model, self.recipe, self.recipe.centroid_lr, phase, seed + 1000, 0.0)

    def measure(self, model: nn.Module) -> float:
        """Percent of the test images."""
        data = digits()
        return 100 - accuracy(logits(model, data.test_images), data.test_labels)
