"""Channels-last memory: a pixel is a row of channels, and rows are evenly spaced.

Operators take rows that are further apart than they are long: a channel slice of a feature buffer,
or rows padded so that each is sector-aligned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SECTOR = 32
"""Bytes that a GPU fetches at once."""


def row_length(channels: int, dtype: torch.dtype, device: torch.device) -> int:
    """Elements from one row of a new buffer to the next.

    On a GPU every row begins at a sector, so that kernels load 16 bytes at a time and no sector is
    shared: the 342 channels that end DenseNet-BC-100-12 would leave 4-byte loads. Growth rates that
    are multiples of 16, as all those for ImageNet, need no padding.
    """
    unit = SECTOR // dtype.itemsize
    return -(-channels // unit) * unit if device.type == "cuda" else channels


def strides(image: Sequence[int], length: int) -> tuple[int, ...]:
    """Of [*image, C] with rows ``length`` elements apart."""
    steps, step = [1], length
    for size in reversed(image):
        steps.append(step)
        step *= max(size, 1)
    return tuple(reversed(steps))


def empty(
    image: Sequence[int],
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
    length: int | None = None,
) -> Tensor:
    """Uninitialised ``[N, channels, *spatial]`` for image ``(N, *spatial)``, channels last in
    memory, its rows ``length`` elements apart (`row_length` by default). Not a view of anything, so
    that PyTorch lets whoever receives it write to it."""
    if length is None:
        length = row_length(channels, dtype, device)
    first, *others, last = strides(image, length)
    shape = (image[0], channels, *image[1:])
    return torch.empty_strided(shape, (first, last, *others), dtype=dtype, device=device)


def channels_last(x: Tensor) -> Tensor:
    """[N, C, *spatial] -> [N, *spatial, C]: x's own memory where its rows are evenly spaced and
    channels are neighbours, a copy otherwise."""
    rows = x.movedim(1, -1)
    if rows.is_neg():  # the kernels read memory, which holds the values with the other sign
        rows = rows.resolve_neg()
    if rows.numel() == 0:  # contiguous by PyTorch's rule, whatever its strides
        return rows.new_empty(rows.shape)
    return rows if row_stride(rows) is not None else rows.contiguous()


def row_stride(rows: Tensor) -> int | None:
    """Elements from one row of [..., C] to the next, or None where there is no such number."""
    channels = rows.shape[-1]
    if channels > 1 and rows.stride(-1) != 1:
        return None
    stride, inner = None, 1
    for size, step in zip(reversed(rows.shape[:-1]), reversed(rows.stride()[:-1]), strict=True):
        if size > 1:
            stride = step if stride is None else stride
            if step != stride * inner or step < channels:
                return None
        inner *= size
    return channels if stride is None else stride


def neighbouring(table: Tensor) -> Tensor:
    """A table [rows, C] whose channels are neighbours: itself, or a copy, as hooks on saved tensors
    may make necessary."""
    return table if table.stride(-1) == 1 else table.contiguous()


def flat(x: Tensor) -> Tensor:
    """[N, *spatial, C], possibly a channel slice -> [M, C], the same memory."""
    return x.view(-1, x.shape[-1]) if x.dim() != 2 else x
