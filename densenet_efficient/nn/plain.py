"""The layers that the efficient modules are built of when nobody else brings any: ordinary children
under torchvision's names, and the plain forward that runs where the kernels cannot.

The specification is `reference`, which is written independently of this file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .options import check_count, check_drop_rate, check_number

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def dense_layer_children(
    num_input_features: int,
    growth_rate: int,
    bn_size: int,
    *,
    bottleneck: bool = True,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    dilation: int = 1,
    dims: int = 2,
    bias: bool = False,
) -> dict[str, nn.Module]:
    """norm1, relu1, conv1 (1x1), norm2, relu2, conv2 (3x3), or without bottleneck norm1, relu1,
    conv1 (3x3), for images of `dims` dimensions. ValueError for an option out of its range."""
    check_count("num_input_features", num_input_features)
    check_count("growth_rate", growth_rate)
    check_count("bn_size", bn_size)
    check_count("dilation", dilation)
    check_number("eps", eps, "finite and above 0", math.nextafter(0.0, 1.0), math.inf)
    if momentum is not None:
        check_number("momentum", momentum, "between 0 and 1, or None", 0.0, 1.0)
    if dims not in _CONVOLUTIONS:
        raise ValueError(f"dims must be 1, 2 or 3, got {dims!r}")
    convolution, norm = _CONVOLUTIONS[dims], _NORMS[dims]
    spatial: dict[str, Any] = dict(kernel_size=3, padding=dilation, dilation=dilation, bias=bias)
    children: dict[str, nn.Module] = {
        "norm1": norm(num_input_features, eps=eps, momentum=momentum),
        "relu1": nn.ReLU(inplace=True),
    }
    if not bottleneck:
        children["conv1"] = convolution(num_input_features, growth_rate, **spatial)
        return children
    width = bn_size * growth_rate
    children["conv1"] = convolution(num_input_features, width, kernel_size=1, bias=bias)
    children["norm2"] = norm(width, eps=eps, momentum=momentum)
    children["relu2"] = nn.ReLU(inplace=True)
    children["conv2"] = convolution(width, growth_rate, **spatial)
    return children


def transition_children(
    num_input_features: int,
    num_output_features: int,
    *,
    drop_rate: float = 0.0,
    pool: bool = True,
    max_pool: bool = False,
    bias: bool = False,
    eps: float = 1e-5,
) -> dict[str, nn.Module]:
    """norm, relu, conv (1x1), with a drop_rate drop, pool (2x2 average or maximum; without pooling
    the identity). ValueError for an option out of its range."""
    check_count("num_input_features", num_input_features)
    check_count("num_output_features", num_output_features)
    drop_rate = check_drop_rate(drop_rate)
    children: dict[str, nn.Module] = {
        "norm": nn.BatchNorm2d(num_input_features, eps=eps),
        "relu": nn.ReLU(inplace=True),
        "conv": nn.Conv2d(num_input_features, num_output_features, kernel_size=1, bias=bias),
    }
    if drop_rate > 0:
        children["drop"] = nn.Dropout(drop_rate)
    kind = nn.MaxPool2d if max_pool else nn.AvgPool2d
    children["pool"] = kind(kernel_size=2, stride=2) if pool else nn.Identity()
    return children


class PlainDenseLayer(nn.Module):
    """One dense layer: from all earlier outputs to `growth_rate` new channels."""

    def __init__(
        self,
        num_input_features: int,
        growth_rate: int,
        bn_size: int,
        drop_rate: float,
        *,
        bottleneck_drop_rate: float = 0.0,
        **options: Any,
    ) -> None:
        drop_rate = check_drop_rate(drop_rate)
        bottleneck_drop_rate = check_drop_rate(bottleneck_drop_rate)
        children = dense_layer_children(num_input_features, growth_rate, bn_size, **options)
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self.drop_rate = drop_rate
        self.bottleneck_drop_rate = bottleneck_drop_rate if "norm2" in children else 0.0

    def forward(self, features: Tensor | Sequence[Tensor]) -> Tensor:
        """[N, C, *spatial], or all earlier outputs -> [N, growth_rate, *spatial]."""
        several = isinstance(features, (list, tuple))
        y: Tensor = torch.cat(list(features), 1) if several else features  # type: ignore[assignment]
        for name, child in self.named_children():
            if name == "norm2" and self.bottleneck_drop_rate > 0:
                y = F.dropout(y, self.bottleneck_drop_rate, self.training)
            y = child(y)
        return F.dropout(y, self.drop_rate, self.training) if self.drop_rate > 0 else y


class PlainDenseBlock(nn.ModuleDict):
    """Dense layers, each on the concatenation of the input and every earlier layer's output.
    with_input: whether the block's input is part of its output."""

    with_input = True

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int,
        growth_rate: int,
        drop_rate: float,
        *,
        with_input: bool = True,
        **options: Any,
    ) -> None:
        check_count("num_layers", num_layers)
        check_count("num_input_features", num_input_features)
        check_count("growth_rate", growth_rate)
        super().__init__()
        self.with_input = bool(with_input)
        for index in range(num_layers):
            channels = num_input_features + index * growth_rate
            layer = PlainDenseLayer(channels, growth_rate, bn_size, drop_rate, **options)
            self[f"denselayer{index + 1}"] = layer

    def forward(self, init_features: Tensor | Sequence[Tensor]) -> Tensor:
        """[N, C, *spatial], or several to concatenate -> all features, concatenated, or only the
        new ones."""
        several = isinstance(init_features, (list, tuple))  # torch.fx passes neither of both
        features: list[Tensor] = list(init_features) if several else [init_features]  # type: ignore[list-item]
        given = len(features)
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features if self.with_input else features[given:], 1)
