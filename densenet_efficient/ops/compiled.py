"""The compiled operators of ``csrc``, an implementation of `interface.Operators`.

``compiled.channel_stats(x, stats)`` is ``torch.ops.densenet_efficient.channel_stats``; the first
use of any operator loads the library, and raises `library.MissingLibraryError` where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import flops, library
from .interface import CPU_NAMES, CUDA_NAMES, NAMES

RUNNING_UPDATE = "running_update"
"""Of lists of tensors, which ``csrc/running.cpp`` calls: no other implementation offers it."""

_negative_views = torch.library.Library(library.NAMESPACE, "IMPL")


def __getattr__(name: str) -> Callable[..., None]:
    if name not in (*NAMES, *CPU_NAMES, *CUDA_NAMES, RUNNING_UPDATE):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    library.load()
    _register()
    return globals()[name]


def _register() -> None:
    """Binds every operator, with its fake kernel, one for negative views, and its floating-point
    operations."""
    for name in (*NAMES, *CUDA_NAMES):
        operator = getattr(torch.ops.densenet_efficient, name).default
        torch.library.register_fake(f"{library.NAMESPACE}::{name}", _fake(operator))
        _negative_views.impl(name, _for_negative_views(operator), "Negative")
        globals()[name] = operator
    for name in (RUNNING_UPDATE, *CPU_NAMES):
        operator = getattr(torch.ops.densenet_efficient, name).default
        torch.library.register_fake(f"{library.NAMESPACE}::{name}", _fake(operator))
        globals()[name] = operator
    flops.register()


def _fake(operator: Any) -> Callable[..., None]:
    """An operator that only writes into its arguments has nothing to infer. PyTorch also comes here
    when there is one meta tensor among real ones, where nothing would be written."""

    def check(*values: object) -> None:
        tensors = [
            (name, tensor)
            for name, value in _named(operator, values)
            for tensor in (value if isinstance(value, (list, tuple)) else [value])
            if isinstance(tensor, Tensor)
        ]
        first, leading = next((t for t in tensors if not t[1].is_meta), tensors[0])
        for name, value in tensors:
            if value.device != leading.device:
                raise RuntimeError(
                    f"{operator.name()}: {name} must be on {leading.device} as {first}, got "
                    f"{value.device}"
                )

    return check


def _for_negative_views(operator: Any) -> Callable[..., None]:
    """PyTorch comes here when a tensor is a negative view, as the imaginary part of a conjugate is:
    memory that holds the opposite of its values. It may be read, as a copy, and not be written."""
    written = {a.name for a in operator._schema.arguments if a.alias_info and a.alias_info.is_write}

    def run(*values: object) -> None:
        for name, value in _named(operator, values):
            if name in written and isinstance(value, Tensor) and value.is_neg():
                raise RuntimeError(
                    f"{operator.name()}: {name} is written and must not be a negative view, got "
                    "one; resolve_neg() makes an ordinary tensor of it"
                )
        operator(*(v.resolve_neg() if isinstance(v, Tensor) else v for v in values))

    return run


def _named(operator: Any, values: Iterable[object]) -> Iterator[tuple[str, object]]:
    return zip((a.name for a in operator._schema.arguments), values, strict=False)
