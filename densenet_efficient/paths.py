"""Which implementation of the stages serves a device and dtype, and why.

``kernels`` are the compiled operators, ``general`` the framework's operators in bounded chunks,
``original`` the plain forward of the wrapped modules. Nothing falls back silently:
:func:`densenet_efficient.explain` prints these choices.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType

import torch

from . import general, library, ops

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Activation dtypes of every stage."""


@dataclass(frozen=True)
class Path:
    """How a module runs on an input. kind: ``kernels``, ``general`` or ``original``."""

    kind: str
    reason: str

    @property
    def stages(self) -> ModuleType:
        """The module whose functions implement the stages."""
        return ops if self.kind == "kernels" else general


@functools.lru_cache(maxsize=64)
def choose(device: torch.device, dtype: torch.dtype) -> Path:
    """The path of the stages on ``device`` for activations of ``dtype``."""
    available, reason = library.kernels_for(device.type, device.index)
    if not available:
        return Path("general", reason)
    missing = sorted(set(ops.NAMES) - library.operators(device.type))
    if missing:
        return Path("general", f"the library has no {device.type} kernels of {', '.join(missing)}")
    if device.type == "cuda" and dtype not in (torch.bfloat16, torch.float16):
        return Path("general", f"CUDA kernels take bfloat16 and float16, not {_name(dtype)}")
    return Path("kernels", f"compiled {device.type} kernels, {_name(dtype)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
