"""FC-DenseNets ("Tiramisu"), to be registered for your own copy of the class: plain layers with
bias and Dropout2d, and blocks that return only their new channels on the way up.

    bfortuner        DenseBlock.layers (ModuleList) of DenseLayer (norm relu conv drop); upsample
                     leaves the input out
    baldassarreFe    DenseBlock with children layer_{i} (norm relu conv [drop], or norm relu
                     bottleneck.{conv,norm,relu} conv [drop]); concat_input takes the input in
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ...nn.layers import LayerParts
from ..adapters import block_adapter
from ..names import LayerNames, find, named_block

_PLAIN = LayerNames("norm", "conv", relus=("relu",), drop="drop")
_BOTTLENECK = LayerNames(
    "norm", "bottleneck.conv", "bottleneck.norm", "conv",
    relus=("relu", "bottleneck.relu"), drop="drop",
)  # fmt: skip


def layers_of(block: nn.Module) -> Mapping[str, nn.Module]:
    """The layers in the block's attribute `layers`."""
    return dict(block.get_submodule("layers").named_children())


def is_not_upsampling(block: Any) -> bool:
    """Whether bfortuner's block returns its input, too."""
    return not block.upsample


def concatenates_input(block: Any) -> bool:
    """Whether baldassarreFe's block returns its input, too."""
    return bool(block.concat_input)


def _names(layer: nn.Module) -> LayerNames:
    return _PLAIN if find(layer, "bottleneck") is None else _BOTTLENECK


def baldassarre_parts(layer: nn.Module) -> LayerParts:
    """Of a layer with a bottleneck or without."""
    return _names(layer)(layer)


def _check_baldassarre(name: str, layer: nn.Module) -> None:
    _names(layer).check(name, layer)


bfortuner_dense_block = named_block(_PLAIN, layers=layers_of, with_input=is_not_upsampling)
baldassarre_dense_block = block_adapter(
    baldassarre_parts, check=_check_baldassarre, with_input=concatenates_input
)
