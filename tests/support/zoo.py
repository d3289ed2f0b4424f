"""DenseNets as they are copied from one program to the next, written here after their shapes: the
names of the children, the place of dropout, the order of channels and what a block returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """A convolution, dense blocks with transitions between them, and a linear classifier.

    blocks: each a function from the number of input channels to (block, number of its output's).
    transition: from the numbers of input and output channels to a transition.
    """

    def __init__(
        self,
        blocks: Sequence[Callable[[int], tuple[nn.Module, int]]],
        transition: Callable[[int, int], nn.Module],
        convolution: Any = nn.Conv2d,
    ) -> None:
        super().__init__()
        self.conv = convolution(3, 8, 3, padding=1, bias=False)
        self.stages = nn.ModuleList()
        channels = 8
        for index, make in enumerate(blocks):
            if index:
                self.stages.append(transition(channels, channels // 2))
                channels //= 2
            block, channels = make(channels)
            self.stages.append(block)
        self.classifier = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for stage in self.stages:
            x = stage(x)
        return self.classifier(F.relu(x).flatten(2).mean(2))


def growing(make: Callable[[int, int], nn.Module], with_input: bool = True) -> Any:
    """For `Net`: a block of three layers, made of (input channels, growth 4)."""

    def block(channels: int) -> tuple[nn.Module, int]:
        return make(channels, 4), 12 + (channels if with_input else 0)

    return block


class VarargsLayer(nn.Module):
    """Pleiss et al.: the earlier outputs come as several arguments."""

    def __init__(self, channels: int, growth: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.add_module("norm1", nn.BatchNorm2d(channels))
        self.add_module("relu1", nn.ReLU(inplace=True))
        self.add_module("conv1", nn.Conv2d(channels, 4 * growth, 1, bias=False))
        self.add_module("norm2", nn.BatchNorm2d(4 * growth))
        self.add_module("relu2", nn.ReLU(inplace=True))
        self.add_module("conv2", nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False))
        self.drop_rate = drop_rate

    def forward(self, *earlier: Tensor) -> Tensor:
        b = self.conv1(self.relu1(self.norm1(torch.cat(earlier, 1))))
        new = self.conv2(self.relu2(self.norm2(b)))
        return F.dropout(new, self.drop_rate, self.training) if self.drop_rate > 0 else new


class VarargsBlock(nn.Module):
    def __init__(self, channels: int, growth: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        for i in range(3):
            layer = VarargsLayer(channels + i * growth, growth, drop_rate)
            self.add_module(f"denselayer{i + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for _, layer in self.named_children():
            features.append(layer(*features))
        return torch.cat(features, 1)


class EluLayer(nn.Module):
    """LibAUC: activations are called elu, whatever they are; momentum 0.01."""

    def __init__(self, channels: int, growth: int, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels, momentum=0.01)
        self.elu1 = activation()
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth, momentum=0.01)
        self.elu2 = activation()
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        self.drop_rate = 0.0

    def forward(self, earlier: list[Tensor]) -> Tensor:
        b = self.conv1(self.elu1(self.norm1(torch.cat(earlier, 1))))
        return self.conv2(self.elu2(self.norm2(b)))


class EluBlock(nn.ModuleDict):
    def __init__(self, channels: int, growth: int, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        for i in range(3):
            self[f"denselayer{i + 1}"] = EluLayer(channels + i * growth, growth, activation)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class EluTransition(nn.Sequential):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.add_module("norm", nn.BatchNorm2d(channels, momentum=0.01))
        self.add_module("ELU", nn.ReLU())
        self.add_module("conv", nn.Conv2d(channels, out, 1, bias=False))
        self.add_module("pool", nn.AvgPool2d(2, 2))


class SequentialLayer3d(nn.Sequential):
    """torchvision before 0.4 and 3D-ResNets: the layer is a Sequential and returns its input."""

    def __init__(self, channels: int, growth: int, drop_rate: float) -> None:
        super().__init__()
        self.add_module("norm1", nn.BatchNorm3d(channels))
        self.add_module("relu1", nn.ReLU(inplace=True))
        self.add_module("conv1", nn.Conv3d(channels, 4 * growth, 1, bias=False))
        self.add_module("norm2", nn.BatchNorm3d(4 * growth))
        self.add_module("relu2", nn.ReLU(inplace=True))
        self.add_module("conv2", nn.Conv3d(4 * growth, growth, 3, padding=1, bias=False))
        self.drop_rate = drop_rate

    def forward(self, x: Tensor) -> Tensor:
        new = super().forward(x)
        if self.drop_rate > 0:
            new = F.dropout(new, self.drop_rate, self.training)
        return torch.cat([x, new], 1)


class SequentialBlock3d(nn.Sequential):
    def __init__(self, channels: int, growth: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        for i in range(3):
            layer = SequentialLayer3d(channels + i * growth, growth, drop_rate)
            self.add_module(f"denselayer{i + 1}", layer)


class Transition3d(nn.Sequential):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.add_module("norm", nn.BatchNorm3d(channels))
        self.add_module("relu", nn.ReLU(inplace=True))
        self.add_module("conv", nn.Conv3d(channels, out, 1, bias=False))
        self.add_module("pool", nn.AvgPool3d(2, 2))


class VeitLayer(nn.Module):
    """andreasveit: one ReLU for both norms, dropout after every convolution."""

    def __init__(self, channels: int, growth: int, bottleneck: bool, droprate: float) -> None:
        super().__init__()
        width = 4 * growth if bottleneck else growth
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, width, 1 if bottleneck else 3, padding=int(not bottleneck), bias=False)  # fmt: skip  # noqa: E501
        if bottleneck:
            self.bn2 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, growth, 3, padding=1, bias=False)
        self.droprate = droprate

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.relu(self.bn1(x)))
        if self.droprate > 0:
            y = F.dropout(y, self.droprate, inplace=False, training=self.training)
        if hasattr(self, "conv2"):
            y = self.conv2(self.relu(self.bn2(y)))
            if self.droprate > 0:
                y = F.dropout(y, self.droprate, inplace=False, training=self.training)
        return torch.cat([x, y], 1)


class VeitBlock(nn.Module):
    def __init__(
        self, channels: int, growth: int, bottleneck: bool = True, droprate: float = 0.0
    ) -> None:
        super().__init__()
        layers = [VeitLayer(channels + i * growth, growth, bottleneck, droprate) for i in range(3)]
        self.layer = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class VeitTransition(nn.Module):
    """Pools in its forward."""

    def __init__(self, channels: int, out: int, droprate: float = 0.0) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, out, 1, bias=False)
        self.droprate = droprate

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.relu(self.bn1(x)))
        if self.droprate > 0:
            y = F.dropout(y, self.droprate, training=self.training)
        return F.avg_pool2d(y, 2)


class BareLayer(nn.Module):
    """bamos, and kuangliu with the new channels first: no ReLU module, and no class of a block."""

    newest_first = False

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return torch.cat([new, x] if self.newest_first else [x, new], 1)


class NewestFirstLayer(BareLayer):
    newest_first = True

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class BareTransition(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x))), 2)


def bare_block(layer: type[BareLayer]) -> Callable[[int, int], nn.Module]:
    """A Sequential of three layers."""
    return lambda channels, growth: nn.Sequential(
        *(layer(channels + i * growth, growth) for i in range(3))
    )
