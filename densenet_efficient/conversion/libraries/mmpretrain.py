"""mmpretrain's (before, mmcls's) DenseNet.

DenseBlock       block (ModuleList): norm1 conv1 act norm2 conv2, one act for both, F.dropout
DenseTransition  norm act conv pool
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..names import LayerNames, TransitionNames, named_block, named_transition

_HOMES = ("mmpretrain.models.backbones.densenet", "mmcls.models.backbones.densenet")
_NAMES = LayerNames("norm1", "conv1", "norm2", "conv2", relus=("act",), drop="drop_rate")


def layers_of(block: nn.Module) -> Mapping[str, nn.Module]:
    """The block's layers."""
    return dict(block.get_submodule("block").named_children())


dense_block = named_block(_NAMES, layers=layers_of)
transition = named_transition(TransitionNames("norm", "conv", "pool", "act"))

ADAPTERS = {
    **{
        f"{home}.DenseBlock": named_block(_NAMES, f"{home}.DenseLayer", layers=layers_of)
        for home in _HOMES
    },
    **{f"{home}.DenseTransition": transition for home in _HOMES},
}
