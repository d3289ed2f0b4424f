"""torchvision's DenseNet and those written after it; our reference, too.

    _DenseBlock  denselayer{i}: norm1 relu1 conv1 norm2 relu2 conv2, F.dropout by drop_rate
    _Transition  norm relu conv pool

A layer returns its new channels (torchvision since 0.4, whose block is a ModuleDict; LibAUC; Pleiss
et al., whose layers take several arguments) or its input with them (torchvision before, torchreid,
torchxrayvision, GaNDLF, 3D-ResNets), which comes to the same. Checkpointing inside a layer,
`memory_efficient` or `efficient`, is subsumed by the conversion.
"""

from __future__ import annotations

from ..names import LayerNames, TransitionNames, named_block, named_transition

NAMES = LayerNames("norm1", "conv1", "norm2", "conv2", relus=("relu1", "relu2"), drop="drop_rate")
LIBAUC = LayerNames("norm1", "conv1", "norm2", "conv2", relus=("elu1", "elu2"), drop="drop_rate")

dense_block = named_block(NAMES)
transition = named_transition(TransitionNames("norm", "conv", "pool", "relu"))
libauc_dense_block = named_block(LIBAUC)
libauc_transition = named_transition(TransitionNames("norm", "conv", "pool", "ELU"))

HOMES = (
    "torchvision.models.densenet",
    "torchxrayvision.models",
    "torchreid.models.densenet",
    "torchreid.reid.models.densenet",
    "GANDLF.models.densenet",
    "models.densenet",  # of Pleiss et al., and of 3D-ResNets-PyTorch
)

ADAPTERS = {
    **{f"{home}._DenseBlock": named_block(NAMES, f"{home}._DenseLayer") for home in HOMES},
    **{f"{home}._Transition": transition for home in HOMES},
    "densenet_efficient.reference.modules.DenseBlock": named_block(
        NAMES, "densenet_efficient.reference.modules.DenseLayer"
    ),
    "densenet_efficient.reference.modules.Transition": transition,
    "libauc.models.densenet._DenseBlock": named_block(LIBAUC, "libauc.models.densenet._DenseLayer"),
    "libauc.models.densenet._Transition": libauc_transition,
}
