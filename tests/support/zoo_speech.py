"""As `zoo`: CAM++ and D-TDNN, for one dimension."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def _nonlinear(channels: int) -> nn.Sequential:
    found = nn.Sequential()
    found.add_module("batchnorm", nn.BatchNorm1d(channels))
    found.add_module("relu", nn.ReLU(inplace=True))
    return found


class Gate(nn.Module):
    """A dilated convolution, gated by what the whole and a segment of five are on average."""

    def __init__(self, channels: int, growth: int, dilation: int) -> None:
        super().__init__()
        self.linear_local = nn.Conv1d(
            channels, growth, 3, padding=dilation, dilation=dilation, bias=False
        )
        self.linear1 = nn.Conv1d(channels, channels // 2, 1)
        self.relu = nn.ReLU(inplace=True)
        self.linear2 = nn.Conv1d(channels // 2, growth, 1)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        segments = F.avg_pool1d(x, 5, 5, ceil_mode=True).repeat_interleave(5, -1)
        context = x.mean(-1, keepdim=True) + segments[..., : x.shape[-1]]
        gate = self.sigmoid(self.linear2(self.relu(self.linear1(context))))
        return self.linear_local(x) * gate


class CamLayer(nn.Module):
    def __init__(self, channels: int, growth: int, memory_efficient: bool) -> None:
        super().__init__()
        self.nonlinear1 = _nonlinear(channels)
        self.linear1 = nn.Conv1d(channels, 4 * growth, 1, bias=False)
        self.nonlinear2 = _nonlinear(4 * growth)
        self.cam_layer = Gate(4 * growth, growth, 2)
        self.memory_efficient = memory_efficient

    def squeeze(self, x: Tensor) -> Tensor:
        return self.linear1(self.nonlinear1(x))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.memory_efficient:
            b = checkpoint(self.squeeze, x, use_reentrant=False)
        else:
            b = self.squeeze(x)
        return self.cam_layer(self.nonlinear2(b))


class CamBlock(nn.ModuleList):
    def __init__(self, channels: int, growth: int, memory_efficient: bool = False) -> None:
        super().__init__()
        for i in range(3):
            layer = CamLayer(channels + i * growth, growth, memory_efficient)
            self.add_module(f"tdnnd{i + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = torch.cat([x, layer(x)], dim=1)
        return x


class TdnnLayer(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.nonlinear1 = _nonlinear(channels)
        self.linear1 = nn.Conv1d(channels, 4 * growth, 1, bias=False)
        self.nonlinear2 = _nonlinear(4 * growth)
        self.linear2 = nn.Conv1d(4 * growth, growth, 3, padding=2, dilation=2, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.nonlinear2(self.linear1(self.nonlinear1(x))))


class TdnnBlock(nn.ModuleList):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__(TdnnLayer(channels + i * growth, growth) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = torch.cat([x, layer(x)], dim=1)
        return x


class Transit(nn.Module):
    """Does not pool."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.nonlinear = _nonlinear(channels)
        self.linear = nn.Conv1d(channels, out, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.nonlinear(x))
