"""DenseNet's layers, blocks and models of ordinary nn.Modules: what the efficient ones must agree
with, in outputs, gradients, running statistics and state dict keys.

`memory_efficient=True` checkpoints every layer's concatenation, norm, ReLU and first convolution
with torch.utils.checkpoint, as torchvision does (so norm1's running statistics are updated twice a
step).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..nn.architecture import DenseNetBase
from ..nn.fully_convolutional import FCDenseNetBase
from ..nn.options import check_count, check_drop_rate
from ..nn.plain import dense_layer_children, transition_children


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
        bottleneck_drop_rate: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.bottleneck = bottleneck
        self.drop_rate = check_drop_rate(drop_rate)
        self.bottleneck_drop_rate = check_drop_rate(bottleneck_drop_rate) if bottleneck else 0.0
        self.memory_efficient = memory_efficient
        children = dense_layer_children(
            num_input_features, growth_rate, bn_size, bottleneck=bottleneck, **options
        )
        for name, child in children.items():
            self.add_module(name, child)

    def _first_convolution(self, *features: Tensor) -> Tensor:
        y = torch.cat(features, 1)
        for name in ("norm1", "relu1", "conv1"):
            y = self.get_submodule(name)(y)
        return y

    def forward(self, features: Tensor | list[Tensor]) -> Tensor:
        """[N, C, *spatial], or the list of all earlier outputs -> [N, growth_rate, *spatial]."""
        inputs = [features] if isinstance(features, Tensor) else list(features)
        if self.memory_efficient and any(x.requires_grad for x in inputs):
            y = checkpoint(self._first_convolution, *inputs, use_reentrant=False)
        else:
            y = self._first_convolution(*inputs)
        if self.bottleneck:
            if self.bottleneck_drop_rate > 0:
                y = F.dropout(y, p=self.bottleneck_drop_rate, training=self.training)
            for name in ("norm2", "relu2", "conv2"):
                y = self.get_submodule(name)(y)
        if self.drop_rate > 0:
            y = F.dropout(y, p=self.drop_rate, training=self.training)
        return y


class DenseBlock(nn.ModuleDict):
    """`num_layers` dense layers, each on the concatenation of the block's input and every earlier
    layer's output; returns all of them: [N, num_input_features + num_layers * growth_rate, ...],
    or without the input the new ones alone."""

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int,
        growth_rate: int,
        drop_rate: float,
        memory_efficient: bool = False,
        *,
        with_input: bool = True,
        **options: Any,
    ) -> None:
        check_count("num_layers", num_layers)
        super().__init__()
        self.with_input = with_input
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
        given = len(features)
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features if self.with_input else features[given:], 1)


class Transition(nn.Sequential):
    """norm-relu-conv(1x1)-pool(2x2 average, or maximum) between two blocks."""

    def __init__(self, num_input_features: int, num_output_features: int, **options: Any) -> None:
        children = transition_children(num_input_features, num_output_features, **options)
        super().__init__(OrderedDict(children))


class _PlainParts(nn.Module):
    """The blocks and transitions of the reference networks."""

    def _make_block(self, **options: Any) -> nn.Module:
        return DenseBlock(**options)

    def _make_transition(
        self, num_input_features: int, num_output_features: int, **options: Any
    ) -> nn.Module:
        return Transition(num_input_features, num_output_features, **options)


class DenseNet(_PlainParts, DenseNetBase):
    """The reference DenseNet; the options are those of `EfficientDenseNet`, without `memory`."""


class FCDenseNet(_PlainParts, FCDenseNetBase):
    """The reference FC-DenseNet; the options are those of `EfficientFCDenseNet`, without
    `memory`."""
