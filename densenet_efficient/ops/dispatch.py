"""Which implementation of the operators serves a device and dtype, and why.

``kernels`` are the compiled operators, ``fallback`` PyTorch's operators in bounded chunks,
``original`` the plain forward of the wrapped modules. Nothing is silent: `densenet_efficient.info`
and `densenet_efficient.explain` print these choices.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, cast

import torch

from . import compiled, fallback, library, mixed
from .interface import Operators

_COMPILED = cast(Operators, compiled)
_MIXED = cast(Operators, mixed)
_FALLBACK = cast(Operators, fallback)


@dataclass(frozen=True)
class Dispatch:
    """How a module runs on an input.

    kind: ``kernels``, ``fallback`` or ``original``. reason: one sentence. operators: what runs the
    first two kinds.
    """

    kind: str
    reason: str
    operators: Any = _FALLBACK


def choose(device: torch.device, dtype: torch.dtype) -> Dispatch:
    """The implementation for activations of ``dtype`` on ``device``. On a GPU float32 takes the
    kernels, whose products are TF32, exactly where cuDNN's convolutions would use TF32 too."""
    precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return _choose(device, dtype, precision == "tf32")


@functools.lru_cache(maxsize=64)
def _choose(device: torch.device, dtype: torch.dtype, tf32: bool) -> Dispatch:
    if not library.is_available():
        return Dispatch("fallback", library.unavailable_reason() or "")
    if device.type not in ("cpu", "cuda"):
        return Dispatch("fallback", f"no kernels are compiled for device type {device.type!r}")
    if device.type == "cpu":
        reason = library.cpu_unavailable_reason()
    else:
        reason = library.cuda_unavailable_reason(device)
    if reason is not None:
        return Dispatch("fallback", reason)
    if device.type == "cuda" and dtype == torch.float64:
        return Dispatch("fallback", "CUDA convolution kernels do not take float64", _MIXED)
    if device.type == "cuda" and dtype == torch.float32:
        if not tf32:
            reason = (
                "CUDA convolution kernels multiply float32 in TF32, which "
                "torch.backends.cudnn.conv.fp32_precision does not allow"
            )
            return Dispatch("fallback", reason, _MIXED)
        return Dispatch("kernels", "compiled cuda kernels, float32 multiplied in TF32", _COMPILED)
    return Dispatch("kernels", f"compiled {device.type} kernels, {_name(dtype)}", _COMPILED)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
