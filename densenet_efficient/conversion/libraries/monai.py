"""MONAI's DenseNets for one, two and three dimensions.

_DenseBlock  denselayer{i}.layers: norm1 relu1 conv1 norm2 relu2 conv2 [dropout]; a layer
             returns its input with its new channels; dropout is Dropout, Dropout2d or Dropout3d
_Transition  norm relu conv pool
"""

from __future__ import annotations

from ..names import LayerNames, named_block
from .torchvision import transition

_HOME = "monai.networks.nets.densenet"
_NAMES = LayerNames(
    "layers.norm1", "layers.conv1", "layers.norm2", "layers.conv2",
    relus=("layers.relu1", "layers.relu2"), drop="layers.dropout",
)  # fmt: skip

dense_block = named_block(_NAMES)

ADAPTERS = {
    f"{_HOME}._DenseBlock": named_block(_NAMES, f"{_HOME}._DenseLayer"),
    f"{_HOME}._Transition": transition,
}
