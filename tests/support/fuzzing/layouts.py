"""How an input lies in memory."""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = ["contiguous", "channels last", "expanded", "sliced", "transposed", "strided"]
"""Negative strides PyTorch does not have."""


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x in another layout; "expanded" repeats the first image."""
    if layout == "channels last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout == "sliced":
        wide = torch.full([size + 2 for size in x.shape], torch.nan, dtype=x.dtype)
        inner = wide[tuple(slice(1, 1 + size) for size in x.shape)]
        return inner.copy_(x)
    if layout == "transposed":
        return x.transpose(1, -1).contiguous().transpose(1, -1)
    if layout == "strided":
        twice = x.repeat_interleave(2, dim=-1)
        return twice[..., ::2]
    return x.contiguous()
