"""Dropout masks that backward draws again from the seed of the call, so that none is kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .specs import BlockSpec


def draw_mask(spec: BlockSpec, index: int, mask: Tensor) -> Tensor:
    """Fills the mask of a layer, 0 or 1 / (1 - p); the same on every call of one specification."""
    keep = 1.0 - spec.layers[index].drop_rate
    generator = torch.Generator(mask.device).manual_seed(spec.seed + index)
    mask.bernoulli_(keep, generator=generator)
    return mask.div_(keep) if keep > 0 else mask


def mask_shape(spec: BlockSpec, index: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Of the mask for new features ``[N, *spatial, k]``."""
    if spec.layers[index].channelwise_dropout:
        return (shape[0], *(1 for _ in shape[1:-1]), shape[-1])
    return tuple(shape)


def scratch_mask(spec: BlockSpec, index: int, new: Tensor, scratch: dict[str, Tensor]) -> Tensor:
    """The layer's mask for ``new`` [N, *spatial, k], in scratch memory."""
    shape = mask_shape(spec, index, new.shape)
    size = torch.Size(shape).numel()
    return draw_mask(spec, index, scratch["dropout mask"].view(-1)[:size].view(shape))
