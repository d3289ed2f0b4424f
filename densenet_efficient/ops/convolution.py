"""Convolutions that keep the image size, of any geometry, through PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConvOptions:
    """Geometry of a stride-1 convolution that keeps the image size.

    padding, dilation: one entry per spatial dimension, in pixels. groups: as in ``nn.Conv2d``.
    """

    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def forward(self, z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """z [N, C, *spatial] -> [N, K, *spatial]."""
        dims = len(self.padding)
        ones = [1] * dims
        return torch.convolution(
            z, weight, bias, ones, self.padding, self.dilation, False, [0] * dims, self.groups
        )

    def backward(
        self,
        dy: Tensor,
        z: Tensor,
        weight: Tensor,
        need_dweight: bool,
        need_dbias: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """dy [N, K, *spatial], z [N, C, *spatial] -> dz, dweight, dbias."""
        dims = len(self.padding)
        return torch.ops.aten.convolution_backward(
            dy, z, weight, [weight.shape[0]], [1] * dims, self.padding, self.dilation, False,
            [0] * dims, self.groups, [True, need_dweight, need_dbias],
        )  # fmt: skip
