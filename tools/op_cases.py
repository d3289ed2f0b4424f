"""One call of each operator, by shape: arguments, the reference's results and eager PyTorch's.

Activations are channel slices of wider buffers whose other channels hold NaN, as features that are
not written yet do; outputs hold NaN as well. Everything is reproducible from torch's seed. Used by
the tests of every backend, by the emulation and by the benchmarks.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
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
        """Fails if anything outside the slices was written."""
        for whole, part in self.buffers:
            copy = whole.clone()
            first = (part.data_ptr() - whole.data_ptr()) // whole.element_size()
            copy[..., first : first + part.shape[-1]] = math.nan
            if not copy.isnan().all():
                raise AssertionError(f"{self.op} wrote outside a slice")


@dataclass
class _Maker:
    """Makes a case's tensors; see `make`."""

    dtype: torch.dtype
    before: int
    table_margin: int
    widths: Mapping[str, int]
    device: torch.device
    buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def wide(self) -> torch.dtype:
        return reference.wide_dtype(self.dtype)

    def draw(self, *shape: int) -> Tensor:
        """Normal values, with all the digits that the case's dtype may hold."""
        return torch.randn(shape, dtype=self.wide, device=self.device)

    def slice(self, dtype: torch.dtype, shape: tuple[int, ...], before: int, width: int) -> Tensor:
        """`shape`, `before` channels into a buffer of `width` channels, everything NaN."""
        whole = torch.full((*shape[:-1], width), math.nan, dtype=dtype, device=self.device)
        part = whole[..., before : before + shape[-1]]
        self.buffers.append((whole, part))
        return part

    def empty(self, name: str, *shape: int) -> Tensor:
        """An activation; rows begin at a sector of 32 bytes unless `widths` says otherwise."""
        channels = self.before + shape[-1]
        width = self.widths.get(name, channels + 16 - channels % 16)
        if width < channels:
            raise ValueError(f"widths: expected at least {channels} for {name}, got {width}")
        return self.slice(self.dtype, shape, self.before, width)

    def random(self, name: str, *shape: int) -> Tensor:
        return self.empty(name, *shape).copy_(self.draw(*shape) * 1.5 + 0.5)

    def weight(self, *shape: int) -> Tensor:
        fan_in = max(1, math.prod(shape[1:]))
        return (self.draw(*shape) / math.sqrt(fan_in)).to(self.dtype)

    def table(self, rows: int, channels: int) -> Tensor:
        """A table of per-channel vectors that the operator fills."""
        margin = self.table_margin
        if margin:
            return self.slice(self.wide, (rows, channels), margin, channels + 2 * margin)
        return self.sums(rows, channels)

    def sums(self, *shape: int) -> Tensor:
        """A weight gradient."""
        return torch.full(shape, math.nan, dtype=self.wide, device=self.device)

    def norm(self, x: Tensor) -> Tensor:
        """A norm with x's own statistics; gamma and beta of both signs."""
        gamma, beta = self.draw(2, x.shape[-1])
        stats = reference.channel_stats(x.flatten(0, -2))
        return reference.norm_fold(stats, gamma, beta, EPS)

    def correction(self, y: Tensor) -> Tensor:
        dnorm = self.draw(2, y.shape[-1])
        return reference.norm_correction(dnorm, self.norm(y), y.numel() // max(1, y.shape[-1]))


Sizes = tuple[int, ...]
Made = tuple[dict[str, Any], tuple[str, ...]]  # arguments by name, and those that are written
Make = Callable[..., Made]


def _channel_stats(m: _Maker, M: int, C: int) -> Made:
    return {"x": m.random("x", M, C), "stats": m.table(2, C)}, ("stats",)


def _norm_fold(m: _Maker, C: int) -> Made:
    stats = torch.stack([m.draw(C), m.draw(C).abs()])
    gamma, beta = m.draw(2, C)
    arguments = {"stats": stats, "gamma": gamma, "beta": beta, "eps": EPS, "norm": m.table(5, C)}
    return arguments, ("norm",)


def _norm_correction(m: _Maker, C: int) -> Made:
    arguments = {
        "dnorm": m.draw(2, C),
        "norm": m.draw(5, C),
        "count": 49,
        "accumulate": False,
        "correction": m.table(4, C),
    }
    return arguments, ("correction",)


def _norm_correction_apply(m: _Maker, M: int, C: int) -> Made:
    x = m.random("x", M, C)
    return {"dx": m.random("dx", M, C), "x": x, "correction": m.correction(x)}, ("dx",)


def _conv1x1_forward(m: _Maker, M: int, C: int, K: int) -> Made:
    x = m.random("x", M, C)
    arguments = {"x": x, "norm": m.norm(x), "weight": m.weight(K, C), "y": m.empty("y", M, K)}
    return arguments | {"stats": m.table(2, K)}, ("y", "stats")


def _conv1x1_backward(m: _Maker, M: int, C: int, K: int) -> Made:
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


def _conv3x3_forward(m: _Maker, image: Sizes, C: int, K: int) -> Made:
    x = m.random("x", *image, C)
    arguments = {"x": x, "norm": m.norm(x), "weight": m.weight(K, C, *(3 for _ in image[1:]))}
    return arguments | {"y": m.empty("y", *image, K), "stats": m.table(2, K)}, ("y", "stats")


def _conv3x3_backward(m: _Maker, image: Sizes, C: int, K: int) -> Made:
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


def _transition_forward(m: _Maker, image: Sizes, C: int, K: int) -> Made:
    x = m.random("x", *image, C)
    y = m.empty("y", *_halved(image), K)
    arguments = {"x": x, "norm": m.norm(x), "weight": m.weight(K, C), "y": y}
    return arguments | {"stats": m.table(2, K)}, ("y", "stats")


def _transition_backward(m: _Maker, image: Sizes, C: int, K: int) -> Made:
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


def _stem_forward(m: _Maker, image: Sizes, C: int) -> Made:
    x = m.random("x", *image, C)
    arguments = {"x": x, "norm": m.norm(x), "y": m.empty("y", *_halved(image, 1), C)}
    return arguments | {"stats": m.table(2, C)}, ("y", "stats")


def _stem_backward(m: _Maker, image: Sizes, C: int) -> Made:
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
    maker = _Maker(dtype, before, table_margin, widths or {}, torch.device(device))
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
