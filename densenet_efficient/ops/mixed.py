"""The operators in float64, and in float32 without TF32, on a GPU: compiled ones where they take
these dtypes, the fallback for the convolutions. An implementation of `interface.Operators`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import compiled, fallback

_COMPILED = ("channel_stats", "norm_fold", "norm_correction", "norm_correction_apply")


def __getattr__(name: str) -> Any:
    return getattr(compiled if name in _COMPILED else fallback, name)


def stem_forward(x: Tensor, norm: Tensor, y: Tensor, stats: Tensor | None) -> None:
    """See `interface.Operators.stem_forward`; any number of dimensions."""
    (compiled if x.dim() == 4 else fallback).stem_forward(x, norm, y, stats)


def stem_backward(
    dy: Tensor, x: Tensor, norm: Tensor, count: int, dx: Tensor, dnorm: Tensor
) -> None:
    """See `interface.Operators.stem_backward`; any number of dimensions."""
    (compiled if x.dim() == 4 else fallback).stem_backward(dy, x, norm, count, dx, dnorm)
