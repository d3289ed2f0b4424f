"""Calls of the convolutions that also fold the norm that follows them, or make the correction of
their own: the same bits as by `norm_fold` and `norm_correction`, whatever runs the operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from densenet_efficient.ops.interface import NORM_ROWS
from tools.op_cases import make

Call = Callable[..., Any]


class Forward(NamedTuple):
    """first: the column of the statistics in those of all channels that the norm reads."""

    op: str
    sizes: tuple[int, ...]
    channels: int
    first: int
    affine: bool = True


class Backward(NamedTuple):
    """more: columns of the correction that are not the call's."""

    op: str
    sizes: tuple[int, ...]
    rows: int
    accumulate: bool
    more: int = 0


ROWS, IMAGES = (70, 20, 24), (2, 5, 6, 24, 12)
FORWARD = [
    Forward("norm_relu_conv1x1_forward", ROWS, 24, 0),
    Forward("norm_relu_conv1x1_forward", ROWS, 24, 0, affine=False),
    Forward("norm_relu_conv3x3_forward", IMAGES, 55, 43),
    Forward("norm_relu_conv3x3_forward", IMAGES, 55, 0),  # new channels in front
    Forward("norm_relu_conv3x3_forward", IMAGES, 1200, 600),
]
BACKWARD = [
    Backward("norm_relu_conv1x1_backward", ROWS, 70, True, more=9),
    Backward("norm_relu_conv1x1_backward", (40, 20, 250), 70, True),  # several calls of a kernel
    Backward("norm_relu_conv3x3_backward", IMAGES, 60, False),
    Backward("norm_relu_conv3x3_backward", IMAGES, 0, False),
    Backward("norm_relu_conv3x3_backward", IMAGES, 60, True, more=9),
]


def _next(case: Forward, wide: torch.dtype) -> dict[str, Any]:
    table = torch.stack([torch.randn(case.channels), torch.rand(case.channels) + 0.1]).to(wide)
    outputs = case.sizes[-1]
    affine = torch.randn(2, case.channels, dtype=wide) if case.affine else (None, None)
    return {
        "stats": table[:, case.first : case.first + outputs],
        "next_stats": table,
        "next_gamma": affine[0],
        "next_beta": affine[1],
        "next_eps": 1e-3,
        "next_norm": torch.full((NORM_ROWS, case.channels), torch.nan, dtype=wide),
    }


def check_forward(call: Call, case: Forward, dtype: torch.dtype) -> None:
    """The output, the statistics and the norm, in one call and in two."""
    torch.manual_seed(0)
    made = make(case.op, case.sizes, dtype)
    following = _next(case, made.arguments["stats"].dtype)
    alone = {**made.arguments, "y": made.arguments["y"].clone()}
    call(case.op, *(made.arguments | following).values())
    call(case.op, *alone.values())
    assert torch.equal(made.arguments["y"], alone["y"])
    assert torch.equal(following["stats"], alone["stats"])
    expected = torch.full_like(following["next_norm"], torch.nan)
    names = ("next_stats", "next_gamma", "next_beta", "next_eps")
    call("norm_fold", *(following[name] for name in names), expected)
    assert expected.isfinite().all() and torch.equal(following["next_norm"], expected)


def check_backward(call: Call, case: Backward, dtype: torch.dtype) -> None:
    """The gradients and the correction, in one call and in two."""
    torch.manual_seed(0)
    made = make(case.op, case.sizes, dtype)
    if case.op == "norm_relu_conv3x3_backward":
        made.arguments["accumulate"] = case.accumulate
    alone = {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in made.arguments.items()
    }
    channels = made.arguments["x"].shape[-1]
    shape = 4, channels + case.more
    correction = torch.randn(shape, dtype=made.arguments["norm"].dtype)
    expected = correction.clone()
    call(case.op, *made.arguments.values(), case.rows, correction)
    call(case.op, *alone.values())
    for name in made.written:
        assert torch.equal(made.arguments[name], alone[name]), name
    dnorm, norm = alone["dnorm"], alone["norm"]
    call("norm_correction", dnorm, norm, case.rows, case.accumulate, expected)
    assert torch.equal(correction, expected)


WRONG: list[dict[str, Any]] = [
    {"next_stats": None, "message": "next_norm needs stats and next_stats"},
    {"stats": None, "message": "next_norm needs stats and next_stats"},
    {"stats": torch.zeros(2, 24), "message": "stats must be columns of next_stats"},
    {"next_norm": torch.zeros(NORM_ROWS, 23), "message": "next_norm must have shape"},
    {"next_gamma": torch.zeros(23), "message": r"next_gamma must have shape \[24\]"},
    {"next_stats": torch.zeros(3, 24), "message": r"next_stats must have shape \[2, 24\]"},
]


def check_refused(call: Call, change: dict[str, Any]) -> None:
    """Nothing is written."""
    case = FORWARD[0]
    made = make(case.op, case.sizes, torch.float32)
    change = dict(change)
    message = change.pop("message")
    arguments = made.arguments | _next(case, torch.float32) | change
    with pytest.raises(RuntimeError, match=f"{case.op}: {message}"):
        call(case.op, *arguments.values())
    assert arguments["y"].isnan().all()
