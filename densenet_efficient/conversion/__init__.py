"""Conversion: a DenseNet of another library, in place, in the least memory. May import `nn` and
below.

A block of your own, whose children are its layers and which appends each layer's new channels
after all earlier ones, is taught by naming the parts of a layer:

    def parts(layer):
        return LayerParts(layer.bn1, layer.squeeze, layer.bn2, layer.grow, layer.p)

    register_adapter(MyBlock, block_adapter(parts))

The numerical self-check finds an adapter that is wrong before anything is swapped. `libraries` has
the adapters of known classes, which also serve copies of these classes in your own code.
"""

from . import libraries
from .adapters import (
    Adapter,
    LayerAdapter,
    block_adapter,
    register_adapter,
    transition_adapter,
)
from .checks import Unsupported
from .swap import ConversionError, Report, convert, inspect_conversion, unconvert

libraries.register()

__all__ = [
    "Adapter",
    "ConversionError",
    "LayerAdapter",
    "Report",
    "Unsupported",
    "block_adapter",
    "convert",
    "inspect_conversion",
    "libraries",
    "register_adapter",
    "transition_adapter",
    "unconvert",
]
