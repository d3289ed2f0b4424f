"""What a kernel's results must agree with: float64, to PyTorch's error on the same input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from densenet_efficient import reference
from densenet_efficient.bench.accuracy import relative_error
from tools.op_cases import eager_outputs, reference_outputs


def floor(value: Tensor) -> float:
    """An error that is nobody's fault: one rounding of what is stored, or, in float32 and float64,
    the order of a sum."""
    eps = torch.finfo(value.dtype).eps
    return eps / 4 if value.element_size() == 2 else 4 * eps


def compare(op: str, inputs: Mapping[str, Any], ours: Mapping[str, Tensor]) -> None:
    """Fails unless every output of one call is finite, at most twice as far from float64 as
    PyTorch's, and all of them together at most 1.2 times. Everything on the CPU."""
    truth = reference_outputs(op, dict(inputs))
    theirs = eager_outputs(op, _copies(inputs))
    if "stats" in ours and "y" in ours:  # of the values as stored
        truth["stats"] = reference.channel_stats(ours["y"].double().flatten(0, -2))
        stats = reference.channel_stats(theirs["y"].double().flatten(0, -2))
        theirs["stats"] = theirs["stats"].double() - stats + truth["stats"]
    own, peer = [], []
    for name, value in ours.items():
        assert value.isfinite().all(), f"{name} is not finite"
        own.append(relative_error(value, truth[name]))
        peer.append(max(relative_error(theirs[name], truth[name]), floor(value)))
        assert own[-1] <= 2 * peer[-1], f"{name}: error {own[-1]:.2e}, framework {peer[-1]:.2e}"
    assert math.hypot(*own) <= 1.2 * math.hypot(*peer)


def _copies(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
