"""Operators of two kinds: compiled ones for what the CUDA kernels take, the fallback for the rest.

In float64, and in float32 without TF32, there are no convolutions; for images of one and three
dimensions no 3x3 convolutions and no pooling. Both are implementations of `interface.Operators`.
"""

from __future__ import annotations

from typing import Any

from . import compiled, fallback

_TABLES = ("channel_stats", "norm_fold", "norm_correction", "norm_correction_apply")
_CONV1X1 = ("norm_relu_conv1x1_forward", "norm_relu_conv1x1_backward")
_STEM = ("stem_forward", "stem_backward")


class Mixed:
    """The operators ``names`` compiled, all others by the fallback."""

    def __init__(self, *names: str) -> None:
        self._names = frozenset(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(compiled if name in self._names else fallback, name)


WITHOUT_CONVOLUTIONS = Mixed(*_TABLES, *_STEM)
OTHER_DIMENSIONS = Mixed(*_TABLES, *_CONV1X1)
OTHER_DIMENSIONS_WITHOUT_CONVOLUTIONS = Mixed(*_TABLES)
