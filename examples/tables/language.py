"""The byte-level language model of examples/language_model.py as a task: measured are bits per byte of files that it
was not trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .. import language_model as example


@dataclass(frozen=True)
class Recipe(example.Recipe):
    """The example's, and as many further steps for every method as it has for INQ at 2 bits."""

    further: int = 1350


QUICK = Recipe(width=32, layers=2, heads=2, context=64, batch=8, steps=20, further=10, validation_windows=32)


class LanguageTrainer:
    """The example's, with a cosine in each phase."""

    def __init__(self, model: nn.Module, recipe: Recipe, phase: int, seed: int):
        self._trainer = example.Trainer(model, recipe, recipe.retrain_lr, seed)
        self.optimizer = self._trainer.optimizer
        end = recipe.retrain_lr / 10
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, phase, end)

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

    def further(self, model: nn.Module, phase: int, seed: int) -> LanguageTrainer:
        """Training of ``model`` from then on."""
        return LanguageTrainer(model, self.recipe, phase, seed + 1000)

    def measure(self, model: nn.Module) -> float:
        """Bits per byte."""
        return example.bits_per_byte(model, self.recipe)
