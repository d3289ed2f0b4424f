"""`convert(model)`: a DenseNet of another library, in place, in the least memory."""

from . import torchvision_tree
from .adapters import Adapter, Unsupported, block_adapter, register_adapter
from .conversion import (
    ConversionError,
    Report,
    convert,
    inspect_conversion,
    unconvert,
)

torchvision_tree.register()

__all__ = [
    "Adapter",
    "ConversionError",
    "Report",
    "Unsupported",
    "block_adapter",
    "convert",
    "inspect_conversion",
    "register_adapter",
    "unconvert",
]
