"""Dropout masks that backward draws again from the seed of the call, so that none is kept.

A layer drops new features, or values of its bottleneck in front of norm2, or both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .specs import BlockSpec


def draw_mask(spec: BlockSpec, index: int, mask: Tensor, bottleneck: bool = False) -> Tensor:
    """Fills a mask of a layer, 0 or 1 / (1 - p); the same on every call of one specification."""
    layer = spec.layers[index]
    keep = 1.0 - (layer.bottleneck_drop_rate if bottleneck else layer.drop_rate)
    seed = spec.seed + index + (len(spec.layers) if bottleneck else 0)
    return fill_mask(mask, keep, torch.Generator(mask.device).manual_seed(seed))


def fill_mask(mask: Tensor, keep: float, generator: torch.Generator | None = None) -> Tensor:
    """Fills a mask: 1 / keep with probability keep, else 0. generator: None for PyTorch's."""
    mask.bernoulli_(keep, generator=generator)
    return mask.div_(keep) if keep > 0 else mask


def mask_shape(spec: BlockSpec, index: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Of the mask for values ``[N, *spatial, k]``."""
    if spec.layers[index].channelwise_dropout:
        return (shape[0], *(1 for _ in shape[1:-1]), shape[-1])
    return tuple(shape)


def drop(
    spec: BlockSpec,
    index: int,
    values: Tensor,
    scratch: dict[str, Tensor],
    bottleneck: bool = False,
) -> None:
    """Multiplies values or their gradient ``[N, *spatial, k]`` by the layer's mask, in place; the
    mask lies in scratch memory."""
    shape = torch.Size(mask_shape(spec, index, values.shape))
    mask = scratch["dropout mask"].view(-1)[: shape.numel()].view(shape)
    values.mul_(draw_mask(spec, index, mask, bottleneck))
