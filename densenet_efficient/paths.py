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

from . import general, library, ops, wide

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Activation dtypes of every stage."""


@dataclass(frozen=True)
class Path:
    """How a module runs on an input. kind: ``kernels``, ``general`` or ``original``. stages: the
    module whose functions implement the stages."""

    kind: str
    reason: str
    stages: ModuleType = general


@functools.lru_cache(maxsize=64)
def choose(device: torch.device, dtype: torch.dtype) -> Path:
    """The path of the stages on ``device`` for activations of ``dtype``."""
    if not library.is_available():
        return Path("general", library.unavailable_reason() or "")
    if device.type not in ("cpu", "cuda"):
        return Path("general", f"no kernels are compiled for device type {device.type!r}")
    gap = library.cpu_gap() if device.type == "cpu" else library.cuda_gap(device)
    if gap is not None:
        return Path("general", gap)
    if device.type == "cuda" and dtype not in (torch.bfloat16, torch.float16):
        reason = f"CUDA convolution kernels take bfloat16 and float16, not {_name(dtype)}"
        return Path("general", reason, wide)
    return Path("kernels", f"compiled {device.type} kernels, {_name(dtype)}", ops)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
