"""The work of each stage on one shape: ours, the plain twin and the bare kernel of the framework,
on random tensors in the layout of training; bytes and FLOPs beside them. See bench_stages.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from densenet_efficient import reference
from densenet_efficient.ops import compiled


@dataclass(frozen=True)
class Shape:
    """One layer's volumes: side of the map, channels C_l read of `total` in the buffer, growth;
    the bottleneck has 4 * growth channels."""

    name: str
    side: int
    channels: int
    total: int
    growth: int

    @property
    def bottleneck(self) -> int:
        return 4 * self.growth


SHAPES = (
    Shape("121 block 1", 56, 160, 256, 32),
    Shape("121 block 2", 28, 320, 512, 32),
    Shape("121 block 3", 14, 640, 1024, 32),
    Shape("121 block 4", 7, 768, 1024, 32),
    Shape("BC-100-12 block 1", 32, 120, 216, 12),
)


@dataclass
class Work:
    """A stage on one shape. run: ours, writing `outputs`. twin: the reference's outputs, given the
    dtype to compute in. bare: the framework's kernel. size, flops: of the stage."""

    run: Callable[[], None]
    outputs: list[Tensor]
    twin: Callable[[torch.dtype], tuple[Tensor, ...]]
    bare: Callable[[], Any]
    size: int
    flops: int


class Inputs:
    """Random tensors of a shape, in the layout of training."""

    def __init__(self, shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        self.shape, self.batch, self.dtype, self.device = shape, batch, dtype, device
        self.element = dtype.itemsize

    def image(self, channels: int, total: int | None = None, side: int | None = None) -> Tensor:
        """[N, side, side, channels], a slice of `total` channels."""
        side = self.shape.side if side is None else side
        buffer = torch.randn(self.batch, side, side, total or channels, device=self.device)
        return buffer.to(self.dtype)[..., :channels]

    def weight(self, *sides: int) -> Tensor:
        return (torch.randn(*sides, device=self.device) / sides[1] ** 0.5).to(self.dtype)

    def norm(self, x: Tensor) -> Tensor:
        gamma, beta = torch.rand(2, x.shape[-1], device=self.device)
        stats = reference.channel_stats(x.flatten(0, -2))
        return reference.norm_fold(stats, gamma + 0.5, beta - 0.5, 1e-5)

    def wide(self, *sides: int) -> Tensor:
        return torch.zeros(*sides, device=self.device)


def _cast(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """Tensors for the twin: everything in float64, or as it is."""
    return [t.double() for t in tensors] if dtype == torch.float64 else list(tensors)


def _nchw(x: Tensor) -> Tensor:
    return x.contiguous().permute(0, 3, 1, 2)


def channel_stats(i: Inputs) -> Work:
    x = i.image(i.shape.growth, i.shape.total).flatten(0, 2)
    stats = i.wide(2, x.shape[1])
    packed = x.contiguous()
    return Work(
        lambda: compiled.channel_stats(x, stats),
        [stats],
        lambda dtype: (reference.channel_stats(*_cast(dtype, x)),),
        lambda: torch.var_mean(packed, 0),
        x.numel() * i.element,
        0,
    )


def norm_relu_conv1x1_forward(i: Inputs) -> Work:
    k = i.shape.bottleneck
    x = i.image(i.shape.channels, i.shape.total).flatten(0, 2)
    norm, w = i.norm(x), i.weight(k, x.shape[1])
    y, stats, packed = x.new_empty(len(x), k), i.wide(2, k), x.contiguous()
    return Work(
        lambda: compiled.norm_relu_conv1x1_forward(x, norm, w, y, stats),
        [y, stats],
        lambda dtype: reference.norm_relu_conv1x1_forward(*_cast(dtype, x, norm, w)),
        lambda: packed @ w.t(),
        (x.numel() + y.numel() + w.numel()) * i.element,
        2 * x.numel() * k,
    )


def norm_relu_conv1x1_backward(i: Inputs) -> Work:
    k = i.shape.bottleneck
    x = i.image(i.shape.channels, i.shape.total).flatten(0, 2)
    y, dz = i.image(k).flatten(0, 2), i.image(k).flatten(0, 2)
    norm, w = i.norm(x), i.weight(k, x.shape[1])
    correction = torch.rand(4, k, device=i.device) * 0.1 + 0.5
    dx = i.image(i.shape.channels, i.shape.total).flatten(0, 2).zero_()
    dw, dnorm, packed = i.wide(*w.shape), i.wide(2, x.shape[1]), x.contiguous()

    def bare() -> None:
        torch.mm(dz, w)
        torch.mm(dz.t(), packed)

    return Work(
        lambda: compiled.norm_relu_conv1x1_backward(dz, y, correction, x, norm, w, dx, dw, dnorm),
        [dx, dw, dnorm],
        lambda dtype: reference.norm_relu_conv1x1_backward(
            *_cast(dtype, dz, y, correction, x, norm, w)
        ),
        bare,
        (3 * x.numel() + 2 * y.numel() + w.numel()) * i.element,
        4 * x.numel() * k,
    )


def norm_relu_conv3x3_forward(i: Inputs) -> Work:
    c, k = i.shape.bottleneck, i.shape.growth
    x, y = i.image(c), i.image(k, i.shape.total)
    norm, w = i.norm(x), i.weight(k, c, 3, 3)
    stats, packed = i.wide(2, k), _nchw(x)
    filters = w.contiguous(memory_format=torch.channels_last)
    return Work(
        lambda: compiled.norm_relu_conv3x3_forward(x, norm, w, y, stats),
        [y, stats],
        lambda dtype: reference.norm_relu_conv3x3_forward(*_cast(dtype, x, norm, w)),
        lambda: functional.conv2d(packed, filters, padding=1),
        (x.numel() + y.numel() + w.numel()) * i.element,
        18 * x.numel() * k,
    )


def norm_relu_conv3x3_backward(i: Inputs) -> Work:
    c, k = i.shape.bottleneck, i.shape.growth
    x, y, dy = i.image(c), i.image(k, i.shape.total), i.image(k, i.shape.total)
    norm, w = i.norm(x), i.weight(k, c, 3, 3)
    correction = torch.rand(4, k, device=i.device) * 0.1 + 0.5
    dx, dw, dnorm = torch.empty_like(x), i.wide(*w.shape), i.wide(2, c)
    packed, gradient = _nchw(x), _nchw(dy)
    filters = w.contiguous(memory_format=torch.channels_last)
    return Work(
        lambda: compiled.norm_relu_conv3x3_backward(
            dy, y, correction, x, norm, w, False, dx, dw, dnorm
        ),
        [dx, dw, dnorm],
        lambda dtype: reference.norm_relu_conv3x3_backward(
            *_cast(dtype, dy, y, correction, x, norm, w)
        ),
        lambda: torch.ops.aten.convolution_backward(
            gradient, packed, filters, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
            [True, True, False],
        ),
        (2 * x.numel() + 2 * y.numel() + w.numel()) * i.element,
        36 * x.numel() * k,
    )  # fmt: skip


def transition_forward(i: Inputs) -> Work:
    x = i.image(i.shape.total)
    k, side = i.shape.total // 2, i.shape.side // 2
    norm, w = i.norm(x), i.weight(k, i.shape.total)
    y, stats, packed = i.image(k, side=side), i.wide(2, k), x.flatten(0, 2)
    return Work(
        lambda: compiled.transition_forward(x, norm, w, y, stats),
        [y, stats],
        lambda dtype: reference.transition_forward(*_cast(dtype, x, norm, w)),
        lambda: functional.avg_pool2d(
            (packed @ w.t()).view(*x.shape[:3], k).permute(0, 3, 1, 2), 2
        ),
        (x.numel() + y.numel() + w.numel()) * i.element,
        2 * y.numel() * i.shape.total,
    )


def transition_backward(i: Inputs) -> Work:
    x = i.image(i.shape.total)
    k, side = i.shape.total // 2, i.shape.side // 2
    norm, w, dy = i.norm(x), i.weight(k, i.shape.total), i.image(k, side=side)
    dx, dw, dnorm = torch.empty_like(x), i.wide(*w.shape), i.wide(2, i.shape.total)
    count = x.numel() // i.shape.total
    rows, packed = i.image(k).flatten(0, 2), x.flatten(0, 2)

    def bare() -> None:  # the framework convolves before it pools
        torch.mm(rows, w)
        torch.mm(rows.t(), packed)

    return Work(
        lambda: compiled.transition_backward(dy, x, norm, w, count, dx, dw, dnorm),
        [dx, dw, dnorm],
        lambda dtype: reference.transition_backward(*_cast(dtype, dy, x, norm, w), count),
        bare,
        (2 * x.numel() + dy.numel() + w.numel()) * i.element,
        4 * dy.numel() * i.shape.total,
    )


def stem_forward(i: Inputs) -> Work:
    x = i.image(64)
    norm, y = i.norm(x), i.image(64, side=-(-i.shape.side // 2))
    stats, packed = i.wide(2, 64), _nchw(x)
    return Work(
        lambda: compiled.stem_forward(x, norm, y, stats),
        [y, stats],
        lambda dtype: reference.stem_forward(*_cast(dtype, x, norm)),
        lambda: functional.max_pool2d(packed, 3, 2, 1),
        (x.numel() + y.numel()) * i.element,
        0,
    )


def stem_backward(i: Inputs) -> Work:
    x = i.image(64)
    norm, dy = i.norm(x), i.image(64, side=-(-i.shape.side // 2))
    dx, dnorm, count = torch.empty_like(x), i.wide(2, 64), x.numel() // 64
    packed, gradient = _nchw(x), _nchw(dy)
    _, winners = functional.max_pool2d(packed, 3, 2, 1, return_indices=True)
    return Work(
        lambda: compiled.stem_backward(dy, x, norm, count, dx, dnorm),
        [dx, dnorm],
        lambda dtype: reference.stem_backward(*_cast(dtype, dy, x, norm), count),
        lambda: torch.ops.aten.max_pool2d_with_indices_backward(
            gradient, packed, [3, 3], [2, 2], [1, 1], [1, 1], False, winners
        ),
        (2 * x.numel() + dy.numel()) * i.element,
        0,
    )


LAYER_STAGES = {
    f.__name__: f
    for f in (
        channel_stats, norm_relu_conv1x1_forward, norm_relu_conv1x1_backward,
        norm_relu_conv3x3_forward, norm_relu_conv3x3_backward,
    )
}  # fmt: skip
TRANSITIONS = {f.__name__: f for f in (transition_forward, transition_backward)}
STEMS = {f.__name__: f for f in (stem_forward, stem_backward)}
STEM = Shape("121 stem", 112, 64, 64, 32)
