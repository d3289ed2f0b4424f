"""Training recipes: the numbers of the papers, checked, and the optimiser and schedule they make.

CIFAR: Huang et al., arXiv 1608.06993, section 4.2: SGD with Nesterov momentum 0.9, weight decay
1e-4, batch 64, learning rate 0.1 divided by 10 after 50 % and 75 % of 300 epochs. ImageNet: 90
epochs, batch 256, learning rate 0.1 divided by 10 after one and two thirds; "imagefolder" is the
same recipe at batch 32, which fits most machines, with the learning rate in proportion.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

__all__ = [
    "PUBLISHED",
    "RECIPES",
    "SCHEDULES",
    "PublishedRecipe",
    "Recipe",
    "advance",
    "build_optimizer",
    "build_schedule",
    "recipe_for",
    "schedule_text",
]

SCHEDULES = ("step", "cosine", "constant")
_NUMBERS = ("mixup", "cutmix", "clip_norm")


def _expect(ok: bool, name: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Recipe:
    """How to train.

    epochs, batch_size: positive integers. learning_rate: the highest of the schedule.
    momentum: 0 <= m < 1, Nesterov's where it is not 0. weight_decay: on every parameter, as in the
    paper. schedule: "step" (divided by 10 at each of `milestones`, fractions of the epochs),
    "cosine" (to zero) or "constant". warmup_epochs: linear start, less than `epochs`.
    label_smoothing: 0 <= s < 1. augment: the data set's own augmentation. randaugment: magnitude of
    RandAugment, 1..30. mixup, cutmix: alpha of the Beta distribution that their shares are drawn
    from; with both, each batch takes one of them. accumulate: parts of a batch that are computed
    one after the other, their gradients added up. clip_norm: the largest norm of all gradients
    together. ema_decay: the share of the old average that each step keeps; averaged weights are
    then what is evaluated and saved. 0 (accumulate: 1) leaves each of these out.

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
    randaugment: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    accumulate: int = 1
    clip_norm: float = 0.0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            value = getattr(self, name)
            ok = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            _expect(ok, name, "a positive integer", value)
        for name in ("learning_rate", "weight_decay", "warmup_epochs", *_NUMBERS):
            value = getattr(self, name)
            _expect(_is_number(value) and value >= 0, name, "a finite number >= 0", value)
        _expect(self.learning_rate > 0, "learning_rate", "a number > 0", self.learning_rate)
        for name in ("momentum", "label_smoothing", "ema_decay"):
            value = getattr(self, name)
            _expect(_is_number(value) and 0 <= value < 1, name, "a number in [0, 1)", value)
        parts_fit = self.accumulate <= self.batch_size
        most = f"at most batch_size ({self.batch_size})"
        _expect(parts_fit, "accumulate", most, self.accumulate)
        _expect(isinstance(self.augment, bool), "augment", "True or False", self.augment)
        whole = isinstance(self.randaugment, int) and not isinstance(self.randaugment, bool)
        inside = whole and 0 <= self.randaugment <= 30
        _expect(inside, "randaugment", "an integer in 0..30", self.randaugment)
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

    def parts(self, images: int) -> int:
        """In how many parts a batch of so many images is computed: `accumulate`, but no part has
        one image where it can have two, which batch statistics need."""
        return max(min(self.accumulate, images // 2), 1)

    def describe(self) -> dict[str, Any]:
        """All fields as plain values."""
        return {**dataclasses.asdict(self), "milestones": list(self.milestones)}

    @staticmethod
    def from_description(fields: Any) -> Recipe:
        """The inverse of `describe`. ValueError where it is not one."""
        names = {field.name for field in dataclasses.fields(Recipe)}
        if not isinstance(fields, dict) or set(fields) != names:
            raise ValueError(f"recipe: expected the fields {sorted(names)}, got {fields!r}")
        milestones = fields["milestones"]
        _expect(isinstance(milestones, list), "milestones", "a list", milestones)
        return Recipe(**{**fields, "milestones": tuple(milestones)})


_CIFAR = Recipe()
RECIPES = {
    "digits": Recipe(epochs=25, schedule="cosine", warmup_epochs=2, label_smoothing=0.1),
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "fashion-mnist": Recipe(epochs=30, batch_size=128, schedule="cosine", warmup_epochs=1),
    "imagefolder": Recipe(
        epochs=90, batch_size=32, learning_rate=0.1 * 32 / 256, milestones=(1 / 3, 2 / 3)
    ),
    "synthetic": Recipe(epochs=1, batch_size=32, schedule="constant", augment=False),
}
"""The default of every data set."""


@dataclass(frozen=True)
class PublishedRecipe:
    """source: where it was published, for what. drop_rate: dropout after every convolution but the
    first, which belongs to it."""

    recipe: Recipe
    source: str
    drop_rate: float = 0.0


_IMAGENET = Recipe(epochs=90, batch_size=256, milestones=(1 / 3, 2 / 3))
PUBLISHED = {
    "cifar+": PublishedRecipe(_CIFAR, "arXiv 1608.06993: C10+ and C100+, crops and flips"),
    "cifar": PublishedRecipe(
        dataclasses.replace(_CIFAR, augment=False),
        "arXiv 1608.06993: C10 and C100, no augmentation",
        0.2,
    ),
    "imagenet": PublishedRecipe(_IMAGENET, "arXiv 1608.06993: ImageNet"),
    "imagenet-cosine": PublishedRecipe(
        dataclasses.replace(_IMAGENET, schedule="cosine"),
        "the authors' DenseNet-cosine-264: ImageNet",
    ),
    "pleiss": PublishedRecipe(
        _CIFAR, "the demonstration of efficient_densenet_pytorch: CIFAR-10, BC-100-12"
    ),
    "d2l": PublishedRecipe(
        Recipe(
            epochs=10, batch_size=256, momentum=0.0, weight_decay=0.0, schedule="constant",
            augment=False,
        ),
        "Dive into Deep Learning: Fashion-MNIST at 96 px",
    ),
}  # fmt: skip
"""Recipes by name, whatever the data."""


def schedule_text(recipe: Recipe) -> str:
    """The learning rate over the epochs, in words: "0.1 to epoch 150, 0.01 to 225"."""
    rate = f"{recipe.learning_rate:g}"
    rise = f"rising for {recipe.warmup_epochs:g} epochs, " if recipe.warmup_epochs else ""
    if recipe.schedule == "constant":
        return f"{rise}{rate} to epoch {recipe.epochs}"
    if recipe.schedule == "cosine":
        return f"{rise}{rate} to 0 at epoch {recipe.epochs}, as a cosine"
    ends = [*(m * recipe.epochs for m in recipe.milestones), recipe.epochs]
    steps = [f"{recipe.learning_rate / 10**i:g} to {end:g}" for i, end in enumerate(ends)]
    return rise + ", ".join(steps).replace(" to ", " to epoch ", 1)


def recipe_for(data: str, **overrides: Any) -> Recipe:
    """The recipe of a data set, or the published one of that name, with the values that are given
    instead (None: not given). The warm-up, where it is not given, keeps its share of the epochs.
    ValueError for unknown data or a value out of its range."""
    if data not in RECIPES and data not in PUBLISHED:
        raise ValueError(f"data: expected one of {', '.join(RECIPES)}, got {data!r}")
    recipe = RECIPES[data] if data in RECIPES else PUBLISHED[data].recipe
    epochs = overrides.get("epochs")
    if isinstance(epochs, int) and overrides.get("warmup_epochs") is None:
        share = recipe.warmup_epochs / recipe.epochs
        overrides["warmup_epochs"] = share * max(epochs, 0)
    return recipe.replaced(**overrides)


def build_optimizer(model: nn.Module, recipe: Recipe, fused: bool | None = None) -> torch.optim.SGD:
    """SGD over the parameters that require gradients. fused: as a CUDA graph needs it; None for
    PyTorch's choice."""
    return torch.optim.SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
        weight_decay=recipe.weight_decay,
        fused=fused,
    )


def build_schedule(
    optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int
) -> lr_scheduler.LRScheduler:
    """The recipe's learning rate, to be stepped once per optimiser step: PyTorch's own schedulers,
    after a linear warm-up where the recipe has one."""
    warm_up = math.ceil(recipe.warmup_epochs * steps_per_epoch)
    after = recipe.epochs * steps_per_epoch - warm_up
    schedule: lr_scheduler.LRScheduler
    if recipe.schedule == "step":
        steps = [math.ceil(m * recipe.epochs * steps_per_epoch) for m in recipe.milestones]
        milestones = [max(step - warm_up, 0) for step in steps]
        schedule = lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    elif recipe.schedule == "cosine":
        schedule = lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(after, 1))
    else:
        schedule = lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if not warm_up:
        return schedule
    rising = lr_scheduler.LinearLR(optimizer, start_factor=1 / (warm_up + 1), total_iters=warm_up)
    return lr_scheduler.SequentialLR(optimizer, [rising, schedule], milestones=[warm_up])


def advance(schedule: lr_scheduler.LRScheduler, steps: int) -> None:
    """Put a new schedule to where `steps` optimiser steps would have brought it."""
    with warnings.catch_warnings():  # PyTorch expects a step of the optimiser before each
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(steps):
            schedule.step()
