"""Training recipes: the numbers of the papers, checked, and the optimiser and schedule they make.

CIFAR: Huang et al., arXiv 1608.06993, section 4.2: SGD with Nesterov momentum 0.9, weight decay
1e-4, batch 64, learning rate 0.1 divided by 10 after 50 % and 75 % of 300 epochs. ImageNet: 90
epochs, batch 256, divided by 10 after one and two thirds.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["RECIPES", "SCHEDULES", "Recipe", "build_optimizer", "build_schedule", "recipe_for"]

SCHEDULES = ("step", "cosine", "constant")


def _expect(ok: bool, name: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Recipe:
    """How to train.

    epochs, batch_size: positive integers. learning_rate: at the height of the schedule.
    momentum: 0 <= m < 1, Nesterov's where it is not 0. weight_decay: on every parameter, as in the
    paper. schedule: "step" (divided by 10 at each of `milestones`, fractions of the epochs),
    "cosine" (to zero) or "constant". warmup_epochs: linear start, less than `epochs`.
    label_smoothing: 0 <= s < 1. augment: the data set's own augmentation.

    Raises:
        ValueError: a value out of its range; the message names it, what was expected and what came.
    """

    epochs: int = 300
    batch_size: int = 64
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "step"
    milestones: tuple[float, ...] = (0.5, 0.75)
    warmup_epochs: float = 0
    label_smoothing: float = 0.0
    augment: bool = True

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            ok = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            _expect(ok, name, "a positive integer", value)
        for name in ("learning_rate", "weight_decay", "warmup_epochs"):
            value = getattr(self, name)
            _expect(_is_number(value) and value >= 0, name, "a finite number >= 0", value)
        _expect(self.learning_rate > 0, "learning_rate", "a number > 0", self.learning_rate)
        for name in ("momentum", "label_smoothing"):
            value = getattr(self, name)
            _expect(_is_number(value) and 0 <= value < 1, name, "a number in [0, 1)", value)
        _expect(self.schedule in SCHEDULES, "schedule", f"one of {SCHEDULES}", self.schedule)
        rising = all(a < b for a, b in zip(self.milestones, self.milestones[1:], strict=False))
        inside = all(_is_number(m) and 0 < m < 1 for m in self.milestones)
        _expect(rising and inside, "milestones", "rising fractions in (0, 1)", self.milestones)
        shorter = self.warmup_epochs < self.epochs
        _expect(shorter, "warmup_epochs", f"less than epochs ({self.epochs})", self.warmup_epochs)

    def replaced(self, **values: Any) -> Recipe:
        """A copy in which every value that is not None replaces ours. ValueError as above."""
        given = {name: value for name, value in values.items() if value is not None}
        return dataclasses.replace(self, **given)

    def describe(self) -> dict[str, Any]:
        """All fields as plain values."""
        return {**dataclasses.asdict(self), "milestones": list(self.milestones)}


_CIFAR = Recipe()
RECIPES = {
    "digits": Recipe(epochs=25, schedule="cosine", warmup_epochs=2, label_smoothing=0.1),
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "fashion-mnist": Recipe(epochs=30, batch_size=128, schedule="cosine", warmup_epochs=1),
    "imagefolder": Recipe(epochs=90, batch_size=256, milestones=(1 / 3, 2 / 3)),
    "synthetic": Recipe(epochs=1, batch_size=32, schedule="constant", augment=False),
}


def recipe_for(data: str, **overrides: Any) -> Recipe:
    """The recipe of a data set, with the values that are given instead (None: not given). The
    warm-up, where it is not given, keeps its share of the epochs. ValueError for unknown data or
    a value out of its range."""
    if data not in RECIPES:
        raise ValueError(f"data: expected one of {', '.join(RECIPES)}, got {data!r}")
    recipe = RECIPES[data]
    epochs = overrides.get("epochs")
    if isinstance(epochs, int) and overrides.get("warmup_epochs") is None:
        share = recipe.warmup_epochs / recipe.epochs
        overrides["warmup_epochs"] = share * max(epochs, 0)
    return recipe.replaced(**overrides)


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """SGD over the parameters that require gradients."""
    return torch.optim.SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
        weight_decay=recipe.weight_decay,
    )


def build_schedule(
    optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate's factor, stepped once per optimiser step."""

    def factor(step: int) -> float:
        epoch = step / steps_per_epoch
        if epoch < recipe.warmup_epochs:
            return (step + 1) / (math.ceil(recipe.warmup_epochs * steps_per_epoch) + 1)
        if recipe.schedule == "step":
            return 0.1 ** sum(epoch >= milestone * recipe.epochs for milestone in recipe.milestones)
        if recipe.schedule == "cosine":
            progress = (epoch - recipe.warmup_epochs) / (recipe.epochs - recipe.warmup_epochs)
            return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return 1.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
