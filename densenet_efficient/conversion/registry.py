"""Entries in the registries of timm and torchvision, and among the encoders of
segmentation_models_pytorch: `densenet121_efficient` and the others are their own networks, with
their own options and weights, converted."""

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
    """Adds `NAME_efficient` to the registries of timm, torchvision and segmentation_models_pytorch,
    of those that can be imported.

        densenet_efficient.register_models()
        timm.create_model("densenet121_efficient", pretrained=True, num_classes=10)
        torchvision.models.get_model("densenet121_efficient", weights="DEFAULT")
        segmentation_models_pytorch.Unet("densenet121_efficient", encoder_weights="imagenet")

    Calling it again changes nothing.

    Returns:
        The names that are there now, as "timm.densenet121_efficient".

    Raises:
        ImportError: none of them can be imported.
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
    if importlib.util.find_spec("segmentation_models_pytorch") is not None:
        names += _register_encoders()
    if not names:
        raise ImportError(
            "register_models: expected timm, torchvision or segmentation_models_pytorch, got none"
        )
    return names


def _register_encoders() -> list[str]:
    """The encoders of segmentation_models_pytorch; none where the library itself cannot be
    imported."""
    try:
        from segmentation_models_pytorch.encoders import encoders
    except ImportError:
        return []
    names = [name for name in encoders if name.startswith("densenet") and SUFFIX not in name]
    for name in names:
        entry = encoders[name]
        converted = {**entry, "encoder": _builder(entry["encoder"], name)}
        encoders.setdefault(name + SUFFIX, converted)
    return [f"segmentation_models_pytorch.{name}{SUFFIX}" for name in names]


def _builder(original: Callable[..., nn.Module], name: str) -> Callable[..., nn.Module]:
    @functools.wraps(original)
    def build(*args: Any, **options: Any) -> nn.Module:
        return convert(original(*args, **options))

    build.__name__ = build.__qualname__ = name + SUFFIX
    build.__doc__ = f"{name}, converted; arguments as there."
    return build
