"""Floating-point operations of the compiled operators, for `torch.utils.flop_counter`.

A multiplication and an addition count as two, as in PyTorch's own formulas. Norms, activations and
pooling count as nothing there and here. A backward operator computes two products of the forward's
size, the gradient of its input and that of its weight, where it is asked for.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula


def _conv1x1_forward(x: Any, norm: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * x[0] * math.prod(weight)


def _conv1x1_backward(
    dz_y: Any, y: Any, correction: Any, x: Any, norm: Any, weight: Any, dx: Any, dweight: Any,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    return 2 * x[0] * math.prod(weight) * (1 if dweight is None else 2)


def _conv3x3_forward(x: Any, norm: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x[:-1]) * math.prod(weight)


def _conv3x3_backward(
    dy: Any, y: Any, correction: Any, x: Any, norm: Any, weight: Any, accumulate: Any, dx: Any,
    dweight: Any, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return 2 * math.prod(x[:-1]) * math.prod(weight) * (1 if dweight is None else 2)


def _transition_forward(x: Any, norm: Any, weight: Any, y: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(y[:-1]) * math.prod(weight)


def _transition_backward(
    dy: Any, x: Any, norm: Any, weight: Any, count: Any, dx: Any, dweight: Any, *_: Any, **__: Any
) -> int:
    return 2 * math.prod(dy[:-1]) * math.prod(weight) * (1 if dweight is None else 2)


def _stem_conv_forward(x: Any, weight: Any, y: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(y[:-1]) * math.prod(weight)


def _stem_conv_backward_weight(dy: Any, x: Any, dweight: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(dy[:-1]) * math.prod(dweight)


_FORMULAS = {
    "norm_relu_conv1x1_forward": _conv1x1_forward,
    "norm_relu_conv1x1_backward": _conv1x1_backward,
    "norm_relu_conv3x3_forward": _conv3x3_forward,
    "norm_relu_conv3x3_backward": _conv3x3_backward,
    "transition_forward": _transition_forward,
    "transition_backward": _transition_backward,
    "stem_conv_forward": _stem_conv_forward,
    "stem_conv_backward_weight": _stem_conv_backward_weight,
}


@functools.cache
def register() -> None:
    """Registers the formulas; the library must be loaded. Later calls do nothing."""
    for name, formula in _FORMULAS.items():
        target = getattr(torch.ops.densenet_efficient, name)
        register_flop_formula(target)(formula)  # type: ignore[arg-type]
