"""The stages in float64, and in float32 without TF32, on a GPU: compiled operators where they take
these, the general path for the convolutions."""

from __future__ import annotations

from torch import Tensor

from . import compiled, fallback
from .compiled import channel_stats, norm_correction, norm_correction_apply, norm_fold
from .fallback import (
    norm_relu_conv1x1_backward,
    norm_relu_conv1x1_forward,
    norm_relu_conv3x3_backward,
    norm_relu_conv3x3_forward,
    transition_backward,
    transition_forward,
)

__all__ = [
    "channel_stats",
    "norm_correction",
    "norm_correction_apply",
    "norm_fold",
    "norm_relu_conv1x1_backward",
    "norm_relu_conv1x1_forward",
    "norm_relu_conv3x3_backward",
    "norm_relu_conv3x3_forward",
    "stem_backward",
    "stem_forward",
    "transition_backward",
    "transition_forward",
]


def stem_forward(x: Tensor, norm: Tensor, y: Tensor, stats: Tensor | None) -> None:
    """See `ops.compiled.stem_forward`; any number of dimensions."""
    (compiled if x.dim() == 4 else fallback).stem_forward(x, norm, y, stats)


def stem_backward(
    dy: Tensor, x: Tensor, norm: Tensor, count: int, dx: Tensor, dnorm: Tensor
) -> None:
    """See `ops.compiled.stem_backward`; any number of dimensions."""
    (compiled if x.dim() == 4 else fallback).stem_backward(dy, x, norm, count, dx, dnorm)
