"""The block's gradient buffer, and whether it may be the incoming gradient itself.

The buffer starts as the gradient of the block's output. Where nobody else can see that tensor, the
block accumulates into it in place and saves a copy of the largest buffer of the backward pass;
everywhere else it copies. Somebody who holds the gradient (a hook that keeps it,
``retain_grad``, a caller of ``autograd.grad``, another branch of the graph) shows up in one of
three reference counts: of the Python object, of the tensor, of its storage. What the counts are
when nobody does is not assumed but measured once, on a graph of two nodes, through the same calls.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor

from . import layout


def _counts(gradients: list[Tensor]) -> tuple[int, int, int]:
    """Reference counts of the only element of ``gradients``, which must be its only Python name."""
    storage = gradients[0].untyped_storage()
    return (
        sys.getrefcount(gradients[0]),
        gradients[0]._use_count(),  # type: ignore[attr-defined]
        torch._C._storage_Use_Count(storage._cdata),
    )


class _Probe(torch.autograd.Function):
    """Identity whose backward records the counts of a gradient that it alone can see."""

    measured: tuple[int, int, int] | None = None

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        held = list(gradients)
        del gradients
        _Probe.measured = _counts(held)
        return held[0]


class _Source(torch.autograd.Function):
    """Sends a fresh gradient to its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.ones(gradients[0].shape, device="cpu")


@functools.cache
def sole_counts() -> tuple[int, int, int]:
    """The counts of a gradient nobody else holds; call it once before the first backward."""
    with torch.enable_grad():
        x = torch.zeros(2, device="cpu", requires_grad=True)
        _Source.apply(_Probe.apply(x)).backward(torch.ones(2, device="cpu"))
    assert _Probe.measured is not None
    return _Probe.measured


def is_sole_owner(gradients: list[Tensor]) -> bool:
    """Whether the one gradient in ``gradients`` is seen by the calling backward pass alone.

    The list must hold the only reference the caller keeps (``held = list(gradients)`` after
    ``def backward(ctx, *gradients)``, then ``del gradients``). May answer no for a gradient that is
    in fact exclusive, never yes for one that is shared.
    """
    return all(now <= sole for now, sole in zip(_counts(gradients), sole_counts(), strict=True))


def gradient_buffer(held: list[Tensor]) -> Tensor:
    """E ``[N, *spatial, C]`` from the incoming gradient ``[N, C, *spatial]``: the only element of
    ``held``, taken over in place where its layout and its ownership allow, copied otherwise."""
    if _is_buffer(held[0].movedim(1, -1)) and is_sole_owner(held):
        return held[0].movedim(1, -1)
    n, channels, *spatial = held[0].shape
    e = layout.empty((n, *spatial), channels, held[0].dtype, held[0].device).movedim(1, -1)
    return e.copy_(held[0].movedim(1, -1))


def _is_buffer(x: Tensor) -> bool:
    """Whether x [N, *spatial, C] lies in memory as a new buffer of ours would."""
    return layout.row_stride(x) == layout.row_length(x.shape[-1], x.dtype, x.device) and not (
        x.is_neg() or torch._C._is_cow_tensor(x)  # type: ignore[attr-defined]
    )
