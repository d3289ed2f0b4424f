"""The plain PyTorch reference of all this library computes: the operators, and the layers, blocks
and models built of ordinary nn.Modules. They are the specification; nothing here needs the compiled
library, and everything works in float64."""

from .modules import DenseBlock, DenseLayer, DenseNet, FCDenseNet, Transition
from .operators import (
    channel_stats,
    norm_correction,
    norm_correction_apply,
    norm_fold,
    norm_relu_conv1x1_backward,
    norm_relu_conv1x1_forward,
    norm_relu_conv3x3_backward,
    norm_relu_conv3x3_forward,
    stem_backward,
    stem_conv_backward_weight,
    stem_conv_forward,
    stem_forward,
    transition_backward,
    transition_forward,
    wide_dtype,
)

__all__ = [
    "DenseBlock",
    "DenseLayer",
    "DenseNet",
    "FCDenseNet",
    "Transition",
    "channel_stats",
    "norm_correction",
    "norm_correction_apply",
    "norm_fold",
    "norm_relu_conv1x1_backward",
    "norm_relu_conv1x1_forward",
    "norm_relu_conv3x3_backward",
    "norm_relu_conv3x3_forward",
    "stem_backward",
    "stem_conv_backward_weight",
    "stem_conv_forward",
    "stem_forward",
    "transition_backward",
    "transition_forward",
    "wide_dtype",
]
