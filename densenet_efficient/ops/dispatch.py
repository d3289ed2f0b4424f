"""Which implementation of the stages serves a device and dtype, and why.

``kernels`` are the compiled operators, ``general`` the framework's operators in bounded chunks,
``original`` the plain forward of the wrapped modules. Nothing falls back silently:
`densenet_efficient.explain` prints these choices.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType

import torch

from . import compiled, fallback, library, mixed

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Activation dtypes of every stage."""


@dataclass(frozen=True)
class Path:
    """How a module runs on an input. kind: ``kernels``, ``general`` or ``original``. stages: the
    module whose functions implement the stages."""

    kind: str
    reason: str
    stages: ModuleType = fallback


def choose(device: torch.device, dtype: torch.dtype) -> Path:
    """The path of the stages on ``device`` for activations of ``dtype``. On a GPU float32 takes
    the kernels, whose products are TF32, exactly where cuDNN's convolutions would use TF32 too."""
    precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return _choose(device, dtype, precision == "tf32")


@functools.lru_cache(maxsize=64)
def _choose(device: torch.device, dtype: torch.dtype, tf32: bool) -> Path:
    if not library.is_available():
        return Path("general", library.unavailable_reason() or "")
    if device.type not in ("cpu", "cuda"):
        return Path("general", f"no kernels are compiled for device type {device.type!r}")
    gap = library.cpu_gap() if device.type == "cpu" else library.cuda_gap(device)
    if gap is not None:
        return Path("general", gap)
    if device.type == "cuda" and dtype == torch.float64:
        return Path("general", "CUDA convolution kernels do not take float64", mixed)
    if device.type == "cuda" and dtype == torch.float32:
        if not tf32:
            reason = (
                "CUDA convolution kernels multiply float32 in TF32, which "
                "torch.backends.cudnn.conv.fp32_precision does not allow"
            )
            return Path("general", reason, mixed)
        return Path("kernels", "compiled cuda kernels, float32 multiplied in TF32", compiled)
    return Path("kernels", f"compiled {device.type} kernels, {_name(dtype)}", compiled)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
