"""pytorchcv's DenseNets: no block of their own, but a Sequential of a transition and units.

DenseUnit        conv1, conv2 (PreConvBlock: bn activ conv) [dropout]; returns its input with
                 its new channels
DenseSimpleUnit  conv (PreConvBlock) [dropout], for CIFAR
TransitionBlock  conv (PreConvBlock) pool
"""

from __future__ import annotations

from ..adapters import LayerAdapter
from ..names import LayerNames, TransitionNames, named_transition

_UNIT = LayerNames(
    "conv1.bn", "conv1.conv", "conv2.bn", "conv2.conv",
    relus=("conv1.activ", "conv2.activ"), drop="dropout",
)  # fmt: skip
_SIMPLE = LayerNames("conv.bn", "conv.conv", relus=("conv.activ",), drop="dropout")

dense_unit = LayerAdapter(_UNIT, _UNIT.check)
dense_simple_unit = LayerAdapter(_SIMPLE, _SIMPLE.check)
transition = named_transition(TransitionNames("conv.bn", "conv.conv", "pool", "conv.activ"))

ADAPTERS = {
    "pytorchcv.models.densenet.DenseUnit": dense_unit,
    "pytorchcv.models.densenet.TransitionBlock": transition,
    "pytorchcv.models.densenet_cifar.DenseSimpleUnit": dense_simple_unit,
}
