"""A device without memory that the modules take for a GPU: everything the host does in a step, and
no arithmetic.

Whatever would make the host wait for a GPU (a value read, a copy to or from the host, a size that
depends on values) or would be the same at every replay of a CUDA graph (a random number drawn on
the host) shows up as an operator on a tensor of the host's, and is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from densenet_efficient.core import eager, gradients, layout
from densenet_efficient.ops import compiled, dispatch

DEVICE = torch.device("meta")


class HostTouched(AssertionError):
    """An operator read, wrote or drew something on the host."""


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "densenet_efficient_calls":
            return result  # of a program, which the host keeps, and which was recorded under watch
        leaves = tree_leaves((args, kwargs, result))
        if any(isinstance(leaf, Tensor) and leaf.device != DEVICE for leaf in leaves):
            raise HostTouched(str(func))
        return result


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of `DEVICE` run on the compiled operators, which do nothing there."""
    kernels = dispatch.Dispatch("kernels", "pretended", compiled)
    row_length = layout.row_length
    gradients.sole_counts()  # once a process, and on the host
    monkeypatch.setattr(eager, "is_ordinary", lambda x: isinstance(x, Tensor))
    monkeypatch.setattr(eager, "unusual_mode", lambda: None)
    monkeypatch.setattr(dispatch, "_choose", lambda *_: kernels)
    monkeypatch.setattr(dispatch, "stem_convolution", lambda *_: kernels)
    monkeypatch.setattr(
        layout, "row_length", lambda c, dtype, _: row_length(c, dtype, torch.device("cuda"))
    )
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # has no such device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


@contextmanager
def no_host() -> Iterator[None]:
    """HostTouched where an operator of the block touches a tensor of the host's."""
    with _Watch():
        yield
