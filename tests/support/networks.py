"""torchvision's network, small, and what of a model must stay where it is."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.support.peer import torchvision

OPTIONS: dict[str, Any] = {
    "growth_rate": 4, "block_config": (2, 3), "num_init_features": 8, "num_classes": 5,
}  # fmt: skip


def network(**options: Any) -> nn.Module:
    """torchvision's DenseNet with OPTIONS, or others."""
    return torchvision.models.DenseNet(**{**OPTIONS, **options})


def snapshot(model: nn.Module) -> list[tuple[str, type, int]]:
    """Every module's name, type and identity."""
    return [(name, type(module), id(module)) for name, module in model.named_modules()]
