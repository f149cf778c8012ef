"""The byte-level language model of examples/language_model.py as a task: measured are bits per byte of files that it
was not trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .. import language_model as example


@dataclass(frozen=True)
class Recipe(example.Recipe):
    """A smaller network than the example's, since each seed trains it once for each method.

    Attributes:
        further: steps for each method, as ``tasks.Recipe`` has them.
        further_lr: of float32 that trains as long.
        coarse_lr: of ternary networks. 2e-3 was better than 1e-3 and 4e-3 for TWN and INQ, and than 1e-3 for BWN, with
            a seed that no table has.
    """

    width: int = 64
    layers: int = 2
    heads: int = 2
    context: int = 64
    steps: int = 1500
    further: int = 900
    further_lr: float = 1e-3
    coarse_lr: float = 2e-3


QUICK = Recipe(width=32, layers=2, heads=2, context=64, batch=8, steps=20, further=10, validation_windows=32)


class LanguageTrainer:
    """The example's, with a cosine in each phase."""

    def __init__(self, model: nn.Module, recipe: Recipe, lr: float, phase: int, seed: int):
        self._trainer = example.Trainer(model, recipe, lr, seed)
        self.optimizer = self._trainer.optimizer
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, phase, lr / 10)

    def train(self, steps: int) -> None:
        """So many steps further."""
        self._trainer.train(steps, self.scheduler)


@dataclass(frozen=True)
class LanguageTask:
    """See ``tasks.Task``."""

    recipe: Recipe

    def build(self) -> nn.Module:
        """The network, untrained."""
        return example.LanguageModel(self.recipe)

    def start(self, seed: int) -> nn.Module:
        """The float32 network of a seed, trained."""
        return example.trained(self.recipe, seed)

    def further(self, model: nn.Module, phase: int, seed: int, lr: float) -> LanguageTrainer:
        """Training of ``model`` from then on."""
        return LanguageTrainer(model, self.recipe, lr, phase, seed + 1000)

    def measure(self, model: nn.Module) -> float:
        """Bits per byte."""
        return example.bits_per_byte(model, self.recipe)
