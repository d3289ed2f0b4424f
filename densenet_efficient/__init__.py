"""DenseNets in nearly the least memory that exact back-propagation allows."""

from .conversion import convert, register_adapter, unconvert
from .core.arena import release
from .memory.planner import Plan, max_batch, plan
from .models.densenet import (
    EfficientDenseNet,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet264,
    densenet264_k48,
    densenet_cifar,
)
from .nn.dense_block import EfficientDenseBlock, LayerParts
from .nn.features import EfficientFeatures, EfficientTransition
from .ops.library import MissingLibraryError, info
from .report.explanation import explain
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
