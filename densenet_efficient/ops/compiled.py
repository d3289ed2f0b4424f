"""Typed wrappers of the compiled operators, one function per schema of ``csrc/ops.cpp``.

Every operator writes into tensors its caller owns and returns nothing. Shapes and meanings are
those of ``csrc/ops.cpp``: rows ``[M, C]`` and images ``[N, H, W, C]`` are channels last and may be
channel slices of a larger buffer; ``norm`` and ``correction`` are ``[4, C]``; ``stats`` and
``dnorm`` are ``[2, C]``. `ops.fallback` offers the same functions on any device
and in any number of dimensions, `reference` specifies them.

Errors: `ops.library.MissingLibraryError` where the compiled library is not
there, ``RuntimeError`` naming the tensor, what was expected and what came for bad arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import library

NAMES = (
    "channel_stats",
    "norm_fold",
    "norm_correction",
    "norm_correction_apply",
    "norm_relu_conv1x1_forward",
    "norm_relu_conv1x1_backward",
    "norm_relu_conv3x3_forward",
    "norm_relu_conv3x3_backward",
    "transition_forward",
    "transition_backward",
    "stem_forward",
    "stem_backward",
)


@functools.cache
def _operator(name: str) -> Callable[..., None]:
    """The loaded operator; the first call of all loads the library and registers fake kernels."""
    _load()
    return getattr(torch.ops.densenet_efficient, name).default


@functools.cache
def _load() -> None:
    library.load()
    for name in NAMES:
        # An operator that only writes into its arguments has nothing to infer.
        torch.library.register_fake(f"densenet_efficient::{name}", lambda *args: None)


def channel_stats(x: Tensor, stats: Tensor) -> None:
    """Mean and biased variance of each channel of ``x [M, C]`` into ``stats [2, C]``."""
    _operator("channel_stats")(x, stats)


def norm_fold(
    stats: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, norm: Tensor
) -> None:
    """Scale, shift, mean and rstd into ``norm [4, C]`` from ``stats [2, C]``."""
    _operator("norm_fold")(stats, gamma, beta, eps, norm)


def norm_correction(
    dnorm: Tensor, norm: Tensor, count: int, accumulate: bool, correction: Tensor
) -> None:
    """``a, p, q, mean`` into ``correction [4, C]``, or p and q added to its first C columns."""
    _operator("norm_correction")(dnorm, norm, count, accumulate, correction)


def norm_correction_apply(dx: Tensor, x: Tensor, correction: Tensor) -> None:
    """``dx [M, C] = a dx - p - (x - mean) q``, in place; 16-bit values by dithered rounding."""
    _operator("norm_correction_apply")(dx, x, correction)


def norm_relu_conv1x1_forward(
    x: Tensor, norm: Tensor, weight: Tensor, y: Tensor, stats: Tensor | None
) -> None:
    """Stage A: ``y [M, K] = relu(a x + s) W^T`` of ``x [M, C]``, and the stats of y."""
    _operator("norm_relu_conv1x1_forward")(x, norm, weight, y, stats)


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
) -> None:
    """Stage A backward: ``dx += a dz``, the weight gradient and the norm's two sums."""
    _operator("norm_relu_conv1x1_backward")(
        dz_y, y, correction, x, norm, weight, dx, dweight, dnorm
    )


def norm_relu_conv3x3_forward(
    x: Tensor, norm: Tensor, weight: Tensor, y: Tensor, stats: Tensor | None
) -> None:
    """Stage B: ``y [N, H, W, K] = conv3x3(relu(a x + s))``, and the stats of y."""
    _operator("norm_relu_conv3x3_forward")(x, norm, weight, y, stats)


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
) -> None:
    """Stage B backward: ``dx = dz`` or ``dx += a dz``, the weight gradient, the norm's sums."""
    _operator("norm_relu_conv3x3_backward")(
        dy, y, correction, x, norm, weight, accumulate, dx, dweight, dnorm
    )


def transition_forward(
    x: Tensor, norm: Tensor, weight: Tensor, y: Tensor, stats: Tensor | None
) -> None:
    """``y [N, H/2, W/2, K] = avg_pool2x2(relu(a x + s)) W^T``, and the stats of y."""
    _operator("transition_forward")(x, norm, weight, y, stats)


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
    """``dx [N, H, W, C]`` through pooling, ReLU and norm, written whole; the other gradients."""
    _operator("transition_backward")(dy, x, norm, weight, count, dx, dweight, dnorm)


def stem_forward(x: Tensor, norm: Tensor, y: Tensor, stats: Tensor | None) -> None:
    """``y = max_pool(relu(a x + s), 3, stride 2, padding 1)``, and the stats of y."""
    _operator("stem_forward")(x, norm, y, stats)


def stem_backward(
    dy: Tensor, x: Tensor, norm: Tensor, count: int, dx: Tensor, dnorm: Tensor
) -> None:
    """``dx [N, H, W, C]`` through pooling, ReLU and norm, written whole; the norm's sums."""
    _operator("stem_backward")(dy, x, norm, count, dx, dnorm)
