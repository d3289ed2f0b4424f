"""timm's DenseNets: norms include their activation, parameters have torchvision's names.

DenseBlock       denselayer{i}: norm1 conv1 norm2 conv2, F.dropout by drop_rate
DenseTransition  norm conv pool; with anti-aliasing pool is a BlurPool2d, and it is left
"""

from __future__ import annotations

from ..adapters import refusal
from ..names import LayerNames, TransitionNames, named_block, named_transition

_HOME = "timm.models.densenet"
_NAMES = LayerNames("norm1", "conv1", "norm2", "conv2", drop="drop_rate")
_RDNET = refusal(
    "RDNet's blocks are layer norms and pointwise MLPs: no batch norm to fuse", required=False
)

dense_block = named_block(_NAMES)
transition = named_transition(TransitionNames("norm", "conv", "pool"))

ADAPTERS = {
    f"{_HOME}.DenseBlock": named_block(_NAMES, f"{_HOME}.DenseLayer"),
    f"{_HOME}.DenseTransition": transition,
    "timm.models.rdnet.DenseStage": _RDNET,
    "timm.models.rdnet.DenseBlock": _RDNET,
}
