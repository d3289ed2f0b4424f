"""Entries in the registries of timm and torchvision: `densenet121_efficient` and the others are
their own networks, with their own options and weights, converted."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

from torch import nn

from ..torchvision_compat import import_torchvision
from .swap import convert

__all__ = ["register_models"]

SUFFIX = "_efficient"
TORCHVISION = ("densenet121", "densenet161", "densenet169", "densenet201")
TIMM = (*TORCHVISION, "densenet264d", "densenetblur121d")


def register_models() -> list[str]:
    """Adds `NAME_efficient` to the registries of timm and torchvision, of those that are installed.

        densenet_efficient.register_models()
        timm.create_model("densenet121_efficient", pretrained=True, num_classes=10)
        torchvision.models.get_model("densenet121_efficient", weights="DEFAULT")

    Calling it again changes nothing.

    Returns:
        The names that are there now, as "timm.densenet121_efficient".

    Raises:
        ImportError: neither of them is installed.
    """
    names = []
    try:
        models = import_torchvision("torchvision.models")
    except ImportError:
        models = None
    if models is not None:
        add = import_torchvision("torchvision.models._api").register_model
        known = set(models.list_models())
        for name in TORCHVISION:
            if name + SUFFIX not in known:
                add(name + SUFFIX)(_builder(getattr(models, name), name))
            names.append(f"torchvision.{name}{SUFFIX}")
    if importlib.util.find_spec("timm") is not None:
        import timm
        from timm.models import _registry as registry

        for name in TIMM:
            if timm.is_model(name) and not timm.is_model(name + SUFFIX):
                registry.register_model(_builder(registry.model_entrypoint(name), name))
            names += [f"timm.{name}{SUFFIX}"] * timm.is_model(name + SUFFIX)
    if not names:
        raise ImportError("register_models: expected timm or torchvision, got neither")
    return names


def _builder(original: Callable[..., nn.Module], name: str) -> Callable[..., nn.Module]:
    @functools.wraps(original)
    def build(*args: Any, **options: Any) -> nn.Module:
        return convert(original(*args, **options))

    build.__name__ = build.__qualname__ = name + SUFFIX
    build.__doc__ = f"{name}, converted; arguments as there."
    return build
