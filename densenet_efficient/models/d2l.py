"""The DenseNet of the book "Dive into Deep Learning" (https://d2l.ai): plain layers, norm, ReLU and
a 3x3 convolution with bias, on greys of 96 px.

The book's modules find the number of input channels out when they are first called; these are told.
The book's own classes are converted where they are: see docs/coming_from/d2l.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..nn.dense_block import EfficientDenseBlock
from ..nn.transition import EfficientTransition
from .densenet import EfficientDenseNet

__all__ = ["DenseBlock", "DenseNet", "transition_block"]


def DenseBlock(num_convs: int, num_channels: int, in_channels: int) -> EfficientDenseBlock:
    """num_convs layers of num_channels each: [N, in_channels, H, W] ->
    [N, in_channels + num_convs * num_channels, H, W]. ValueError for a count below 1."""
    return EfficientDenseBlock(
        num_convs, in_channels, 1, num_channels, 0.0, bottleneck=False, bias=True
    )


def transition_block(num_channels: int, in_channels: int) -> EfficientTransition:
    """[N, in_channels, H, W] -> [N, num_channels, H // 2, W // 2]. ValueError for a count below
    1."""
    return EfficientTransition(in_channels, num_channels, bias=True)


def DenseNet(
    num_channels: int = 64,
    growth_rate: int = 32,
    arch: Sequence[int] = (4, 4, 4, 4),
    num_classes: int = 10,
    in_channels: int = 1,
    **options: Any,
) -> EfficientDenseNet:
    """The book's network. arch: layers of every block. options: of `EfficientDenseNet`."""
    return EfficientDenseNet(
        growth_rate,
        arch,
        num_channels,
        num_classes=num_classes,
        in_channels=in_channels,
        **{"bottleneck": False, "bias": True, **options},
    )
