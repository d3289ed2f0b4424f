"""Each operator as PyTorch's own layers compute it, rounding what they round: the measure that the
kernels' errors are held to. One function per operator, by the names of its arguments. Convolutions
of float32 are a model of a GPU's that may use TF32: operands rounded to nearest, to ten bits of
fraction."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad

from densenet_efficient import reference

EPS = 1e-5
_CONV = (F.conv1d, F.conv2d, F.conv3d)
_AVG_POOL = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_MAX_POOL = (F.max_pool1d, F.max_pool2d, F.max_pool3d)


def _nchw(x: Tensor) -> Tensor:
    return x.movedim(-1, 1)


def _nhwc(x: Tensor) -> Tensor:
    return x.movedim(1, -1)


def _pool(y: Tensor) -> Tensor:
    """Average pooling by 2, which refuses images without a single window."""
    sizes = [size // 2 for size in y.shape[2:]]
    if all(sizes):
        return _AVG_POOL[y.dim() - 3](y, 2)
    return y[(slice(None), slice(None), *(slice(size) for size in sizes))]


class _Norm:
    """nn.BatchNorm's parameters and statistics out of a `norm` table; gradients of the former."""

    def __init__(self, norm: Tensor) -> None:
        scale, _, self.mean, rstd, beta = norm
        self.var = rstd.double().square().reciprocal().sub(EPS).to(norm.dtype)
        self.gamma = (scale / rstd).requires_grad_()
        self.beta = beta.clone().requires_grad_()

    def __call__(self, x: Tensor, training: bool = False) -> Tensor:
        buffers = self.mean.clone(), self.var.clone()
        return F.batch_norm(x, *buffers, self.gamma, self.beta, training=training, eps=EPS)


def to_tf32(x: Tensor) -> Tensor:
    """float32 rounded to TF32, ties away from zero (``cvt.rna.tf32``); other dtypes as they are."""
    if x.dtype != torch.float32:
        return x
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class _Operand(torch.autograd.Function):
    """An operand of a convolution on its way in; its gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return to_tf32(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Result(torch.autograd.Function):
    """A convolution's result passes; its gradient is an operand on its way in."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return to_tf32(gradient.contiguous())


def convolution(x: Tensor, weight: Tensor, padding: int = 0) -> Tensor:
    """x [N, C, *spatial], weight [K, C, *kernel]; float32 as on a GPU that may use TF32."""
    convolve = _CONV[x.dim() - 3]
    return _Result.apply(convolve(_Operand.apply(x), _Operand.apply(weight), padding=padding))


def _pointwise(x: Tensor, weight: Tensor) -> Tensor:
    return convolution(x, weight.view(*weight.shape, *(1 for _ in x.shape[2:])))


def _pool_by_max(x: Tensor) -> Tensor:
    return _MAX_POOL[x.dim() - 3](x, 3, 2, 1)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """[M, C] and [K, C]."""
    return _Result.apply(F.linear(_Operand.apply(x), _Operand.apply(weight)))


def channel_stats(x: Tensor, **_: Any) -> dict[str, Tensor]:
    if not x.shape[0]:
        return {"stats": reference.channel_stats(x)}
    wide = x.to(reference.wide_dtype(x.dtype))
    return {"stats": torch.stack([wide.mean(0), wide.var(0, unbiased=False)])}


def norm_fold(
    stats: Tensor, gamma: Tensor, beta: Tensor, eps: float, **_: Any
) -> dict[str, Tensor]:
    return {"norm": reference.norm_fold(stats, gamma, beta, eps)}


def norm_correction(dnorm: Tensor, norm: Tensor, count: int, **_: Any) -> dict[str, Tensor]:
    return {"correction": reference.norm_correction(dnorm, norm, count)}


def norm_correction_apply(dx: Tensor, x: Tensor, correction: Tensor) -> dict[str, Tensor]:
    """Rounded to either neighbour by chance, as the operator's schema has it: the one function here
    that PyTorch has no layer for."""
    exact = reference.norm_correction_apply(dx.double(), x.double(), correction.double())
    near = exact.to(dx.dtype)
    if dx.element_size() != 2:
        return {"dx": near}
    step = torch.where((exact > near) == (near >= 0), 1, -1).to(torch.int16)
    other = (near.view(torch.int16) + step).view(dx.dtype)
    share = (exact - near) / (other.double() - near)
    return {"dx": torch.where(torch.rand_like(share) < share, other, near)}


def _with_stats(y: Tensor) -> dict[str, Tensor]:
    return {"y": y, "stats": channel_stats(y.flatten(0, -2))["stats"]}


def norm_relu_conv1x1_forward(
    x: Tensor, norm: Tensor, weight: Tensor, **_: Any
) -> dict[str, Tensor]:
    return _with_stats(_linear(F.relu(_Norm(norm)(x)), weight).detach())


def norm_relu_conv1x1_backward(
    dz_y: Tensor,
    y: Tensor,
    correction: Tensor,
    x: Tensor,
    norm: Tensor,
    weight: Tensor,
    dx: Tensor,
    **_: Any,
) -> dict[str, Tensor]:
    dy = reference.norm_correction_apply(dz_y, y, correction)
    layer, x, weight = _Norm(norm), x.requires_grad_(), weight.requires_grad_()
    output = _linear(F.relu(layer(x)), weight)
    wanted = (x, weight, layer.gamma, layer.beta)
    own, dweight, dgamma, dbeta = torch.autograd.grad(output, wanted, dy)
    return {"dx": dx + own, "dweight": dweight, "dnorm": torch.stack([dgamma, dbeta])}


def norm_relu_conv3x3_forward(
    x: Tensor, norm: Tensor, weight: Tensor, **_: Any
) -> dict[str, Tensor]:
    h = F.relu(_Norm(norm)(_nchw(x)))
    return _with_stats(_nhwc(convolution(h, weight, padding=1)).detach())


def norm_relu_conv3x3_backward(
    dy: Tensor,
    y: Tensor | None,
    correction: Tensor | None,
    x: Tensor,
    norm: Tensor,
    weight: Tensor,
    accumulate: bool,
    dx: Tensor,
    **_: Any,
) -> dict[str, Tensor]:
    if y is not None and correction is not None:
        dy = reference.norm_correction_apply(dy, y, correction)
    layer, x, weight = _Norm(norm), _nchw(x).requires_grad_(), weight.requires_grad_()
    z = layer(x)
    output = convolution(F.relu(z), weight, padding=1)
    wanted = (x, z, weight, layer.gamma, layer.beta)
    own, dz, dweight, dgamma, dbeta = torch.autograd.grad(output, wanted, _nchw(dy))
    result = dx + _nhwc(own) if accumulate else _nhwc(dz)
    return {"dx": result, "dweight": dweight, "dnorm": torch.stack([dgamma, dbeta])}


def transition_forward(x: Tensor, norm: Tensor, weight: Tensor, **_: Any) -> dict[str, Tensor]:
    h = F.relu(_Norm(norm)(_nchw(x)))
    return _with_stats(_nhwc(_pool(_pointwise(h, weight))).detach())


def transition_backward(
    dy: Tensor, x: Tensor, norm: Tensor, weight: Tensor, count: int, **_: Any
) -> dict[str, Tensor]:
    layer, x, weight = _Norm(norm), _nchw(x).requires_grad_(), weight.requires_grad_()
    h = F.relu(layer(x, training=count > 0))
    output = _pool(_pointwise(h, weight))
    wanted = (x, weight, layer.gamma, layer.beta)
    dx, dweight, dgamma, dbeta = torch.autograd.grad(output, wanted, _nchw(dy))
    return {"dx": _nhwc(dx), "dweight": dweight, "dnorm": torch.stack([dgamma, dbeta])}


def stem_forward(x: Tensor, norm: Tensor, **_: Any) -> dict[str, Tensor]:
    h = F.relu(_Norm(norm)(_nchw(x)))
    return _with_stats(_nhwc(_pool_by_max(h)).detach())


def stem_backward(dy: Tensor, x: Tensor, norm: Tensor, count: int, **_: Any) -> dict[str, Tensor]:
    layer, x = _Norm(norm), _nchw(x).requires_grad_()
    output = _pool_by_max(F.relu(layer(x, training=count > 0)))
    wanted = (x, layer.gamma, layer.beta)
    dx, dgamma, dbeta = torch.autograd.grad(output, wanted, _nchw(dy))
    return {"dx": _nhwc(dx), "dnorm": torch.stack([dgamma, dbeta])}


def stem_conv_forward(x: Tensor, weight: Tensor, y: Tensor) -> dict[str, Tensor]:
    own = F.conv2d(_nchw(x).to(y.dtype), weight.to(y.dtype), stride=2, padding=3)
    return {"y": _nhwc(own)}


def stem_conv_backward_weight(dy: Tensor, x: Tensor, dweight: Tensor) -> dict[str, Tensor]:
    # Of channels-last images of one pixel PyTorch's computes garbage in bfloat16.
    own, dy = (_nchw(t).to(dy.dtype).contiguous().view(-1).view(_nchw(t).shape) for t in (x, dy))
    return {"dweight": grad.conv2d_weight(own, list(dweight.shape), dy, stride=2, padding=3)}
