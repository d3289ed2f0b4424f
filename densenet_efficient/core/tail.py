"""A layer whose second stage is not a convolution but a function of somebody else's.

    b = relu(norm1 F[:C_l]) W1^T      new = tail(relu(norm2 b), its parameters)

The tail is differentiable PyTorch code without state. Forward runs it without a graph, backward
runs it again and differentiates it, so that nothing of it is kept: what a checkpoint would do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import fallback
from .dense_layer import Correction, DenseLayerCall, Incoming, cast
from .folds import Fold
from .specs import BlockSpec, Tail
from .weights import Weights


class TailLayerCall(DenseLayerCall):
    """One layer of a call, with a tail."""

    def __init__(
        self,
        spec: BlockSpec,
        index: int,
        parameters: Sequence[Tensor | None],
        weights: Weights,
        dtype: torch.dtype,
        wanted: Sequence[bool] = (),
    ) -> None:
        super().__init__(spec, index, parameters, weights, dtype, wanted)
        own = spec.tail_parameters(index)
        self.given, self.wanted_of_tail = parameters[own], wanted[own]
        self.tensors = [cast(parameter, dtype) for parameter in self.given]

    @property
    def tail(self) -> Tail:
        """The layer's tail."""
        assert self.spec.tail is not None
        return self.spec.tail

    def conv2_forward(
        self, b: Tensor, norm: Tensor, y: Tensor, stats: Tensor | None, then: Fold | None
    ) -> None:
        """The new features from b; then: as in `DenseLayerCall`."""
        z = fallback.normalise(b, norm).relu_().to(b.dtype)
        y.copy_(self.tail.call(z.movedim(-1, 1), self.tensors).movedim(1, -1))
        self._take_stats(y, stats, then)

    def conv2_backward(
        self, outer: Incoming, b: Tensor, norm: Tensor, dz: Tensor, dnorm: Tensor, then: Correction
    ) -> None:
        """dz2; dnorm, the gradients of the tail's parameters, and norm2's correction."""
        dy = outer.apply_correction(self.operators).dy
        before_relu = fallback.normalise(b, norm)
        with torch.enable_grad():
            z = before_relu.relu().to(b.dtype).movedim(-1, 1).detach().requires_grad_()
            tensors = [
                None if parameter is None else parameter.detach().requires_grad_(need)
                for parameter, need in zip(self.tensors, self.wanted_of_tail, strict=True)
            ]
            y = self.tail.call(z, tensors)
            sought = [t for t in tensors if t is not None and t.requires_grad]
            dh, *found = torch.autograd.grad(y, [z, *sought], dy.movedim(-1, 1), allow_unused=True)
        masked = fallback.masked(dh.movedim(1, -1), before_relu)
        dnorm.copy_(fallback.norm_sums(masked, b, norm))
        dz.copy_(masked)
        self.operators.norm_correction(dnorm, norm, then.rows, False, then.table)
        self._keep(4, dnorm, None, None)
        gradients = iter(found)
        self.tail_gradients = [
            cast(next(gradients), parameter.dtype) if need and parameter is not None else None
            for parameter, need in zip(self.given, self.wanted_of_tail, strict=True)
        ]


def layer_call(
    spec: BlockSpec,
    index: int,
    parameters: Sequence[Tensor | None],
    weights: Weights,
    dtype: torch.dtype,
    wanted: Sequence[bool] = (),
) -> DenseLayerCall:
    """The layer of a call, by what it is."""
    kind = DenseLayerCall if spec.layers[index].tail is None else TailLayerCall
    return kind(spec, index, parameters, weights, dtype, wanted)
