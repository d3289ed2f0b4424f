"""One call of each operator, by shape: arguments, exact results, and the framework's own results.

Activations are channel slices of wider buffers whose other channels hold NaN, as features that are
not written yet do; outputs hold NaN as well. Everything is reproducible from torch's seed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from densenet_efficient import reference

from . import eager_operators

EPS = 1e-5


@dataclass
class Case:
    """Arguments in the operator's order, by name; `written` names those that it writes."""

    op: str
    arguments: dict[str, Any]
    written: tuple[str, ...]
    buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # whole, slice

    @property
    def outputs(self) -> dict[str, Tensor]:
        return {name: self.arguments[name] for name in self.written}

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor argument's own elements."""
        tensors = {k: v for k, v in self.arguments.items() if isinstance(v, Tensor)}
        return {name: value.numel() * value.element_size() for name, value in tensors.items()}

    def inputs(self, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Copies of what the operator reads; floating-point tensors as `dtype`, if given."""
        return {
            name: value.to(dtype or value.dtype).clone() if isinstance(value, Tensor) else value
            for name, value in self.arguments.items()
        }

    def check_outside(self) -> None:
        """Fails if anything beside the slices was written."""
        for whole, part in self.buffers:
            copy = whole.clone()
            first = (part.data_ptr() - whole.data_ptr()) // whole.element_size()
            copy[..., first : first + part.shape[-1]] = math.nan
            if not copy.isnan().all():
                raise AssertionError(f"{self.op} wrote beside a slice")


class _Maker:
    """Makes a case's tensors; `before` channels of other features lie in front of activations."""

    def __init__(self, dtype: torch.dtype, before: int) -> None:
        self.dtype, self.before = dtype, before
        self.wide = reference.wide_dtype(dtype)
        self.buffers: list[tuple[Tensor, Tensor]] = []

    def empty(self, *shape: int) -> Tensor:
        channels = shape[-1]
        behind = 16 - (self.before + channels) % 16  # rows begin at a sector of 32 bytes
        whole = torch.full((*shape[:-1], self.before + channels + behind), math.nan)
        whole = whole.to(self.dtype)
        part = whole[..., self.before : self.before + channels]
        self.buffers.append((whole, part))
        return part

    def random(self, *shape: int) -> Tensor:
        return self.empty(*shape).copy_(torch.randn(shape) * 1.5 + 0.5)

    def weight(self, *shape: int) -> Tensor:
        fan_in = max(1, math.prod(shape[1:]))
        return (torch.randn(shape) / math.sqrt(fan_in)).to(self.dtype)

    def table(self, rows: int, channels: int) -> Tensor:
        return torch.full((rows, channels), math.nan, dtype=self.wide)

    def norm(self, x: Tensor) -> Tensor:
        """A norm with x's own statistics; gamma and beta of both signs."""
        channels = x.shape[-1]
        gamma, beta = torch.randn(2, channels).to(self.wide)
        stats = reference.channel_stats(x.flatten(0, -2))
        return reference.norm_fold(stats, gamma, beta, EPS)

    def correction(self, y: Tensor) -> Tensor:
        dnorm = torch.randn(2, y.shape[-1]).to(self.wide)
        return reference.norm_correction(dnorm, self.norm(y), y.numel() // max(1, y.shape[-1]))


Make = Callable[..., tuple[dict[str, Any], tuple[str, ...]]]


def _channel_stats(m: _Maker, M: int, C: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    return {"x": m.random(M, C), "stats": m.table(2, C)}, ("stats",)


def _norm_fold(m: _Maker, C: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    stats = torch.stack([torch.randn(C), torch.rand(C)]).to(m.wide)
    gamma, beta = torch.randn(2, C).to(m.wide)
    arguments = {"stats": stats, "gamma": gamma, "beta": beta, "eps": EPS, "norm": m.table(4, C)}
    return arguments, ("norm",)


def _norm_correction(m: _Maker, C: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    arguments = {
        "dnorm": torch.randn(2, C).to(m.wide),
        "norm": torch.randn(4, C).to(m.wide),
        "count": 49,
        "accumulate": False,
        "correction": m.table(4, C),
    }
    return arguments, ("correction",)


def _norm_correction_apply(m: _Maker, M: int, C: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    x = m.random(M, C)
    return {"dx": m.random(M, C), "x": x, "correction": m.correction(x)}, ("dx",)


def _conv1x1_forward(m: _Maker, M: int, C: int, K: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    x = m.random(M, C)
    arguments = {"x": x, "norm": m.norm(x), "weight": m.weight(K, C), "y": m.empty(M, K)}
    return arguments | {"stats": m.table(2, K)}, ("y", "stats")


def _conv1x1_backward(m: _Maker, M: int, C: int, K: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    x, y = m.random(M, C), m.random(M, K)
    arguments = {
        "dz_y": m.random(M, K),
        "y": y,
        "correction": m.correction(y),
        "x": x,
        "norm": m.norm(x),
        "weight": m.weight(K, C),
        "dx": m.random(M, C),
        "dweight": m.table(K, C),
        "dnorm": m.table(2, C),
    }
    return arguments, ("dx", "dweight", "dnorm")


def _conv3x3_forward(
    m: _Maker, N: int, H: int, W: int, C: int, K: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    x = m.random(N, H, W, C)
    arguments = {"x": x, "norm": m.norm(x), "weight": m.weight(K, C, 3, 3)}
    return arguments | {"y": m.empty(N, H, W, K), "stats": m.table(2, K)}, ("y", "stats")


def _conv3x3_backward(
    m: _Maker, N: int, H: int, W: int, C: int, K: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    x, y = m.random(N, H, W, C), m.random(N, H, W, K)
    arguments = {
        "dy": m.random(N, H, W, K),
        "y": y,
        "correction": m.correction(y),
        "x": x,
        "norm": m.norm(x),
        "weight": m.weight(K, C, 3, 3),
        "accumulate": False,
        "dx": m.random(N, H, W, C),
        "dweight": m.table(K, C * 9).view(K, C, 3, 3),
        "dnorm": m.table(2, C),
    }
    return arguments, ("dx", "dweight", "dnorm")


def _transition_forward(
    m: _Maker, N: int, H: int, W: int, C: int, K: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    x = m.random(N, H, W, C)
    arguments = {"x": x, "norm": m.norm(x), "weight": m.weight(K, C)}
    return arguments | {"y": m.empty(N, H // 2, W // 2, K), "stats": m.table(2, K)}, ("y", "stats")


def _transition_backward(
    m: _Maker, N: int, H: int, W: int, C: int, K: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    x = m.random(N, H, W, C)
    arguments = {
        "dy": m.random(N, H // 2, W // 2, K),
        "x": x,
        "norm": m.norm(x),
        "weight": m.weight(K, C),
        "count": N * H * W,
        "dx": m.empty(N, H, W, C),
        "dweight": m.table(K, C),
        "dnorm": m.table(2, C),
    }
    return arguments, ("dx", "dweight", "dnorm")


def _stem_forward(
    m: _Maker, N: int, H: int, W: int, C: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    x = m.random(N, H, W, C)
    y = m.empty(N, (H + 1) // 2, (W + 1) // 2, C)
    return {"x": x, "norm": m.norm(x), "y": y, "stats": m.table(2, C)}, ("y", "stats")


def _stem_backward(
    m: _Maker, N: int, H: int, W: int, C: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    x = m.random(N, H, W, C)
    arguments = {
        "dy": m.random(N, (H + 1) // 2, (W + 1) // 2, C),
        "x": x,
        "norm": m.norm(x),
        "count": N * H * W,
        "dx": m.empty(N, H, W, C),
        "dnorm": m.table(2, C),
    }
    return arguments, ("dx", "dnorm")


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
}
OPERATORS = tuple(_MAKERS)


def dimensions(op: str) -> tuple[str, ...]:
    """The names of an operator's sizes, such as ("M", "C", "K")."""
    return tuple(inspect.signature(_MAKERS[op]).parameters)[1:]


def stage_of(op: str) -> str:
    """The kernel file of an operator."""
    return "norm_correction" if op == "norm_correction_apply" else op


def make(
    op: str, sizes: tuple[int, ...], dtype: torch.dtype, *, before: int = 0, **changes: Any
) -> Case:
    """A case of `op`. before: channels in front of every activation's own (12 shifts a slice to
    24 bytes); changes: arguments to set otherwise, such as stats=None or accumulate=True."""
    if len(sizes) != len(dimensions(op)):
        raise ValueError(f"{op} takes {' '.join(dimensions(op))}, got {len(sizes)} sizes")
    maker = _Maker(dtype, before)
    arguments, written = _MAKERS[op](maker, *sizes)
    unknown = changes.keys() - arguments.keys()
    if unknown:
        raise ValueError(f"{op} has no argument {', '.join(sorted(unknown))}")
    arguments |= changes
    present = tuple(name for name in written if arguments[name] is not None)
    return Case(op, arguments, present, maker.buffers)


def exact(op: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Every output in float64, from a case's inputs before the call."""
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    function = getattr(reference, op)
    arguments = {k: v for k, v in wide.items() if k in inspect.signature(function).parameters}
    result = function(**arguments)
    results = result if isinstance(result, tuple) else (result,)
    names = [
        k for k in inputs if k in ("y", "stats", "norm", "correction", "dx", "dweight", "dnorm")
    ]
    names = [k for k in names if k not in arguments or (op, k) == ("norm_correction_apply", "dx")]
    outputs = dict(zip(names, results, strict=True))
    adds = op == "norm_relu_conv1x1_backward" or (
        op == "norm_relu_conv3x3_backward" and inputs["accumulate"]
    )
    if adds:
        outputs["dx"] = wide["dx"] + outputs["dx"]
    return {name: value for name, value in outputs.items() if inputs[name] is not None}


def framework_outputs(op: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Every output as the framework's own operators make it in the inputs' dtype."""
    return getattr(eager_operators, op)(**inputs)
