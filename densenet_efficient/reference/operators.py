"""The plain PyTorch reference of every operator in csrc/ops.cpp: the specification of the kernels.

Each function has its operator's name and argument order, without the tensors the operator writes;
those are returned instead (for a tensor that the operator adds to, the contribution is returned).
Nothing here needs the compiled library, and every function works in float64.

Conventions, as in csrc/ops.cpp:

    rows        x is [M, C] or [N, H, W, C]: channels last, one row per pixel. Images may have one
                or three spatial dimensions, too, and kernels and windows as many.
    norm        [5, C]: scale a = gamma * rstd, shift s = beta - mean * a, mean, rstd, beta.
    stats       [2, C]: mean and biased variance over the rows, of the values as stored.
    dnorm       [2, C]: dgamma = sum dz * x_hat and dbeta = sum dz over the rows.
    correction  [4, C]: a, p, q, mean; the gradient through a norm is a * dz - p - (x - mean) * q.
    dz          the gradient after the ReLU mask, before the norm's scale.

Activations are float64, float32, bfloat16 or float16, weights have the activations' dtype. norm,
stats, dnorm, correction and weight gradients are float32 (float64 for float64 activations). The
arithmetic is done in that wider dtype; the operands of products and what is stored as an activation
are rounded to the activations' dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad

_CONV = (F.conv1d, F.conv2d, F.conv3d)
_CONV_INPUT = (grad.conv1d_input, grad.conv2d_input, grad.conv3d_input)
_CONV_WEIGHT = (grad.conv1d_weight, grad.conv2d_weight, grad.conv3d_weight)
_MAX_POOL = (F.max_pool1d, F.max_pool2d, F.max_pool3d)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and parameter gradients for activations of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(x: Tensor) -> Tensor:
    return x.to(wide_dtype(x.dtype))


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the wide dtype, with the values it has once stored as `dtype`."""
    return x.to(dtype).to(x.dtype)


def _rows(x: Tensor) -> Tensor:
    """[..., C] -> [M, C]."""
    return x.flatten(0, -2)


def _nchw(x: Tensor) -> Tensor:
    return x.movedim(-1, 1)


def _nhwc(x: Tensor) -> Tensor:
    return x.movedim(1, -1)


def _of(functions: tuple[Callable[..., Tensor], ...], x: Tensor) -> Callable[..., Tensor]:
    """The function for as many spatial dimensions as x [N, *spatial, C] has."""
    return functions[x.dim() - 3]


def _mean_of_rows(x: Tensor) -> Tensor:
    """The mean over the rows of [M, C]; zero where there are no rows."""
    return x.sum(0) / max(x.shape[0], 1)


def _norm_relu(x: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """(z, relu(z)) with z = (x - mean) * a + beta = a * x + s, both in the wide dtype."""
    z = (_wide(x) - norm[2]) * norm[0] + norm[4]
    return z, torch.relu(z)


def _relu_mask(dh: Tensor, z: Tensor) -> Tensor:
    """dz: dh where the ReLU is active, zero where not. A NaN in z passes, as in PyTorch."""
    return torch.where(z <= 0, torch.zeros_like(dh), dh)


def _dnorm(dz: Tensor, x: Tensor, norm: Tensor) -> Tensor:
    """[2, C]: dgamma and dbeta from dz [..., C] (wide) and x [..., C]."""
    x_hat = (_wide(x) - norm[2]) * norm[3]
    return torch.stack([_rows(dz * x_hat).sum(0), _rows(dz).sum(0)])


def _correct(dz: Tensor, x: Tensor, correction: Tensor) -> Tensor:
    """The gradient through a norm and its statistics, in the wide dtype."""
    a, p, q, mean = correction
    return a * dz - p - (_wide(x) - mean) * q


def channel_stats(x: Tensor) -> Tensor:
    """stats [2, C] of x [M, C], by two passes: no difference of large sums."""
    x = _wide(x)
    mean = _mean_of_rows(x)
    return torch.stack([mean, _mean_of_rows((x - mean).square())])


def norm_fold(stats: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    """norm [5, C] from stats [2, C]; gamma and beta [C] or None (1 and 0)."""
    mean, variance = stats
    rstd = (variance + eps).rsqrt()
    scale = rstd if gamma is None else gamma.to(stats.dtype) * rstd
    beta = torch.zeros_like(mean) if beta is None else beta.to(stats.dtype)
    return torch.stack([scale, beta - mean * scale, mean, rstd, beta])


def norm_correction(dnorm: Tensor, norm: Tensor, count: int, accumulate: bool = False) -> Tensor:
    """correction [4, C] from dnorm [2, C] and norm [5, C], for statistics taken over `count` rows
    (0: constant statistics, p = q = 0).

    accumulate: the contribution to a correction shared by several norms: rows a and mean are zero.
    """
    scale, _, mean, rstd, _ = norm
    dgamma, dbeta = dnorm
    zero = torch.zeros_like(scale)
    p = scale * dbeta / count if count else zero
    q = scale * rstd * dgamma / count if count else zero
    return torch.stack([zero, p, q, zero] if accumulate else [scale, p, q, mean])


def norm_correction_apply(dx: Tensor, x: Tensor, correction: Tensor) -> Tensor:
    """a * dx - p - (x - mean) * q for dx and x [M, C]: what dx becomes."""
    return _correct(_wide(dx), x, correction).to(dx.dtype)


def norm_relu_conv1x1_forward(x: Tensor, norm: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(y [M, K], stats of y) with y = relu(a * x + s) @ weight^T; x [M, C], weight [K, C]."""
    h = _rounded(_norm_relu(x, norm)[1], x.dtype)
    y = (h @ _wide(weight).t()).to(x.dtype)
    return y, channel_stats(y)


def norm_relu_conv1x1_backward(
    dz_y: Tensor, y: Tensor, correction: Tensor, x: Tensor, norm: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(a * dz [M, C], dweight [K, C], dnorm [2, C]), where dz_y [M, K] is the masked gradient of
    the norm that follows y [M, K] and correction [4, K] is that norm's.

    dy = a * dz_y - p - (y - mean) * q and dz = (dy @ weight) * [a * x + s > 0]. The operator adds
    the first output to the shared gradient buffer.
    """
    dy = _rounded(_correct(_wide(dz_y), y, correction), x.dtype)
    z, h = _norm_relu(x, norm)
    dz = _relu_mask(dy @ _wide(weight), z)
    dweight = dy.t() @ _rounded(h, x.dtype)
    return (norm[0] * dz).to(x.dtype), dweight, _dnorm(dz, x, norm)


def norm_relu_conv3x3_forward(x: Tensor, norm: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(y [N, H, W, K], stats of y) with y = conv3x3(relu(a * x + s), weight), stride 1, padding 1:
    the padding is zero after the ReLU. x [N, H, W, C], weight [K, C, 3, 3]."""
    h = _rounded(_norm_relu(x, norm)[1], x.dtype)
    y = _nhwc(_of(_CONV, x)(_nchw(h), _wide(weight), padding=1)).to(x.dtype)
    return y, channel_stats(_rows(y))


def norm_relu_conv3x3_backward(
    dy: Tensor,
    y: Tensor | None,
    correction: Tensor | None,
    x: Tensor,
    norm: Tensor,
    weight: Tensor,
    accumulate: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [N, H, W, C], dweight [K, C, 3, 3], dnorm [2, C]).

    Where y and correction [4, K] are given, dy [N, H, W, K] is first corrected:
    a * dy - p - (y - mean) * q. Then dz = conv3x3^T(dy, weight) * [a * x + s > 0], and dx = dz, or,
    with accumulate, a * dz, which the operator adds to the shared gradient buffer.
    """
    if (y is None) != (correction is None):
        raise ValueError("y and correction must be given together, or neither")
    wide_dy = _wide(dy)
    if y is not None and correction is not None:
        wide_dy = _correct(wide_dy, y, correction)
    wide_dy = _nchw(_rounded(wide_dy, x.dtype))
    z, h = _norm_relu(x, norm)
    h = _nchw(_rounded(h, x.dtype))
    dh = _of(_CONV_INPUT, x)(list(h.shape), _wide(weight), wide_dy, padding=1)
    dweight = _of(_CONV_WEIGHT, x)(h, list(weight.shape), wide_dy, padding=1)
    dz = _relu_mask(_nhwc(dh), z)
    dx = norm[0] * dz if accumulate else dz
    return dx.to(x.dtype), dweight, _dnorm(dz, x, norm)


def transition_forward(x: Tensor, norm: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(y [N, H/2, W/2, K], stats of y) with y = avg_pool2x2(relu(a * x + s)) @ weight^T. The
    pooling commutes with the 1x1 convolution; odd edges are dropped. x [N, H, W, C], weight
    [K, C]."""
    pooled = _rounded(_pool(_norm_relu(x, norm)[1]), x.dtype)
    y = (pooled @ _wide(weight).t()).to(x.dtype)
    return y, channel_stats(_rows(y))


def transition_backward(
    dy: Tensor, x: Tensor, norm: Tensor, weight: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [N, H, W, C], dweight [K, C], dnorm [2, C]) from dy [N, H/2, W/2, K]: through the
    pooling, the ReLU and the norm, whose statistics were taken over `count` rows (0: constant)."""
    z, h = _norm_relu(x, norm)
    pooled = _rounded(_pool(h), x.dtype)
    dweight = _rows(_wide(dy)).t() @ _rows(pooled)
    dpooled = _wide(dy) @ _wide(weight)
    dh = torch.zeros_like(h)
    spread = dpooled / 2 ** (x.dim() - 2)
    for dim in range(1, x.dim() - 1):
        spread = spread.repeat_interleave(2, dim=dim)
    dh[tuple(slice(size) for size in spread.shape)] = spread
    dz = _relu_mask(dh, z)
    dnorm = _dnorm(dz, x, norm)
    dx = _correct(dz, x, norm_correction(dnorm, norm, count))
    return dx.to(x.dtype), dweight, dnorm


def _pool(h: Tensor) -> Tensor:
    """[N, H, W, C] -> [N, H/2, W/2, C], the mean of each 2 x 2 window."""
    for dim in range(1, h.dim() - 1):
        size = h.shape[dim] // 2
        h = h.narrow(dim, 0, 2 * size).unflatten(dim, (size, 2)).mean(dim + 1)
    return h


def _max_pool(h: Tensor, **options: Any) -> Any:
    return _of(_MAX_POOL, h)(_nchw(h), kernel_size=3, stride=2, padding=1, **options)


def stem_forward(x: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """(y [N, ceil(H/2), ceil(W/2), C], stats of y) with
    y = max_pool(relu(a * x + s), kernel 3, stride 2, padding 1); x [N, H, W, C]."""
    h = _norm_relu(x, norm)[1]
    y = _nhwc(_max_pool(h)).to(x.dtype)
    return y, channel_stats(_rows(y))


def stem_backward(dy: Tensor, x: Tensor, norm: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(dx [N, H, W, C], dnorm [2, C]) from dy [N, ceil(H/2), ceil(W/2), C]. The first maximum of a
    window (row-major) takes its gradient; the norm's statistics were taken over `count` rows
    (0: constant)."""
    z, h = _norm_relu(x, norm)
    _, winners = _max_pool(h, return_indices=True)
    dh = torch.zeros_like(_nchw(h).contiguous()).flatten(2)
    dh.scatter_add_(2, winners.flatten(2), _nchw(_wide(dy)).flatten(2))
    dz = _relu_mask(_nhwc(dh.unflatten(2, tuple(x.shape[1:-1]))), z)
    dnorm = _dnorm(dz, x, norm)
    return _correct(dz, x, norm_correction(dnorm, norm, count)).to(x.dtype), dnorm


def stem_conv_forward(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """y [N, ceil(H/2), ceil(W/2), K] = conv(x, weight), kernel 7, stride 2, padding 3, of x
    [N, H, W, C] and weight [K, C, 7, 7], in a dtype, x's by default, to which both are rounded."""
    dtype = dtype or x.dtype
    y = F.conv2d(_nchw(_wide(x.to(dtype))), _wide(weight.to(dtype)), stride=2, padding=3)
    return _nhwc(y).to(dtype)


def stem_conv_backward_weight(dy: Tensor, x: Tensor) -> Tensor:
    """dweight [K, C, 7, 7] of `stem_conv_forward` from dy [N, ceil(H/2), ceil(W/2), K], in the wide
    dtype; x is rounded to dy's."""
    size = [dy.shape[-1], x.shape[-1], 7, 7]
    wide = _nchw(_wide(x.to(dy.dtype)))
    return grad.conv2d_weight(wide, size, _nchw(_wide(dy)), stride=2, padding=3)
