"""DenseNets in nearly the least memory that exact back-propagation allows."""

from .arena import release
from .explain import explain
from .library import MissingLibraryError, info
from .modules import EfficientDenseBlock, EfficientFeatures, EfficientTransition, LayerParts
from .plan import Plan, max_batch, plan
from .version import __version__

__all__ = [
    "EfficientDenseBlock",
    "EfficientFeatures",
    "EfficientTransition",
    "LayerParts",
    "MissingLibraryError",
    "Plan",
    "__version__",
    "explain",
    "info",
    "max_batch",
    "plan",
    "release",
]
