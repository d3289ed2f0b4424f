"""Dropout masks that backward draws again from the seed of the call, so that none is kept.

A layer drops new features, or values of its bottleneck in front of norm2, or both. In a CUDA graph
a seed of the host's would be the same at every replay, and PyTorch's generator, which moves on,
cannot be taken back: there masks are kept from forward to backward, a byte for each value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import capture
from .specs import BlockSpec, LayerSpec


def origin(layers: Sequence[LayerSpec], device: torch.device) -> dict[str, Any]:
    """Where the masks of a call come from, as fields of its `BlockSpec`: a new seed, or, in a CUDA
    graph, PyTorch's generator on the device."""
    if not any(layer.drops() for layer in layers):
        return {}
    if capture.is_captured(device):
        return {"masks": {}}
    return {"seed": int(torch.randint(1 << 48, (), device="cpu"))}


def draw_mask(spec: BlockSpec, index: int, mask: Tensor, bottleneck: bool = False) -> Tensor:
    """Fills a mask of a layer, 0 or 1 / (1 - p); the same on every call of one specification."""
    layer = spec.layers[index]
    keep = 1.0 - (layer.bottleneck_drop_rate if bottleneck else layer.drop_rate)
    if spec.masks is None:
        seed = spec.seed + index + (len(spec.layers) if bottleneck else 0)
        return fill_mask(mask, keep, torch.Generator(mask.device).manual_seed(seed))
    kept = spec.masks.get((index, bottleneck))
    if kept is None:
        spec.masks[index, bottleneck] = fill_mask(mask, keep) != 0
        return mask
    mask.copy_(kept)
    return mask.div_(keep) if keep > 0 else mask


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
