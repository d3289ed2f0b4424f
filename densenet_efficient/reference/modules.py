"""DenseNet's layers, blocks and models of ordinary nn.Modules: what the efficient ones must agree
with, in outputs, gradients, running statistics and state dict keys.

`memory_efficient=True` checkpoints every layer's concatenation, norm, ReLU and first convolution
with torch.utils.checkpoint, as torchvision does (so norm1's running statistics are updated twice a
step).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..nn.architecture import DenseNetBase, check_count, check_drop_rate, check_number

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class DenseLayer(nn.Module):
    """norm1-relu1-conv1(1x1)-norm2-relu2-conv2(3x3) on the concatenated inputs, or, without
    bottleneck, norm1-relu1-conv1(3x3); then dropout. Returns the `growth_rate` new channels."""

    def __init__(
        self,
        num_input_features: int,
        growth_rate: int,
        bn_size: int,
        drop_rate: float,
        memory_efficient: bool = False,
        *,
        bottleneck: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        dilation: int = 1,
        dims: int = 2,
    ) -> None:
        check_count("num_input_features", num_input_features)
        check_count("growth_rate", growth_rate)
        check_count("bn_size", bn_size)
        check_count("dilation", dilation)
        check_number("eps", eps, "finite and above 0", math.nextafter(0.0, 1.0), math.inf)
        if momentum is not None:
            check_number("momentum", momentum, "between 0 and 1, or None", 0.0, 1.0)
        if dims not in _CONVOLUTIONS:
            raise ValueError(f"dims must be 1, 2 or 3, got {dims!r}")
        super().__init__()
        convolution, norm = _CONVOLUTIONS[dims], _NORMS[dims]
        spatial: dict[str, Any] = {
            "kernel_size": 3,
            "padding": dilation,
            "dilation": dilation,
            "bias": False,
        }
        self.norm1 = norm(num_input_features, eps=eps, momentum=momentum)
        self.relu1 = nn.ReLU(inplace=True)
        if bottleneck:
            width = bn_size * growth_rate
            self.conv1 = convolution(num_input_features, width, kernel_size=1, bias=False)
            self.norm2 = norm(width, eps=eps, momentum=momentum)
            self.relu2 = nn.ReLU(inplace=True)
            self.conv2 = convolution(width, growth_rate, **spatial)
        else:
            self.conv1 = convolution(num_input_features, growth_rate, **spatial)
        self.bottleneck = bottleneck
        self.drop_rate = check_drop_rate(drop_rate)
        self.memory_efficient = memory_efficient

    def _first_convolution(self, *features: Tensor) -> Tensor:
        return self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))

    def forward(self, features: Tensor | list[Tensor]) -> Tensor:
        """[N, C, *spatial], or the list of all earlier outputs -> [N, growth_rate, *spatial]."""
        inputs = [features] if isinstance(features, Tensor) else list(features)
        if self.memory_efficient and any(x.requires_grad for x in inputs):
            y = checkpoint(self._first_convolution, *inputs, use_reentrant=False)
        else:
            y = self._first_convolution(*inputs)
        if self.bottleneck:
            y = self.conv2(self.relu2(self.norm2(y)))
        if self.drop_rate > 0:
            y = F.dropout(y, p=self.drop_rate, training=self.training)
        return y


class DenseBlock(nn.ModuleDict):
    """`num_layers` dense layers, each on the concatenation of the block's input and every earlier
    layer's output; returns all of them: [N, num_input_features + num_layers * growth_rate, ...]."""

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int,
        growth_rate: int,
        drop_rate: float,
        memory_efficient: bool = False,
        **options: Any,
    ) -> None:
        check_count("num_layers", num_layers)
        super().__init__()
        for i in range(num_layers):
            self[f"denselayer{i + 1}"] = DenseLayer(
                num_input_features + i * growth_rate,
                growth_rate,
                bn_size,
                drop_rate,
                memory_efficient,
                **options,
            )

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        """[N, C, *spatial], or a list of tensors to concatenate."""
        features = [x] if isinstance(x, Tensor) else list(x)
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class Transition(nn.Sequential):
    """norm-relu-conv(1x1)-pool(2x2 average) between two blocks."""

    def __init__(self, num_input_features: int, num_output_features: int) -> None:
        check_count("num_input_features", num_input_features)
        check_count("num_output_features", num_output_features)
        super().__init__()
        self.norm = nn.BatchNorm2d(num_input_features)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(num_input_features, num_output_features, kernel_size=1, bias=False)
        self.pool = nn.AvgPool2d(kernel_size=2, stride=2)


class DenseNet(DenseNetBase):
    """The reference DenseNet; the options are those of `EfficientDenseNet`, without `memory`."""

    def _make_block(self, **options: Any) -> nn.Module:
        return DenseBlock(**options)

    def _make_transition(self, num_input_features: int, num_output_features: int) -> nn.Module:
        return Transition(num_input_features, num_output_features)
