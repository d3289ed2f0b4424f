"""The residual dense block's algorithm (ESRGAN, arXiv 1809.00219), forward and backward.

One buffer F ``[N, C + 4 k, *spatial]`` holds the input x and the four new features; convolution i
reads a prefix of its channels and writes the next k. There is no norm, and LeakyReLU keeps the sign
of its input, so F is all that backward needs: the mask is the sign of what is in it.

    forward                                       backward, E of F's shape
    F[:C]     = x                                 E         = conv5^T(s dy)
    F[slot i] = leaky(conv_i(F[:C_i]))   i < 5    E[:C_i]  += conv_i^T(E[slot i] leaky'(F[slot i]))
    y         = x + s conv5(F)                    dx        = E[:C] + dy

ESRGAN+ (arXiv 2001.08073) adds a 1x1 convolution of x to feature 2, and feature 2 to feature 4:
then the signs of these two, before the sums, are kept as well, a byte each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.convolution import ConvOptions
from . import differentiable, eager, layout

LAYERS = 5


@dataclass(frozen=True)
class ResidualSpec:
    """What one call is, apart from its tensors.

    channels C, growth k, slope of the LeakyReLU, scale s of what is added to x. geometry: of the
    five convolutions.
    """

    channels: int
    growth: int
    slope: float
    scale: float
    geometry: tuple[ConvOptions, ...]

    def inputs(self, index: int) -> slice:
        """The channels of F that convolution ``index`` (from 0) reads."""
        return slice(self.channels + index * self.growth)

    def slot(self, index: int) -> slice:
        """The channels of F that it writes."""
        return slice(self.channels + index * self.growth, self.channels + (index + 1) * self.growth)


def _pointwise(x: Tensor) -> ConvOptions:
    dims = x.dim() - 2
    return ConvOptions((0,) * dims, (1,) * dims)


def forward(
    spec: ResidualSpec, x: Tensor, parameters: Sequence[Tensor | None], dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y, F and the kept signs.

    x ``[N, C, *spatial]``. parameters: weight and bias of every convolution, and the weight of
    ESRGAN+'s 1x1 convolution or None. dtype: of the convolutions; y has x's.
    """
    *convolutions, plus = _cast(parameters, dtype)
    new = spec.channels + (LAYERS - 1) * spec.growth
    buffer = _empty(x, new, dtype)
    buffer[:, : spec.channels].copy_(x)
    signs = []
    for index, options in enumerate(spec.geometry[:-1]):
        weight, bias = convolutions[2 * index : 2 * index + 2]
        feature = options.forward(buffer[:, spec.inputs(index)], weight, bias)
        F.leaky_relu_(feature, spec.slope)
        if plus is not None and index in (1, 3):
            signs.append(feature > 0)
            if index == 1:
                feature += _pointwise(x).forward(buffer[:, : spec.channels], plus, None)
            else:
                feature += buffer[:, spec.slot(1)]
        buffer[:, spec.slot(index)].copy_(feature)
    y = spec.geometry[-1].forward(buffer, *convolutions[-2:])
    if y.dtype == x.dtype:
        return y.mul_(spec.scale).add_(x), buffer, signs
    return y.mul_(spec.scale) + x, buffer, signs


def backward(
    spec: ResidualSpec,
    dy: Tensor,
    buffer: Tensor,
    signs: Sequence[Tensor],
    parameters: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """dx in dy's dtype, and the parameters' gradients in their own dtypes where wanted."""
    *convolutions, plus = _cast(parameters, buffer.dtype)
    found: list[Tensor | None] = [None] * len(parameters)

    def through(index: int, gradient: Tensor) -> Tensor:
        first = 2 * index
        weight, bias = convolutions[first : first + 2]
        dz, found[first], found[first + 1] = spec.geometry[index].backward(
            gradient, buffer[:, spec.inputs(index)], weight, wanted[first], bias is not None
        )
        return dz

    e = through(LAYERS - 1, dy.to(buffer.dtype) * spec.scale)
    x, dx = buffer[:, : spec.channels], e[:, : spec.channels]
    for index in reversed(range(LAYERS - 1)):
        slot = spec.slot(index)
        gradient, sign_of = e[:, slot], buffer[:, slot]
        if plus is not None and index == 3:
            e[:, spec.slot(1)].add_(gradient)
            sign_of = signs[1].to(e.dtype)
        elif plus is not None and index == 1:
            sign_of = signs[0].to(e.dtype)
            own, found[-1], _ = _pointwise(x).backward(gradient, x, plus, wanted[-1], False)
            dx.add_(own)
        gradient = torch.ops.aten.leaky_relu_backward(gradient, sign_of, spec.slope, True)
        e[:, spec.inputs(index)].add_(through(index, gradient))
    gradients = [
        None if gradient is None or not need or parameter is None else gradient.to(parameter.dtype)
        for gradient, need, parameter in zip(found, wanted, parameters, strict=True)
    ]
    return dy + dx, gradients


def plain(
    spec: ResidualSpec, x: Tensor, parameters: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """y and F, through PyTorch's differentiable operators."""
    *convolutions, plus = [None if p is None else p.to(x.dtype) for p in parameters]
    features = second = x
    for index, options in enumerate(spec.geometry[:-1]):
        new = F.leaky_relu(_convolve(options, features, convolutions, index), spec.slope)
        if plus is not None and index == 1:
            new = second = new + _pointwise(x).forward(x, plus, None)
        if plus is not None and index == 3:
            new = new + second
        features = torch.cat((features, new), 1)
    last = _convolve(spec.geometry[-1], features, convolutions, LAYERS - 1)
    return last * spec.scale + x, features


def _convolve(
    options: ConvOptions, x: Tensor, convolutions: Sequence[Tensor | None], index: int
) -> Tensor:
    weight, bias = convolutions[2 * index : 2 * index + 2]
    assert weight is not None
    return options.forward(x, weight, bias)


def _empty(x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """[N, channels, *spatial] in x's memory format."""
    if x.is_contiguous():
        return torch.empty((x.shape[0], channels, *x.shape[2:]), dtype=dtype, device=x.device)
    return layout.empty((x.shape[0], *x.shape[2:]), channels, dtype, x.device, length=channels)


def _cast(parameters: Sequence[Tensor | None], dtype: torch.dtype) -> list[Any]:
    return [None if p is None else p.detach().to(dtype) for p in parameters]


class ResidualDenseBlockFunction(torch.autograd.Function):
    """A block: (spec, dtype, x, *parameters) -> y ``[N, C, *spatial]``, and F for this function
    alone: gradients of gradients read x off F, whose first channels it is, so that x is not kept.
    """

    @staticmethod
    def forward(
        ctx: Any, spec: ResidualSpec, dtype: torch.dtype, x: Tensor, *parameters: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `forward`."""
        with eager.without_autocast(x.device):
            y, buffer, signs = forward(spec, x, parameters, dtype)
        ctx.spec, ctx.signs = spec, len(signs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(buffer, *signs, *parameters)
        return y, buffer

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dbuffer: Tensor | None) -> Any:
        """See `backward`."""
        needs = ctx.needs_input_grad
        given = dy if dy is not None else dbuffer
        if given is None:
            return (None,) * len(needs)
        spec: ResidualSpec = ctx.spec
        buffer, *others = ctx.saved_tensors
        signs, parameters = others[: ctx.signs], others[ctx.signs :]
        usual = eager.is_ordinary(given) and not eager.is_transformed()
        if dy is not None and dbuffer is None and usual and not torch.is_grad_enabled():
            with eager.without_autocast(dy.device):
                dx, gradients = backward(spec, dy, buffer, signs, parameters, needs[3:])
            found: list[Tensor | None] = [dx, *gradients]
        else:
            x = buffer[:, : spec.channels]
            missing = x if dy is None else buffer
            zeros = torch.zeros_like(missing)
            both = (zeros if dy is None else dy, zeros if dbuffer is None else dbuffer)
            found = differentiable.gradients(
                lambda x, *parameters: torch.cat(plain(spec, x, parameters), 1),
                (x, *parameters),
                torch.cat(both, 1),
            )
        return None, None, *(g if need else None for g, need in zip(found, needs[2:], strict=True))
