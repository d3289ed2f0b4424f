"""One call of each operator, by shape: arguments, the reference's results and eager PyTorch's.

Activations are channel slices of wider buffers whose other channels hold NaN, as features that are
not written yet do; outputs hold NaN as well. Everything is reproducible from torch's seed. Used by
the tests of every backend, by the emulation and by the benchmarks.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from densenet_efficient import reference
from densenet_efficient.ops.interface import CUDA_NAMES

from . import eager_operators
from .op_tensors import EPS, Case, Maker

Sizes = tuple[int, ...]
Made = tuple[dict[str, Any], tuple[str, ...]]  # arguments by name, and those that are written
Make = Callable[..., Made]


def _channel_stats(m: Maker, M: int, C: int) -> Made:
    return {"x": m.random("x", M, C), "stats": m.table(2, C)}, ("stats",)


def _norm_fold(m: Maker, C: int) -> Made:
    stats = torch.stack([m.draw(C), m.draw(C).abs()])
    gamma, beta = m.draw(2, C)
    arguments = {"stats": stats, "gamma": gamma, "beta": beta, "eps": EPS, "norm": m.table(5, C)}
    return arguments, ("norm",)


def _norm_correction(m: Maker, C: int) -> Made:
    arguments = {
        "dnorm": m.draw(2, C),
        "norm": m.draw(5, C),
        "count": 49,
        "accumulate": False,
        "correction": m.table(4, C),
    }
    return arguments, ("correction",)


def _norm_correction_apply(m: Maker, M: int, C: int) -> Made:
    x = m.random("x", M, C)
    return {"dx": m.random("dx", M, C), "x": x, "correction": m.correction(x)}, ("dx",)


def _conv1x1_forward(m: Maker, M: int, C: int, K: int) -> Made:
    x = m.random("x", M, C)
    arguments = {"x": x, "norm": m.norm(x), "weight": m.weight(K, C), "y": m.empty("y", M, K)}
    return arguments | {"stats": m.table(2, K)}, ("y", "stats")


def _conv1x1_backward(m: Maker, M: int, C: int, K: int) -> Made:
    x, y = m.random("x", M, C), m.random("y", M, K)
    arguments = {
        "dz_y": m.random("dz_y", M, K),
        "y": y,
        "correction": m.correction(y),
        "x": x,
        "norm": m.norm(x),
        "weight": m.weight(K, C),
        "dx": m.random("dx", M, C),
        "dweight": m.sums(K, C),
        "dnorm": m.table(2, C),
    }
    return arguments, ("dx", "dweight", "dnorm")


def _halved(image: Sizes, up: int = 0) -> list[int]:
    """(N, *spatial) as a pooling by 2 leaves it, whose windows may stick out by `up` pixels."""
    return [image[0], *((size + up) // 2 for size in image[1:])]


def _conv3x3_forward(m: Maker, image: Sizes, C: int, K: int) -> Made:
    x = m.random("x", *image, C)
    arguments = {"x": x, "norm": m.norm(x), "weight": m.weight(K, C, *(3 for _ in image[1:]))}
    return arguments | {"y": m.empty("y", *image, K), "stats": m.table(2, K)}, ("y", "stats")


def _conv3x3_backward(m: Maker, image: Sizes, C: int, K: int) -> Made:
    x, y = m.random("x", *image, C), m.random("y", *image, K)
    arguments = {
        "dy": m.random("dy", *image, K),
        "y": y,
        "correction": m.correction(y),
        "x": x,
        "norm": m.norm(x),
        "weight": m.weight(K, C, *(3 for _ in image[1:])),
        "accumulate": False,
        "dx": m.random("dx", *image, C),
        "dweight": m.sums(K, C, *(3 for _ in image[1:])),
        "dnorm": m.table(2, C),
    }
    return arguments, ("dx", "dweight", "dnorm")


def _transition_forward(m: Maker, image: Sizes, C: int, K: int) -> Made:
    x = m.random("x", *image, C)
    y = m.empty("y", *_halved(image), K)
    arguments = {"x": x, "norm": m.norm(x), "weight": m.weight(K, C), "y": y}
    return arguments | {"stats": m.table(2, K)}, ("y", "stats")


def _transition_backward(m: Maker, image: Sizes, C: int, K: int) -> Made:
    x = m.random("x", *image, C)
    arguments = {
        "dy": m.random("dy", *_halved(image), K),
        "x": x,
        "norm": m.norm(x),
        "weight": m.weight(K, C),
        "count": math.prod(image),
        "dx": m.empty("dx", *image, C),
        "dweight": m.sums(K, C),
        "dnorm": m.table(2, C),
    }
    return arguments, ("dx", "dweight", "dnorm")


def _stem_forward(m: Maker, image: Sizes, C: int) -> Made:
    x = m.random("x", *image, C)
    arguments = {"x": x, "norm": m.norm(x), "y": m.empty("y", *_halved(image, 1), C)}
    return arguments | {"stats": m.table(2, C)}, ("y", "stats")


def _stem_backward(m: Maker, image: Sizes, C: int) -> Made:
    x = m.random("x", *image, C)
    arguments = {
        "dy": m.random("dy", *_halved(image, 1), C),
        "x": x,
        "norm": m.norm(x),
        "count": math.prod(image),
        "dx": m.empty("dx", *image, C),
        "dnorm": m.table(2, C),
    }
    return arguments, ("dx", "dnorm")


def _stem_conv_forward(m: Maker, image: Sizes, C: int, K: int) -> Made:
    arguments = {"x": m.random("x", *image, C), "weight": m.weight(K, C, 7, 7)}
    return arguments | {"y": m.empty("y", *_halved(image, 1), K)}, ("y",)


def _stem_conv_backward_weight(m: Maker, image: Sizes, C: int, K: int) -> Made:
    arguments = {"dy": m.random("dy", *_halved(image, 1), K), "x": m.random("x", *image, C)}
    return arguments | {"dweight": m.sums(K, C, 7, 7)}, ("dweight",)


_MAKERS: dict[str, Make] = {
    "channel_stats": _channel_stats,
    "norm_fold": _norm_fold,
    "norm_correction": _norm_correction,
    "norm_correction_apply": _norm_correction_apply,
    "norm_relu_conv1x1_forward": _conv1x1_forward,
    "norm_relu_conv1x1_backward": _conv1x1_backward,
    "norm_relu_conv3x3_forward": _conv3x3_forward,
    "norm_relu_conv3x3_backward": _conv3x3_backward,
    "transition_forward": _transition_forward,
    "transition_backward": _transition_backward,
    "stem_forward": _stem_forward,
    "stem_backward": _stem_backward,
    "stem_conv_forward": _stem_conv_forward,
    "stem_conv_backward_weight": _stem_conv_backward_weight,
}
OPERATORS = tuple(name for name in _MAKERS if name not in CUDA_NAMES)
CUDA_OPERATORS = tuple(_MAKERS)


def dimensions(op: str) -> tuple[str, ...]:
    """The names of an operator's sizes, such as ("M", "C", "K"). An image may have one or three
    spatial dimensions, too: (N, W, ...) or (N, D, H, W, ...)."""
    names = tuple(inspect.signature(_MAKERS[op]).parameters)[1:]
    return ("N", "H", "W", *names[1:]) if names[0] == "image" else names


def _makers_sizes(op: str, sizes: Sizes) -> tuple[Any, ...]:
    names = tuple(inspect.signature(_MAKERS[op]).parameters)[1:]
    if names[0] != "image":
        return sizes if len(sizes) == len(names) else ()
    channels = len(names) - 1
    return (sizes[:-channels], *sizes[-channels:]) if 2 <= len(sizes) - channels <= 4 else ()


def kernel_file(op: str) -> str:
    """The kernel file of an operator, without its ending."""
    return "norm_correction" if op == "norm_correction_apply" else op


def make(
    op: str,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    *,
    before: int = 0,
    table_margin: int = 0,
    widths: Mapping[str, int] | None = None,
    device: torch.device | str = "cpu",
    **changes: Any,
) -> Case:
    """A case of `op`.

    Args:
        sizes: see `dimensions`.
        before: channels in front of every activation's own (12 shifts a slice to 24 bytes).
        table_margin: columns on either side of the tables that the operator fills.
        widths: channels of the buffer of an activation, by its name, where not to the next sector.
        changes: arguments to set otherwise, such as stats=None or accumulate=True.
    """
    own_sizes = _makers_sizes(op, sizes)
    if not own_sizes:
        raise ValueError(f"{op} takes {' '.join(dimensions(op))}, got {len(sizes)} sizes")
    maker = Maker(dtype, before, table_margin, widths or {}, torch.device(device))
    arguments, written = _MAKERS[op](maker, *own_sizes)
    unknown = changes.keys() - arguments.keys()
    if unknown:
        raise ValueError(f"{op} has no argument {', '.join(sorted(unknown))}")
    arguments |= changes
    present = tuple(name for name in written if arguments[name] is not None)
    return Case(op, arguments, present, maker.buffers)


def accumulates(op: str, inputs: Mapping[str, Any]) -> bool:
    """Whether a call adds to dx."""
    return op == "norm_relu_conv1x1_backward" or bool(
        op == "norm_relu_conv3x3_backward" and inputs["accumulate"]
    )


def reference_outputs(
    op: str, inputs: Mapping[str, Any], dtype: torch.dtype | None = torch.float64
) -> dict[str, Tensor]:
    """Every output as the reference computes it from a case's inputs before the call, in float64
    or, with None, in the inputs' own dtype."""
    given = {
        k: v.to(dtype) if isinstance(v, Tensor) and dtype is not None else v
        for k, v in inputs.items()
    }
    function = getattr(reference, op)
    arguments = {k: v for k, v in given.items() if k in inspect.signature(function).parameters}
    result = function(**arguments)
    results = result if isinstance(result, tuple) else (result,)
    names = [
        k for k in inputs if k in ("y", "stats", "norm", "correction", "dx", "dweight", "dnorm")
    ]
    names = [k for k in names if k not in arguments or (op, k) == ("norm_correction_apply", "dx")]
    outputs = dict(zip(names, results, strict=True))
    if accumulates(op, inputs):
        outputs["dx"] = given["dx"] + outputs["dx"]
    return {name: value for name, value in outputs.items() if inputs[name] is not None}


def eager_outputs(op: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Every output as eager PyTorch's own operators make it in the inputs' dtype."""
    return getattr(eager_operators, op)(**inputs)
