"""The algorithms of the transition and the stem: one operator forward and one backward each, and
the statistics of the norm in front of it; and of a norm by itself, where processes share its
statistics.

Then the backward operators take the statistics for constants, and what is missing, the correction,
follows in one of two ways: applied here, after the norm's sums have been exchanged, or left to the
block that produced the channels, as the gradient of the statistics that it handed on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import fallback
from ..ops.dtypes import accumulation_dtype
from ..ops.interface import NORM_ROWS
from . import layout, replay
from .exchange import statistics_gradient
from .specs import PoolSpec


def norm_statistics(spec: PoolSpec, x: Tensor, known: Tensor | None) -> Tensor:
    """[2, C] for the norm of x [N, *spatial, C]: constant, known, or taken here."""
    if spec.norm.running is not None:
        return spec.norm.running
    if known is not None and (spec.exchange is None or spec.known_shared):
        return known
    if known is not None:
        stats = known.clone()
    else:
        stats = torch.empty((2, x.shape[-1]), dtype=accumulation_dtype(x.dtype), device=x.device)
        spec.operators.channel_stats(layout.flat(x), stats)
    if spec.exchange is not None:
        spec.exchange.moments(stats)
    return stats


def _fold(spec: PoolSpec, stats: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    norm = stats.new_empty((NORM_ROWS, stats.shape[1]))
    gamma, beta = (
        None if t is None else t.detach().to(stats.dtype).contiguous() for t in (gamma, beta)
    )
    spec.operators.norm_fold(layout.neighbouring(stats), gamma, beta, spec.norm.eps, norm)
    return norm


def _count(spec: PoolSpec, x: Tensor) -> int:
    """Rows the statistics were taken over; 0 for constant ones, and where the correction follows
    later."""
    own = spec.norm.running is None and spec.exchange is None
    return x.numel() // x.shape[-1] if own else 0


def _through_statistics(
    spec: PoolSpec, dx: Tensor, x: Tensor, norm: Tensor, dnorm: Tensor, defer: bool
) -> Tensor | None:
    """What shared statistics add to dx, the gradient for constant ones: applied in place, or, to
    defer it, returned as the gradient of the statistics."""
    if spec.exchange is None:
        return None
    if defer:
        return statistics_gradient(dnorm, norm)
    _correct(spec, dx, x, norm, dnorm, spec.exchange.total)
    return None


def _correct(
    spec: PoolSpec, dx: Tensor, x: Tensor, norm: Tensor, dnorm: Tensor, count: int
) -> None:
    """Adds to dx, the gradient for constant statistics, what statistics over ``count`` rows, of all
    processes that share them, bring."""
    correction = norm.new_empty((4, norm.shape[1]))
    spec.operators.norm_correction(dnorm, norm, count, False, correction)
    if spec.exchange is not None:
        spec.exchange.sums(correction[1:3])
    correction[0].fill_(1)
    spec.operators.norm_correction_apply(layout.flat(dx), layout.flat(x), correction)


def _matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.detach().to(dtype).reshape(weight.shape[:2]).contiguous()


def transition_forward(
    spec: PoolSpec,
    x: Tensor,
    stats: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """x [N, *spatial, C], stats [2, C] of x, weight [K, C, 1, ...], bias [K] ->
    y [N, K, *(spatial // 2)] and its stats [2, K], where they are wanted. A bias passes the pooling
    unchanged, so it is added to what the operator gives. Without pooling y is [N, K, *spatial]."""
    image = (x.shape[0], *(size // 2 if spec.pools else size for size in x.shape[1:-1]))
    y = layout.empty(image, weight.shape[0], x.dtype, x.device)
    rows = y.movedim(1, -1)
    (y_stats,) = replay.run(
        spec, _transition_forward, (), x, stats, rows, gamma, beta, weight, bias
    )
    return y, y_stats


def _transition_forward(
    spec: PoolSpec,
    x: Tensor,
    stats: Tensor,
    rows: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
) -> list[Tensor | None]:
    """Fills the rows of y and returns its statistics."""
    y_stats = stats.new_zeros((2, weight.shape[0])) if spec.want_stats else None
    norm = _fold(spec, stats, gamma, beta)
    matrix = _matrix(weight, x.dtype)
    own_stats = None if bias is not None else y_stats
    if spec.pools:
        spec.operators.transition_forward(x, norm, matrix, rows, own_stats)
    else:
        spec.operators.norm_relu_conv1x1_forward(
            layout.flat(x), norm, matrix, layout.flat(rows), own_stats
        )
    if bias is not None:
        rows.add_(bias.detach().to(rows.dtype))
        if y_stats is not None:
            spec.operators.channel_stats(layout.flat(rows), y_stats)
    return [y_stats]


def transition_gradients(
    spec: PoolSpec,
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    parameters: Sequence[Tensor | None],
    wanted: Sequence[bool],
    defer: bool = False,
) -> tuple[Tensor, list[Tensor | None], Tensor | None]:
    """dx [N, C, *spatial] in the layout of a new buffer; the gradients of gamma, beta, weight and
    bias in their own dtypes, where they are wanted; and where asked to defer the correction the
    gradient of the statistics [2, C]."""
    dx = layout.empty(x.shape[:-1], x.shape[-1], x.dtype, x.device)
    *gradients, dstats = replay.run(
        spec, _transition_backward, (tuple(wanted), defer), x, stats, layout.channels_last(dy),
        dx.movedim(1, -1), *parameters,
    )  # fmt: skip
    return dx, gradients, dstats


def _transition_backward(
    spec: PoolSpec,
    wanted: Sequence[bool],
    defer: bool,
    x: Tensor,
    stats: Tensor,
    dy: Tensor,
    dx: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
) -> list[Tensor | None]:
    """Fills the rows of dx and returns all other gradients."""
    norm = _fold(spec, stats, gamma, beta)
    dnorm = norm.new_empty((2, x.shape[-1]))
    matrix = _matrix(weight, x.dtype)
    dweight = norm.new_empty(matrix.shape) if wanted[2] else None
    if spec.pools:
        spec.operators.transition_backward(dy, x, norm, matrix, _count(spec, x), dx, dweight, dnorm)
    else:
        _pointwise_backward(spec, dy, x, norm, matrix, dx, dweight, dnorm)
    dstats = _through_statistics(spec, dx, x, norm, dnorm, defer)
    own = None if dweight is None else dweight.view(weight.shape)
    dbias = dy.sum(tuple(range(dy.dim() - 1)), dtype=stats.dtype) if wanted[3] else None
    found = like((dnorm[0], dnorm[1], own, dbias), (gamma, beta, weight, bias), wanted)
    return [*found, dstats]


def like(
    gradients: Sequence[Tensor | None],
    parameters: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients in their parameters' dtypes; None where they are not wanted."""
    return [
        gradient.to(parameter.dtype)
        if need and gradient is not None and parameter is not None
        else None
        for gradient, parameter, need in zip(gradients, parameters, wanted, strict=True)
    ]


def _pointwise_backward(
    spec: PoolSpec,
    dy: Tensor,
    x: Tensor,
    norm: Tensor,
    matrix: Tensor,
    dx: Tensor,
    dweight: Tensor | None,
    dnorm: Tensor,
) -> None:
    """`_transition_backward` without pooling, through the operator of a block's 1x1 convolution:
    nothing is corrected in dy, and dx begins at 0."""
    nothing = norm.new_zeros((4, matrix.shape[0]))
    nothing[0].fill_(1)
    flat_dy, flat_x, flat_dx = layout.flat(dy), layout.flat(x), layout.flat(dx)
    flat_dx.zero_()
    spec.operators.norm_relu_conv1x1_backward(
        flat_dy, flat_dy, nothing, flat_x, norm, matrix, flat_dx, dweight, dnorm
    )
    count = _count(spec, x)
    if count:
        _correct(spec, dx, x, norm, dnorm, count)


def stem_forward(
    spec: PoolSpec, x: Tensor, stats: Tensor, gamma: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """x [N, *spatial, C], stats [2, C] of x -> y [N, C, *ceil(spatial / 2)] and its stats [2, C],
    where they are wanted."""
    image = (x.shape[0], *(-(-size // 2) for size in x.shape[1:-1]))
    y = layout.empty(image, x.shape[-1], x.dtype, x.device)
    y_stats = stats.new_zeros((2, x.shape[-1])) if spec.want_stats else None
    norm = _fold(spec, stats, gamma, beta)
    spec.operators.stem_forward(x, norm, y.movedim(1, -1), y_stats)
    return y, y_stats


def stem_backward(
    spec: PoolSpec,
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """dx [N, C, *spatial], dense as PyTorch's convolution wants it, and dnorm [2, C]."""
    norm = _fold(spec, stats, gamma, beta)
    dx = layout.empty(x.shape[:-1], x.shape[-1], x.dtype, x.device, length=x.shape[-1])
    dnorm = norm.new_empty((2, x.shape[-1]))
    spec.operators.stem_backward(
        layout.channels_last(dy), x, norm, _count(spec, x), dx.movedim(1, -1), dnorm
    )
    _through_statistics(spec, dx.movedim(1, -1), x, norm, dnorm, defer=False)
    return dx, dnorm


def stem_gradients(
    spec: PoolSpec,
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    parameters: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """`stem_backward`, with the gradients of gamma and beta in their own dtypes where they are
    wanted."""
    dx, dnorm = stem_backward(spec, dy, x, stats, *parameters)
    return dx, like((*dnorm,), parameters, wanted)


def norm_forward(
    spec: PoolSpec, x: Tensor, stats: Tensor, gamma: Tensor | None, beta: Tensor | None
) -> Tensor:
    """The norm alone: x [N, *spatial, C], stats [2, C] of x -> y [N, C, *spatial]."""
    norm = _fold(spec, stats, gamma, beta)
    y = layout.empty(x.shape[:-1], x.shape[-1], x.dtype, x.device, length=x.shape[-1])
    y.movedim(1, -1).copy_(fallback.normalise(x, norm))
    return y


def norm_backward(
    spec: PoolSpec,
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    defer: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dx as x, dnorm [2, C], and where asked to defer the correction the gradient of the statistics
    [2, C]."""
    norm = _fold(spec, stats, gamma, beta)
    rows = tuple(range(dy.dim() - 1))
    dz = dy.to(norm.dtype)
    dgamma = (x.to(norm.dtype) - norm[2]).mul_(dz).sum(rows).mul_(norm[3])
    dnorm = torch.stack((dgamma, dz.sum(rows)))
    dx = (dz * norm[0]).to(x.dtype).contiguous()
    return dx, dnorm, _through_statistics(spec, dx, x, norm, dnorm, defer)
