"""The operator of the stem's convolution on any device: the fallback's, whose calls are noted; and
small networks that begin with that convolution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densenet_efficient import reference
from densenet_efficient.bench.accuracy import moved_norms
from densenet_efficient.models.densenet import EfficientDenseNet
from densenet_efficient.ops import dispatch, fallback
from densenet_efficient.ops.dispatch import Dispatch

# What a step calls: the result is not kept, but made again.
STEP = ["stem_conv_forward", "stem_conv_forward", "stem_conv_backward_weight"]


class Calls:
    """The operators by the fallback, and which of them were called."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.names.append(name)
        return getattr(fallback, name)


def pretend(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Gives every device and dtype the operator."""
    operators = Calls()
    chosen = Dispatch("kernels", "pretended", operators)
    monkeypatch.setattr(dispatch, "stem_convolution", lambda *_: chosen)
    return operators


def network(**options: Any) -> tuple[EfficientDenseNet, nn.Module]:
    """Ours and PyTorch's, with the same parameters."""
    plain = moved_norms(reference.DenseNet(4, (2, 2), 6, num_classes=3, **options))
    ours = EfficientDenseNet(4, (2, 2), 6, num_classes=3, **options)
    ours.load_state_dict(plain.state_dict())
    return ours, plain


def images(C: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, C, 37, 33, dtype=dtype)
