"""Calls of the operators that their checks refuse, and how: one list for every launcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

X, NORM, W1, W3 = (10, 6), (5, 6), (5, 6), (5, 6, 3, 3)

BUFFER, TABLES = torch.zeros(10, 16), torch.zeros(5, 40)

# (operator, arguments, message)
BAD_CALLS: list[tuple[str, tuple, str]] = [
    ("channel_stats", (torch.zeros(6), torch.zeros(2, 6)), "x must have 2 dimensions"),
    ("channel_stats", (torch.zeros(X), torch.zeros(2, 5)), r"stats must have shape \[2, 6\]"),
    (
        "channel_stats",
        (torch.zeros(X), torch.zeros(2, 6, dtype=torch.float64)),
        "stats must be float32, got float64",
    ),
    (
        "channel_stats",
        (torch.zeros(6, 10).t(), torch.zeros(2, 6)),
        "x must be channels last",
    ),
    (
        "channel_stats",
        (torch.zeros(X, dtype=torch.int32), torch.zeros(2, 6)),
        "x must be float64, float32, bfloat16 or float16",
    ),
    (
        "norm_fold",
        (torch.zeros(2, 6), torch.zeros(5), None, 1e-5, torch.zeros(NORM)),
        r"gamma must have shape \[6\]",
    ),
    (
        "norm_correction",
        (torch.zeros(2, 6), torch.zeros(NORM), 3, True, torch.zeros(4, 5)),
        "correction must have at least 6 columns, got 5",
    ),
    (
        "norm_relu_conv1x1_forward",
        (torch.zeros(X), torch.zeros(NORM), torch.zeros(5, 7), torch.zeros(10, 5), None),
        r"weight must have shape \[5, 6\], got \[5, 7\]",
    ),
    (
        "norm_relu_conv1x1_forward",
        (
            torch.zeros(X, dtype=torch.bfloat16),
            torch.zeros(NORM),
            torch.zeros(W1),
            torch.zeros(10, 5, dtype=torch.bfloat16),
            None,
        ),
        "weight must be bfloat16, got float32",
    ),
    (
        "norm_relu_conv3x3_backward",
        (
            torch.zeros(1, 2, 2, 5),
            torch.zeros(1, 2, 2, 5),
            None,
            torch.zeros(1, 2, 2, 6),
            torch.zeros(NORM),
            torch.zeros(W3),
            False,
            torch.zeros(1, 2, 2, 6),
            None,
            torch.zeros(2, 6),
        ),
        "y and correction must be given together",
    ),
    (
        "norm_relu_conv3x3_backward",
        (
            torch.zeros(1, 2, 2, 5),
            None,
            None,
            torch.zeros(1, 2, 2, 6),
            torch.zeros(NORM),
            torch.zeros(W3),
            False,
            torch.zeros(1, 2, 2, 6),
            torch.zeros(5, 6, 3, 3).transpose(2, 3),
            torch.zeros(2, 6),
        ),
        "dweight must be contiguous or channels last",
    ),
    (
        "stem_forward",
        (torch.zeros(X), torch.zeros(NORM), torch.zeros(X), None),
        "x must have 3, 4 or 5 dimensions",
    ),
    (
        "transition_forward",
        (
            torch.zeros(1, 5, 5, 6),
            torch.zeros(NORM),
            torch.zeros(W1),
            torch.zeros(1, 3, 3, 5),
            None,
        ),
        r"y must have shape \[1, 2, 2, 5\]",
    ),
    (
        "stem_backward",
        (
            torch.zeros(1, 3, 3, 6),
            torch.zeros(1, 5, 5, 6),
            torch.zeros(NORM),
            -1,
            torch.zeros(1, 5, 5, 6),
            torch.zeros(2, 6),
        ),
        "count must not be negative",
    ),
    ("channel_stats", (torch.zeros(5, 0), torch.zeros(2, 0)), "x must have at least one channel"),
    (
        "norm_relu_conv1x1_forward",
        (torch.zeros(X), torch.zeros(NORM), torch.zeros(0, 6), torch.zeros(10, 0), None),
        "weight must have at least one output",
    ),
    ("channel_stats", (None, torch.zeros(2, 6)), "x must be a tensor, got None"),
    ("channel_stats", (torch.zeros(X), None), "stats must be a tensor, got None"),
    *(  # y begins among the last channels of x; then it begins in front of x
        (
            "norm_relu_conv1x1_forward",
            (
                BUFFER[:, first : first + 6],
                torch.zeros(NORM),
                torch.zeros(W1),
                BUFFER[:, second : second + 5],
                None,
            ),
            "y is written and must not share memory with x",
        )
        for first, second in ((0, 5), (4, 0))
    ),
    (
        "norm_relu_conv1x1_backward",
        (
            torch.zeros(10, 5),
            torch.zeros(10, 5),
            torch.zeros(4, 5),
            BUFFER[:, :6],
            torch.zeros(NORM),
            torch.zeros(W1),
            BUFFER[:, 6:12],
            TABLES[0, :30].view(5, 6),
            TABLES[:2, 24:30],
        ),
        "dweight is written and must not share memory with dnorm",
    ),
    (
        "norm_correction_apply",
        (BUFFER[:, :6], BUFFER[:, :6], torch.zeros(4, 6)),
        "dx is written and must not share memory with x",
    ),
]


def assert_refused(call: Callable[..., Any], name: str, arguments: tuple, message: str) -> None:
    """call(name, *arguments) raises an error that names the operator, and writes nothing."""
    before = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    with pytest.raises(RuntimeError, match=f"{name}: {message}"):
        call(name, *arguments)
    for argument, copy in zip(arguments, before, strict=True):
        if isinstance(argument, Tensor):
            assert torch.equal(argument, copy)
