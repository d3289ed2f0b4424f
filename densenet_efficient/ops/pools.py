"""Pooling by PyTorch, of one to three dimensions, on channels-last images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def average(z: Tensor) -> Tensor:
    """[N, *spatial, C] -> [N, *(spatial // 2), C]."""
    dims = z.dim() - 2
    return AVG_POOL[dims](z.movedim(-1, 1), 2, 2).movedim(1, -1)


def spread(dpooled: Tensor, spatial: torch.Size) -> Tensor:
    """The gradient of :func:`average`: each value to its 2^dims pixels, zero on dropped edges."""
    out = dpooled / 2 ** (dims := dpooled.dim() - 2)
    for d in range(1, dims + 1):
        out = out.repeat_interleave(2, dim=d)
    padding: list[int] = [0, 0]
    for d in range(dims, 0, -1):
        padding += [0, spatial[d - 1] - out.shape[d]]
    return F.pad(out, padding)
