"""The compiled operators of ``csrc``, an implementation of `interface.Operators`.

``compiled.channel_stats(x, stats)`` is ``torch.ops.densenet_efficient.channel_stats``; the first
use of any operator loads the library, and raises `library.MissingLibraryError` where there is none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import flops, library
from .interface import NAMES


def __getattr__(name: str) -> Callable[..., None]:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    library.load()
    _register()
    return globals()[name]


def _register() -> None:
    """Binds every operator, with a fake kernel and its floating-point operations."""
    for name in NAMES:
        # An operator that only writes into its arguments has nothing to infer.
        torch.library.register_fake(f"{library.NAMESPACE}::{name}", lambda *args: None)
        globals()[name] = getattr(torch.ops.densenet_efficient, name).default
    flops.register()
