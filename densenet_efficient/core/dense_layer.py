"""One dense layer of a block's call: its parameters, and its convolutions in either direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import fallback
from ..ops.convolution import ConvOptions
from ..ops.dtypes import accumulation_dtype
from ..ops.interface import Operators
from .folds import Fold
from .layout import flat
from .specs import PARAMETERS_PER_LAYER, BlockSpec, LayerSpec
from .weights import Weights, is_dense


@dataclass(frozen=True)
class Incoming:
    """The gradient dy that reaches a convolution's output y, not yet corrected for the statistics
    of y unless y and correction are None."""

    dy: Tensor
    y: Tensor | None = None
    correction: Tensor | None = None

    def apply_correction(self, operators: Operators) -> Incoming:
        """The same, corrected in place."""
        if self.y is not None and self.correction is not None:
            operators.norm_correction_apply(flat(self.dy), flat(self.y), self.correction)
        return Incoming(self.dy)

    def sum_over_rows(self, total: Tensor) -> None:
        """The corrected gradient's sum for each channel, which is the gradient of a bias; no
        corrected copy is made."""
        rows = tuple(range(self.dy.dim() - 1))
        torch.sum(self.dy, rows, dtype=total.dtype, out=total)
        if self.y is not None and self.correction is not None:
            a, p, q, mean = self.correction
            count = self.dy.numel() // self.dy.shape[-1]
            centred = self.y.sum(rows, dtype=total.dtype) - count * mean
            total.mul_(a).sub_(count * p).sub_(q * centred)


class Correction(NamedTuple):
    """What a norm's gradient is made into, see `norm_correction`: the number of rows that its
    statistics were taken over, 0 for constant ones; the table ``[4, ...]``, in whose first columns
    it is put, or, by a layer's first convolution, added."""

    rows: int
    table: Tensor


class DenseLayerCall:
    """One layer of a call: its parameters in the kernels' dtypes, and its two convolutions in
    either direction. weights: of `weights.by_layer`."""

    def __init__(
        self,
        spec: BlockSpec,
        index: int,
        parameters: Sequence[Tensor | None],
        weights: Weights,
        dtype: torch.dtype,
        wanted: Sequence[bool] = (),
    ) -> None:
        self.spec: LayerSpec = spec.layers[index]
        self.operators = spec.operators
        self.acc = accumulation_dtype(dtype)
        own = slice(index * PARAMETERS_PER_LAYER, (index + 1) * PARAMETERS_PER_LAYER)
        self.parameters, self.wanted = parameters[own], wanted[own]
        self.weight1, self.weight2 = weights
        self.bias1, self.bias2 = (cast(self.parameters[place], dtype) for place in (3, 7))
        self.gradients: list[Tensor | None] = [None] * PARAMETERS_PER_LAYER
        self.tail_gradients: list[Tensor | None] = []

    def conv1_forward(
        self, x: Tensor, norm: Tensor, y: Tensor, stats: Tensor | None, then: Fold | None
    ) -> None:
        """b from F[:C_l]; for a plain layer the new features. then: is folded when the statistics
        are there, which are some of those that it folds."""
        assert self.weight1 is not None
        if self.spec.conv1 is not None or not self.spec.bottleneck:
            weight, bias = self.weight1, self.bias1
            self._conv_forward(x, norm, weight, bias, self.spec.conv1, y, stats, then)
            return
        weight = self.weight1.view(self.weight1.shape[:2])
        rest = self._rest(stats, then) if self.bias1 is None else (None,)
        self.operators.norm_relu_conv1x1_forward(flat(x), norm, weight, flat(y), *rest)
        self._add_bias(y, self.bias1, stats, then)

    def conv2_forward(
        self, b: Tensor, norm: Tensor, y: Tensor, stats: Tensor | None, then: Fold | None
    ) -> None:
        """The new features from b; then: as in `conv1_forward`."""
        assert self.weight2 is not None
        weight, bias = self.weight2, self.bias2
        self._conv_forward(b, norm, weight, bias, self.spec.conv2, y, stats, then)

    def _conv_forward(
        self,
        x: Tensor,
        norm: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: ConvOptions | None,
        y: Tensor,
        stats: Tensor | None,
        then: Fold | None,
    ) -> None:
        if options is None:
            rest = self._rest(stats, then) if bias is None else (None,)
            self.operators.norm_relu_conv3x3_forward(x, norm, weight, y, *rest)
            self._add_bias(y, bias, stats, then)
            return
        fallback.norm_relu_conv_forward(x, norm, weight, bias, options, y)
        self._take_stats(y, stats, then)

    def _rest(self, stats: Tensor | None, then: Fold | None) -> tuple[Any, ...]:
        """The last arguments of an operator that also takes the statistics and folds."""
        return (stats,) if then is None else (stats, *then)

    def _add_bias(
        self, y: Tensor, bias: Tensor | None, stats: Tensor | None, then: Fold | None
    ) -> None:
        if bias is not None:
            y.add_(bias)
            self._take_stats(y, stats, then)

    def _take_stats(self, y: Tensor, stats: Tensor | None, then: Fold | None) -> None:
        if stats is not None:
            self.operators.channel_stats(flat(y), stats)
        if then is not None:
            then.run(self.operators)

    def conv1_backward(
        self,
        outer: Incoming,
        x: Tensor,
        norm: Tensor,
        dx: Tensor,
        dnorm: Tensor,
        then: Correction | None,
    ) -> None:
        """dx += a dz; dnorm ``[2, C]``, the gradients of gamma1 and beta1, and that of conv1. then:
        what is corrected by norm1's gradient."""
        if self.spec.conv1 is not None or not self.spec.bottleneck:
            assert self.weight1 is not None
            weight, bias = self.weight1, self.bias1
            self._conv_backward(
                0, outer, x, norm, weight, bias, self.spec.conv1, accumulate=True, dx=dx,
                dnorm=dnorm, then=then,
            )  # fmt: skip
            return
        assert self.weight1 is not None and outer.y is not None and outer.correction is not None
        shape = self.weight1.shape[:2]
        dweight = self._empty(2)
        self.operators.norm_relu_conv1x1_backward(
            flat(outer.dy), flat(outer.y), outer.correction, flat(x), norm,
            self.weight1.view(shape), flat(dx), None if dweight is None else dweight.view(shape),
            dnorm, *(then or ()),
        )  # fmt: skip
        dbias = self._empty(3)
        if dbias is not None:
            outer.sum_over_rows(dbias)
        self._keep(0, dnorm, dweight, dbias)

    def conv2_backward(
        self, outer: Incoming, b: Tensor, norm: Tensor, dz: Tensor, dnorm: Tensor, then: Correction
    ) -> None:
        """dz2; dnorm ``[2, K]``, the gradients of gamma2 and beta2, that of conv2, and the
        correction of norm2."""
        assert self.weight2 is not None
        weight, bias = self.weight2, self.bias2
        self._conv_backward(
            4, outer, b, norm, weight, bias, self.spec.conv2, accumulate=False, dx=dz, dnorm=dnorm,
            then=then,
        )  # fmt: skip

    def _conv_backward(
        self,
        first: int,
        outer: Incoming,
        x: Tensor,
        norm: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: ConvOptions | None,
        *,
        accumulate: bool,
        dx: Tensor,
        dnorm: Tensor,
        then: Correction | None,
    ) -> None:
        dweight = self._empty(first + 2)
        dbias = None if bias is None else self._empty(first + 3)
        if options is None:
            self.operators.norm_relu_conv3x3_backward(
                outer.dy, outer.y, outer.correction, x, norm, weight, accumulate, dx, dweight,
                dnorm, *(then or ()),
            )  # fmt: skip
            if dbias is not None:
                outer.sum_over_rows(dbias)
        else:
            fallback.norm_relu_conv_backward(
                outer.dy, outer.y, outer.correction, x, norm, weight, options, accumulate, dx,
                dweight, dbias, dnorm,
            )  # fmt: skip
            if then is not None:
                self.operators.norm_correction(dnorm, norm, then.rows, accumulate, then.table)
        self._keep(first, dnorm, dweight, dbias)

    def _empty(self, offset: int) -> Tensor | None:
        """For the gradient of a parameter, where it is wanted, in the parameter's layout, in which
        autograd takes it as it is."""
        parameter = self.parameters[offset]
        if parameter is None or not self.wanted[offset]:
            return None
        return empty_gradient(parameter, self.acc)

    def _keep(
        self, first: int, dnorm: Tensor, dweight: Tensor | None, dbias: Tensor | None
    ) -> None:
        self.gradients[first : first + 4] = dnorm[0], dnorm[1], dweight, dbias

    def parameter_gradients(self) -> list[Tensor | None]:
        """In the order and the dtypes of the parameters; None where none is wanted."""
        return [
            None
            if parameter is None or not need or gradient is None
            else gradient.to(parameter.dtype)
            for parameter, need, gradient in zip(
                self.parameters, self.wanted, self.gradients, strict=True
            )
        ]


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The tensor in a dtype, contiguous."""
    if tensor is None:
        return None
    if tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def empty_gradient(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised, with the shape and layout of a parameter: its own where it is dense."""
    like = parameter.detach()
    if not is_dense(like):
        return torch.empty(like.shape, dtype=dtype, device=like.device)
    return torch.empty_strided(like.shape, like.stride(), dtype=dtype, device=like.device)
