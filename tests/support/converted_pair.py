"""torchvision's network and the same one converted, and that both do the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from densenet_efficient import convert
from densenet_efficient.bench.accuracy import moved_norms
from tests.support.networks import network

Results = dict[str, Tensor]


def converted_pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    """A plain network of two blocks, float64, its norms moved away from 1 and 0, and a converted
    copy of it."""
    plain = network(**{"growth_rate": 8, "num_init_features": 16, **options}).double()
    moved_norms(plain)
    return plain, convert(copy.deepcopy(plain))


def images(count: int = 3, size: int = 32) -> Tensor:
    """A batch, float64."""
    return torch.randn(count, 3, size, size, dtype=torch.float64)


def training_step(
    model: nn.Module, x: Tensor, call: Callable[..., Tensor] | None = None
) -> Results:
    """Output, gradients of input and parameters, and buffers after one forward and backward."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    y = model(x) if call is None else call(model, x)
    y.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "dx": x.grad, **gradients, **dict(model.named_buffers())}


def assert_close(expected: Any, got: Any, tolerance: float = 1e-9) -> None:
    """The same tensors, in whatever they are nested."""
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def assert_same_step(
    plain: nn.Module, ours: nn.Module, x: Tensor, call: Callable[..., Tensor] | None = None
) -> None:
    """One training step of either gives the same."""
    assert_close(training_step(plain, x, call), training_step(ours, x, call))
