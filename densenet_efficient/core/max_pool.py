"""Dropout and max-pooling by 2, as between the blocks of an FC-DenseNet.

What backward needs is which pixel of a window was the largest, and whether it was dropped: a byte
for each value of the result. PyTorch keeps the mask, what the pooling reads, and an index of eight
bytes: 4.5 numbers of float32 for each pixel of a window where this keeps a sixteenth of one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import fallback, pools
from . import layout
from .dropout import fill_mask

CHUNK_BYTES = 8 << 20
"""What is pooled at a time, unless one image has more."""

DROPPED = 255
"""In the place of a pixel: its value was dropped, so that nothing flows back."""


def max_pool_forward(x: Tensor, drop_rate: float) -> tuple[Tensor, Tensor]:
    """x [N, C, *spatial] -> y [N, C, *(spatial // 2)], channels last in memory, and for each of its
    values where it comes from, uint8 of y's shape. Odd edges are left out. The mask is drawn by
    PyTorch's generator. A few images at a time, so that nothing else of x's size exists."""
    dims, spatial = x.dim() - 2, x.shape[2:]
    image = (x.shape[0], *(size // 2 for size in spatial))
    y = layout.empty(image, x.shape[1], x.dtype, x.device)
    places = layout.empty(image, x.shape[1], torch.uint8, x.device, length=x.shape[1])
    for images in fallback.chunks(x, CHUNK_BYTES):
        part, mask = x[images], None
        if drop_rate > 0:
            mask = draw_mask(part, drop_rate)
            part = part * mask
        y[images], index = pools.MAX_POOL[dims](part, 2, return_indices=True)
        place = _place(index, spatial)
        if mask is not None:
            kept = mask.flatten(2).gather(2, index.flatten(2)).view(index.shape)
            place.masked_fill_(kept == 0, DROPPED)
        places[images] = place
    return y, places


def draw_mask(x: Tensor, drop_rate: float) -> Tensor:
    """A mask of x's shape, 0 or 1 / (1 - p), from PyTorch's generator."""
    return fill_mask(torch.empty_like(x), 1 - drop_rate)


def _place(index: Tensor, spatial: Sequence[int]) -> Tensor:
    """The position in its window, a bit for each axis, from the position in the image."""
    place = torch.zeros_like(index)
    for bit, size in enumerate(reversed(spatial)):
        place += (index % size % 2) << bit
        index = index // size
    return place


def max_pool_backward(
    dy: Tensor, places: Tensor, spatial: Sequence[int], drop_rate: float
) -> Tensor:
    """dx [N, C, *spatial], channels last in memory, from dy and the places of `max_pool_forward`.
    Differentiable operators throughout: it is linear in dy."""
    dims = len(spatial)
    if 0 < drop_rate < 1:
        dy = dy / (1 - drop_rate)
    dx = dy.new_zeros((dy.shape[0], *spatial, dy.shape[1])).movedim(-1, 1)
    for corner in itertools.product((0, 1), repeat=dims):
        place = sum(side << bit for bit, side in enumerate(reversed(corner)))
        sides = zip(corner, spatial, strict=True)
        window = [slice(side, size - size % 2, 2) for side, size in sides]
        where = (slice(None), slice(None), *window)
        dx[where] = dy.where(places == place, 0)
    return dx
