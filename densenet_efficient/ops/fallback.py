"""The fallback: every operator through PyTorch's own operators, on any device and dtype.

An implementation of `interface.Operators`. It serves whatever the compiled kernels do not: 1-D and
3-D images on a GPU, other kernel sizes, dilation, groups, a bias in 16 bits, devices without
kernels, a missing library. Memory stays in the same class: images are processed in chunks, so that
the normalised copy that PyTorch's convolution needs is bounded by ``CHUNK_BYTES``. Sums and
statistics are taken in the accumulation dtype (float32, float64 for float64).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .convolution import ConvOptions
from .dither import dithered
from .dtypes import accumulation_dtype
from .pools import MAX_POOL, average, spread
from .stem_conv import stem_conv_backward_weight as stem_conv_backward_weight
from .stem_conv import stem_conv_forward as stem_conv_forward

CHUNK_BYTES = 64 << 20
"""Upper bound of one chunk's normalised copy (one image may exceed it)."""


def chunks(x: Tensor, bound: int | None = None) -> Iterator[slice]:
    """Slices over the images of x [N, ...] whose copies in the accumulation dtype stay within a
    bound of bytes, `CHUNK_BYTES` by default."""
    if x.numel() == 0:
        return
    image_bytes = x[0].numel() * accumulation_dtype(x.dtype).itemsize
    step = max(1, (CHUNK_BYTES if bound is None else bound) // image_bytes)
    for start in range(0, x.shape[0], step):
        yield slice(start, start + step)


def normalise(x: Tensor, norm: Tensor) -> Tensor:
    """(x - mean) a + beta in the accumulation dtype; the sign decides the ReLU mask."""
    return torch.addcmul(norm[4], x.to(norm.dtype) - norm[2], norm[0])


def _operand(x: Tensor) -> Tensor:
    """x [N, *spatial, C] as PyTorch's convolutions take it. Two-dimensional images may be channels
    last; in one and three dimensions PyTorch computes garbage from some of such strides (in
    bfloat16, images of one pixel in a direction), which contiguous memory never has: with one
    channel it may still carry the strides of channels last, so they are set by a view."""
    first = _channels_first(x)
    return first if x.dim() == 4 else first.contiguous().view(-1).view(first.shape)


def _channels_first(x: Tensor) -> Tensor:
    return x.movedim(-1, 1)


def _rows(x: Tensor) -> tuple[int, ...]:  # of x [..., C]: what per-channel sums run over
    return tuple(range(x.dim() - 1))


def masked(dh: Tensor, normalised: Tensor) -> Tensor:
    """dz: dh [..., C] in the accumulation dtype, zero where the ReLU cut."""
    return torch.ops.aten.threshold_backward(dh.to(normalised.dtype), normalised, 0)


def norm_sums(dz: Tensor, x: Tensor, norm: Tensor) -> Tensor:
    """dnorm [2, C]: dgamma and dbeta of dz (accumulation dtype), x [..., C]."""
    centred = x.to(norm.dtype) - norm[2]
    dgamma = centred.mul_(dz).sum(_rows(dz)).mul_(norm[3])
    return torch.stack((dgamma, dz.sum(_rows(dz))))


def channel_stats(x: Tensor, stats: Tensor) -> None:
    """See `interface.Operators.channel_stats`; x may have any rank [..., C]."""
    if x.numel() == 0:
        stats.zero_()
        return
    var, mean = torch.var_mean(x.to(stats.dtype), dim=_rows(x), correction=0)
    stats[0].copy_(mean)
    stats[1].copy_(var)


def norm_fold(
    stats: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, norm: Tensor
) -> None:
    """See `interface.Operators.norm_fold`."""
    mean, var = stats
    rstd = torch.rsqrt(var + eps)
    scale = rstd if gamma is None else gamma * rstd
    shift = -mean * scale
    norm[0].copy_(scale)
    norm[1].copy_(shift if beta is None else beta + shift)
    norm[2].copy_(mean)
    norm[3].copy_(rstd)
    norm[4].copy_(torch.zeros_like(mean) if beta is None else beta)


def norm_correction(
    dnorm: Tensor, norm: Tensor, count: int, accumulate: bool, correction: Tensor
) -> None:
    """See `interface.Operators.norm_correction`."""
    share = norm[0] * (1.0 / count if count else 0.0)
    p, q = share * dnorm[1], share * norm[3] * dnorm[0]
    if accumulate:
        channels = dnorm.shape[1]
        correction[1, :channels] += p
        correction[2, :channels] += q
    else:
        correction.copy_(torch.stack((norm[0], p, q, norm[2])))


def _corrected(dy: Tensor, y: Tensor, correction: Tensor) -> Tensor:
    a, p, q, mean = correction
    centred = y.to(a.dtype) - mean
    return torch.addcmul(torch.addcmul(-p, centred, -q), dy.to(a.dtype), a)


def norm_correction_apply(dx: Tensor, x: Tensor, correction: Tensor) -> None:
    """See `interface.Operators.norm_correction_apply`; dx and x may be [..., C]."""
    for rows in chunks(x):
        first = rows.start * x[0].numel()
        dx[rows] = dithered(_corrected(dx[rows], x[rows], correction), dx.dtype, first)


def norm_relu_conv_forward(
    x: Tensor,
    norm: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: ConvOptions,
    y: Tensor,
) -> None:
    """y [N, *spatial, K] = conv(relu(a x + s)) for any geometry that keeps the image size."""
    for images in chunks(x):
        z = normalise(x[images], norm).relu_().to(x.dtype)
        y[images].copy_(options.forward(_operand(z), weight, bias).movedim(1, -1))


def norm_relu_conv_backward(
    dy: Tensor,
    y: Tensor | None,
    correction: Tensor | None,
    x: Tensor,
    norm: Tensor,
    weight: Tensor,
    options: ConvOptions,
    accumulate: bool,
    dx: Tensor,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dnorm: Tensor,
) -> None:
    """Backward of :func:`norm_relu_conv_forward`; the arguments of the 3x3 operator's backward."""
    for total in (dnorm, dweight, dbias):
        if total is not None:
            total.zero_()
    for images in chunks(x):
        part = dy[images]
        if y is not None and correction is not None:
            part = _corrected(part, y[images], correction)
        if dbias is not None:
            dbias += part.to(dbias.dtype).sum(_rows(part))
        if y is not None and correction is not None:
            # Where a is 1, dy lay on the dtype's grid: rounding would lose the correction again.
            first = images.start * dy[0].numel()
            part = torch.where(correction[0] == 1, dithered(part, x.dtype, first), part)
        normalised = normalise(x[images], norm)
        z = normalised.relu().to(x.dtype)
        dz, dw, _ = options.backward(
            _operand(part.to(x.dtype)), _operand(z), weight, dweight is not None
        )
        if dweight is not None and dw is not None:
            dweight += dw
        dz = masked(dz.movedim(1, -1), normalised)
        dnorm += norm_sums(dz, x[images], norm)
        if accumulate:
            dx[images] += dz.mul_(norm[0])
        else:
            dx[images].copy_(dz)


def norm_relu_conv1x1_forward(
    x: Tensor, norm: Tensor, weight: Tensor, y: Tensor, stats: Tensor | None, *following: Any
) -> None:
    """See `interface.Operators.norm_relu_conv1x1_forward`."""
    for rows in chunks(x):
        z = normalise(x[rows], norm).relu_().to(x.dtype)
        torch.mm(z, weight.t(), out=y[rows])
    if stats is not None:
        channel_stats(y, stats)
    if following and following[-1] is not None:
        norm_fold(*following)


def norm_relu_conv1x1_backward(
    dz_y: Tensor,
    y: Tensor,
    correction: Tensor,
    x: Tensor,
    norm: Tensor,
    weight: Tensor,
    dx: Tensor,
    dweight: Tensor | None,
    dnorm: Tensor,
    count: int = 0,
    x_correction: Tensor | None = None,
) -> None:
    """See `interface.Operators.norm_relu_conv1x1_backward`."""
    dnorm.zero_()
    if dweight is not None:
        dweight.zero_()
    for rows in chunks(x):
        dy = _corrected(dz_y[rows], y[rows], correction).to(x.dtype)
        normalised = normalise(x[rows], norm)
        if dweight is not None:
            dweight += torch.mm(dy.t(), normalised.relu().to(x.dtype))
        dz = masked(torch.mm(dy, weight), normalised)
        dnorm += norm_sums(dz, x[rows], norm)
        dx[rows] += dz.mul_(norm[0])
    if x_correction is not None:
        norm_correction(dnorm, norm, count, True, x_correction)


def _conv3x3(x: Tensor) -> ConvOptions:
    ones = (1,) * (x.dim() - 2)
    return ConvOptions(ones, ones)


def norm_relu_conv3x3_forward(
    x: Tensor, norm: Tensor, weight: Tensor, y: Tensor, stats: Tensor | None, *following: Any
) -> None:
    """See `interface.Operators.norm_relu_conv3x3_forward`; any number of dimensions."""
    norm_relu_conv_forward(x, norm, weight, None, _conv3x3(x), y)
    if stats is not None:
        channel_stats(y, stats)
    if following and following[-1] is not None:
        norm_fold(*following)


def norm_relu_conv3x3_backward(
    dy: Tensor,
    y: Tensor | None,
    correction: Tensor | None,
    x: Tensor,
    norm: Tensor,
    weight: Tensor,
    accumulate: bool,
    dx: Tensor,
    dweight: Tensor | None,
    dnorm: Tensor,
    count: int = 0,
    x_correction: Tensor | None = None,
) -> None:
    """See `interface.Operators.norm_relu_conv3x3_backward`; any number of dimensions."""
    norm_relu_conv_backward(
        dy, y, correction, x, norm, weight, _conv3x3(x), accumulate, dx, dweight, None, dnorm
    )
    if x_correction is not None:
        norm_correction(dnorm, norm, count, accumulate, x_correction)


def transition_forward(
    x: Tensor, norm: Tensor, weight: Tensor, y: Tensor, stats: Tensor | None
) -> None:
    """See `interface.Operators.transition_forward`; any number of dimensions."""
    for images in chunks(x):
        pooled = average(normalise(x[images], norm).relu_()).to(x.dtype)
        y[images].copy_(torch.matmul(pooled, weight.t()))
    if stats is not None:
        channel_stats(y, stats)


def transition_backward(
    dy: Tensor,
    x: Tensor,
    norm: Tensor,
    weight: Tensor,
    count: int,
    dx: Tensor,
    dweight: Tensor | None,
    dnorm: Tensor,
) -> None:
    """See `interface.Operators.transition_backward`; any number of dimensions."""
    dnorm.zero_()
    if dweight is not None:
        dweight.zero_()
    for images in chunks(x):
        normalised = normalise(x[images], norm)
        if dweight is not None:
            pooled = average(normalised.relu()).to(x.dtype)
            dweight += torch.mm(dy[images].flatten(0, -2).t(), pooled.flatten(0, -2))
        dpooled = torch.matmul(dy[images], weight).to(norm.dtype)
        dz = masked(spread(dpooled, x.shape[1:-1]), normalised)
        dnorm += norm_sums(dz, x[images], norm)
        dx[images].copy_(dz)
    _through_norm(dx, x, norm, count, dnorm)


def _through_norm(dx: Tensor, x: Tensor, norm: Tensor, count: int, dnorm: Tensor) -> None:
    """dx holds dz; make it the gradient in front of the norm."""
    correction = norm.new_empty((4, norm.shape[1]))
    norm_correction(dnorm, norm, count, False, correction)
    norm_correction_apply(dx, x, correction)


def stem_forward(x: Tensor, norm: Tensor, y: Tensor, stats: Tensor | None) -> None:
    """See `interface.Operators.stem_forward`; any number of dimensions."""
    for images in chunks(x):
        z = _channels_first(normalise(x[images], norm).relu_())
        y[images].copy_(MAX_POOL[x.dim() - 2](z, 3, 2, 1).movedim(1, -1))
    if stats is not None:
        channel_stats(y, stats)


def stem_backward(
    dy: Tensor, x: Tensor, norm: Tensor, count: int, dx: Tensor, dnorm: Tensor
) -> None:
    """See `interface.Operators.stem_backward`; any number of dimensions."""
    pool = MAX_POOL[x.dim() - 2]
    dnorm.zero_()
    for images in chunks(x):
        normalised = normalise(x[images], norm)
        with torch.enable_grad():
            leaf = _channels_first(normalised.relu()).requires_grad_()
            pooled = pool(leaf, 3, 2, 1)
        (dz,) = torch.autograd.grad(pooled, leaf, _channels_first(dy[images]).to(norm.dtype))
        dz = masked(dz.movedim(1, -1), normalised)
        dnorm += norm_sums(dz, x[images], norm)
        dx[images].copy_(dz)
    _through_norm(dx, x, norm, count, dnorm)
