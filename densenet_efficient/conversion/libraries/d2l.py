"""The DenseNet of the book Dive into Deep Learning, to be registered for your own copy of it.

    DenseBlock.net (Sequential) of Sequential(batch norm, ReLU, 3x3 convolution with bias); the
    block concatenates. Lazy modules must have seen one batch.

The book's transition is an ordinary Sequential, which is recognised by its children.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..names import LayerNames, named_block

_NAMES = LayerNames("0", "2", relus=("1",))


def layers_of(block: nn.Module) -> Mapping[str, nn.Module]:
    """The layers in the block's attribute `net`."""
    return dict(block.get_submodule("net").named_children())


dense_block = named_block(_NAMES, layers=layers_of)
