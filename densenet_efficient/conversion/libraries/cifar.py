"""Widely copied DenseNets for CIFAR, to be registered for your own copy of the class.

andreasveit      DenseBlock.layer (Sequential) of BasicBlock (bn1 relu conv1) or BottleneckBlock
                 (bn1 relu conv1 bn2 conv2, one relu), F.dropout by droprate after every
                 convolution; a layer returns its input with its new channels
bamos            Sequential of SingleLayer (bn1 conv1) or Bottleneck (bn1 conv1 bn2 conv2), whose
                 forward rectifies; returns its input with its new channels
kuangliu         the same Bottleneck, returns its new channels with its input: newest first
phlippe (UvA)    DenseBlock.block (Sequential) of DenseLayer.net (norm act conv norm act conv):
                 newest first
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..adapters import LayerAdapter
from ..names import LayerNames, TransitionNames, named_block, named_transition

_VEIT_PLAIN = LayerNames("bn1", "conv1", relus=("relu",), drop="droprate")
_VEIT = LayerNames(
    "bn1", "conv1", "bn2", "conv2", relus=("relu",), drop="droprate", bottleneck_drop="droprate"
)
_BAMOS = LayerNames("bn1", "conv1", "bn2", "conv2")
_UVA = LayerNames("net.0", "net.2", "net.3", "net.5", relus=("net.1", "net.4"))


def layer_of(block: nn.Module) -> Mapping[str, nn.Module]:
    """The layers in the block's attribute `layer`."""
    return dict(block.get_submodule("layer").named_children())


def block_of(block: nn.Module) -> Mapping[str, nn.Module]:
    """The layers in the block's attribute `block`."""
    return dict(block.get_submodule("block").named_children())


andreasveit_dense_block = named_block(_VEIT, layers=layer_of)
andreasveit_transition = named_transition(
    TransitionNames("bn1", "conv1", relu="relu", drop="droprate")
)
bamos_layer = LayerAdapter(_BAMOS, _BAMOS.check)
bamos_transition = named_transition(TransitionNames("bn1", "conv1"))
kuangliu_layer = LayerAdapter(_BAMOS, _BAMOS.check, newest_first=True)
uva_dense_block = named_block(_UVA, layers=block_of, newest_first=True)
uva_transition = named_transition(
    TransitionNames("transition.0", "transition.2", "transition.3", "transition.1")
)
