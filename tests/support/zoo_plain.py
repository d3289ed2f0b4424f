"""As `zoo`: the networks of a tutorial and of a book, and FC-DenseNets ("Tiramisu")."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.support.zoo import Net, growing


class UvaLayer(nn.Module):
    """The UvA tutorials: everything in `net`, the new channels first."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * growth, kernel_size=1, bias=False),
            nn.BatchNorm2d(2 * growth),
            nn.ReLU(),
            nn.Conv2d(2 * growth, growth, kernel_size=3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.net(x), x], dim=1)


class UvaBlock(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        layers = [UvaLayer(channels + i * growth, growth) for i in range(3)]
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class UvaTransition(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.transition = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, out, kernel_size=1, bias=False),
            nn.AvgPool2d(kernel_size=2, stride=2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.transition(x)


class TiramisuLayer(nn.Sequential):
    """bfortuner: a plain layer with bias and Dropout2d."""

    def __init__(self, channels: int, growth: int, p: float) -> None:
        super().__init__()
        self.add_module("norm", nn.BatchNorm2d(channels))
        self.add_module("relu", nn.ReLU(True))
        self.add_module("conv", nn.Conv2d(channels, growth, 3, padding=1, bias=True))
        self.add_module("drop", nn.Dropout2d(p))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class TiramisuBlock(nn.Module):
    """With upsample, only the new channels come out."""

    def __init__(self, channels: int, growth: int, upsample: bool = False, p: float = 0.0) -> None:
        super().__init__()
        self.upsample = upsample
        self.layers = nn.ModuleList(
            TiramisuLayer(channels + i * growth, growth, p) for i in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        new = []
        for layer in self.layers:
            new.append(layer(x))
            x = torch.cat([x, new[-1]], 1)
        return torch.cat(new, 1) if self.upsample else x


class BaldassarreLayer(nn.Sequential):
    def __init__(self, channels: int, growth: int, bottleneck: bool, p: float) -> None:
        super().__init__()
        self.add_module("norm", nn.BatchNorm2d(channels))
        self.add_module("relu", nn.ReLU(inplace=True))
        if bottleneck:
            inner = nn.Sequential()
            inner.add_module("conv", nn.Conv2d(channels, 4 * growth, 1, bias=False))
            inner.add_module("norm", nn.BatchNorm2d(4 * growth))
            inner.add_module("relu", nn.ReLU(inplace=True))
            self.add_module("bottleneck", inner)
            channels = 4 * growth
        self.add_module("conv", nn.Conv2d(channels, growth, 3, padding=1, bias=False))
        if p > 0:
            self.add_module("drop", nn.Dropout2d(p, inplace=True))


class BaldassarreBlock(nn.Module):
    """With concat_input, the input comes out, too."""

    def __init__(
        self,
        channels: int,
        growth: int,
        concat_input: bool = False,
        bottleneck: bool = False,
        p: float = 0.0,
    ) -> None:
        super().__init__()
        self.concat_input = concat_input
        for i in range(3):
            layer = BaldassarreLayer(channels + i * growth, growth, bottleneck, p)
            self.add_module(f"layer_{i}", layer)

    def forward(self, x: Tensor) -> Tensor:
        outputs = [x] if self.concat_input else []
        for layer in self.children():
            new = layer(x)
            outputs.append(new)
            x = torch.cat([x, new], 1)
        return torch.cat(outputs, 1)


class BookBlock(nn.Module):
    """Dive into Deep Learning: plain layers with bias, lazy, and the block concatenates."""

    def __init__(self, layers: int, growth: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(
                nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyConv2d(growth, 3, padding=1))
                for _ in range(layers)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = torch.cat((x, layer(x)), dim=1)
        return x


def book_net() -> nn.Module:
    """Its network, small, after a first batch."""

    def transition(channels: int, out: int) -> nn.Module:
        return nn.Sequential(
            nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyConv2d(out, 1), nn.AvgPool2d(2, 2)
        )

    net = Net([growing(lambda channels, growth: BookBlock(3, growth))] * 2, transition)
    net(torch.zeros(2, 3, 8, 8))
    return net
