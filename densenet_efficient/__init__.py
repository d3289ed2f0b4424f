"""DenseNets in nearly the least memory that exact back-propagation allows."""

from .arena import release
from .convert import convert, register_adapter, unconvert
from .explain import explain
from .features import EfficientFeatures, EfficientTransition
from .library import MissingLibraryError, info
from .models import (
    EfficientDenseNet,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet264,
    densenet264_k48,
    densenet_cifar,
)
from .modules import EfficientDenseBlock, LayerParts
from .plan import Plan, max_batch, plan
from .version import __version__

__all__ = [
    "EfficientDenseBlock",
    "EfficientDenseNet",
    "EfficientFeatures",
    "EfficientTransition",
    "LayerParts",
    "MissingLibraryError",
    "Plan",
    "__version__",
    "convert",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "densenet264_k48",
    "densenet_cifar",
    "explain",
    "info",
    "max_batch",
    "plan",
    "register_adapter",
    "release",
    "unconvert",
]
