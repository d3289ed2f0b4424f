"""What is done to training images: crops and flips, RandAugment, MixUp and CutMix, by torchvision's
transforms. All of it draws from torch's generator, whose state a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..torchvision_compat import import_torchvision
from .recipes import Recipe

__all__ = ["Mixing", "crops_and_flips", "digit_distortions", "mixing", "random_crops"]

Mixing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def crops_and_flips(size: int, augment: bool, randaugment: int) -> list[Any]:
    """For CIFAR and Fashion-MNIST: crops of an image with an eighth of its side around it."""
    v2 = import_torchvision("torchvision.transforms.v2")
    own = [v2.RandomCrop(size, padding=max(size // 8, 1)), v2.RandomHorizontalFlip()]
    return [*(own if augment else []), *_randaugment(v2, randaugment)]


def random_crops(size: int, augment: bool, randaugment: int) -> list[Any]:
    """For ImageNet: crops of any size and shape; without `augment` the middle of the image."""
    v2 = import_torchvision("torchvision.transforms.v2")
    middle = [v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)]
    own = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
    return [*(own if augment else middle), *_randaugment(v2, randaugment)]


def digit_distortions(background: float) -> Any:
    """For digits: small rotations, shifts and scalings of an image [C, H, W]."""
    v2 = import_torchvision("torchvision.transforms.v2")
    return v2.RandomAffine(
        10,
        translate=(0.1, 0.1),
        scale=(0.9, 1.1),
        fill=background,
        interpolation=v2.InterpolationMode.BILINEAR,
    )


def _randaugment(v2: Any, magnitude: int) -> list[Any]:
    return [v2.RandAugment(magnitude=magnitude)] if magnitude else []


def mixing(recipe: Recipe, num_classes: int) -> Mixing | None:
    """MixUp, CutMix or, where the recipe has both, one of them for each batch: images [n, C, H, W]
    and labels [n] become images and shares [n, num_classes]. None where it has neither."""
    if not (recipe.mixup or recipe.cutmix):
        return None
    v2 = import_torchvision("torchvision.transforms.v2")
    chosen = []
    if recipe.mixup:
        chosen.append(v2.MixUp(alpha=recipe.mixup, num_classes=num_classes))
    if recipe.cutmix:
        chosen.append(v2.CutMix(alpha=recipe.cutmix, num_classes=num_classes))
    return v2.RandomChoice(chosen)
