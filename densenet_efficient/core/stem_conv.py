"""The stem's convolution, 7x7 with stride 2, as autograd sees it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.dtypes import accumulation_dtype
from ..ops.interface import Operators
from ..ops.stem_conv import PADDING, STRIDE
from . import arena, differentiable, eager, layout


class StemConvCall(NamedTuple):
    """The arguments of `StemConvFunction`, by which a backward pass can make its result again."""

    operators: Operators
    dtype: torch.dtype
    x: Tensor
    weight: Tensor

    def output_row(self) -> arena.Buffer:
        """y as a row of a memory table: ``[N, ceil(H/2), ceil(W/2), K]``, dense."""
        image = (-(-size // STRIDE) for size in self.x.shape[2:])
        shape = (self.x.shape[0], *image, self.weight.shape[0])
        return arena.Buffer("convolution", shape, self.dtype, "scratch")

    @contextmanager
    def again(self) -> Iterator[Tensor]:
        """y ``[N, ceil(H/2), ceil(W/2), K]``, bit by bit as before, in the scratch that blocks
        share, until the context ends."""
        row = self.output_row()
        with arena.lease([row], self.x.device) as scratch:
            y = scratch[row.name]
            self.operators.stem_conv_forward(self.x.movedim(1, -1), self.weight, y)
            yield y


class StemConvFunction(torch.autograd.Function):
    """(operators, dtype, x, weight) -> y ``[N, K, ceil(H/2), ceil(W/2)]`` in the dtype.

    x ``[N, C, H, W]``, which gets no gradient, and weight ``[K, C, 7, 7]`` lie in any layout, and
    are in the dtype or in float32: they are rounded where they are read, and no copy is kept. The
    weight's gradient is summed in float32 and rounded once, to the weight's own dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, operators: Operators, dtype: torch.dtype, x: Tensor, weight: Tensor
    ) -> Tensor:
        """See `Operators.stem_conv_forward`."""
        *image, outputs = StemConvCall(operators, dtype, x, weight).output_row().shape
        y = layout.empty(tuple(image), outputs, dtype, x.device, length=outputs)
        operators.stem_conv_forward(x.movedim(1, -1), weight, y.movedim(1, -1))
        ctx.operators, ctx.dtype = operators, dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[None, None, None, Tensor | None]:
        """See `Operators.stem_conv_backward_weight`."""
        if dy is None:
            return None, None, None, None
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled() or not eager.is_ordinary(dy) or eager.is_transformed():
            x = x.to(ctx.dtype)
            (dweight,) = differentiable.gradients(
                lambda weight: F.conv2d(x, weight.to(x.dtype), stride=STRIDE, padding=PADDING),
                (weight,),
                dy,
            )
            return None, None, None, dweight
        dweight = torch.empty_like(weight, dtype=accumulation_dtype(ctx.dtype))
        ctx.operators.stem_conv_backward_weight(layout.channels_last(dy), x.movedim(1, -1), dweight)
        return None, None, None, dweight.to(weight.dtype)
