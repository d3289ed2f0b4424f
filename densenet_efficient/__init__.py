"""DenseNets in nearly the least memory that exact back-propagation allows."""

from .arena import release
from .explain import explain
from .library import MissingLibraryError, info
from .modules import EfficientDenseBlock, EfficientFeatures, EfficientTransition, LayerParts
from .version import __version__

__all__ = [
    "EfficientDenseBlock",
    "EfficientFeatures",
    "EfficientTransition",
    "LayerParts",
    "MissingLibraryError",
    "__version__",
    "explain",
    "info",
    "release",
]
