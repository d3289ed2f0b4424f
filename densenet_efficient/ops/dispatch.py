"""Which implementation of the operators serves a device, a dtype and images of so many dimensions,
and why.

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

NO_STEM_CONVOLUTION = "the kernels of the stem's convolution are for CUDA"
"""Of other devices, which have none to choose."""

_COMPILED = cast(Operators, compiled)
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


def choose(device: torch.device, dtype: torch.dtype, dims: int = 2) -> Dispatch:
    """The implementation for activations of ``dtype`` on ``device``, images of ``dims`` dimensions.
    On a GPU float32 takes the
    kernels, whose products are TF32, exactly where cuDNN's convolutions would use TF32 too."""
    cudnn: Any = torch.backends.cudnn
    tf32 = device.type == "cuda" and cudnn.conv.fp32_precision == "tf32"
    return _choose(device, dtype, dims, tf32)


@functools.lru_cache(maxsize=64)
def _choose(device: torch.device, dtype: torch.dtype, dims: int, tf32: bool) -> Dispatch:
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
    if device.type == "cuda":
        return _on_a_gpu(dtype, dims, tf32)
    return Dispatch("kernels", f"compiled {device.type} kernels, {_name(dtype)}", _COMPILED)


def _on_a_gpu(dtype: torch.dtype, dims: int, tf32: bool) -> Dispatch:
    reason = None
    if dtype == torch.float64:
        reason = "CUDA convolution kernels do not take float64"
    elif dtype == torch.float32 and not tf32:
        reason = (
            "CUDA convolution kernels multiply float32 in TF32, which "
            "torch.backends.cudnn.conv.fp32_precision does not allow"
        )
    if reason is not None:
        flat, other = mixed.WITHOUT_CONVOLUTIONS, mixed.OTHER_DIMENSIONS_WITHOUT_CONVOLUTIONS
        return Dispatch("fallback", reason, flat if dims == 2 else other)
    if dims != 2:
        reason = f"CUDA kernels of 3x3 convolutions and pooling are for 2 dimensions, not {dims}"
        return Dispatch("fallback", reason, mixed.OTHER_DIMENSIONS)
    if dtype == torch.float32:
        return Dispatch("kernels", "compiled cuda kernels, float32 multiplied in TF32", _COMPILED)
    return Dispatch("kernels", f"compiled cuda kernels, {_name(dtype)}", _COMPILED)


def stem_convolution(device: torch.device, dtype: torch.dtype) -> Dispatch:
    """The same for the stem's 7x7 convolution: CUDA kernels in 16 bits, PyTorch's own elsewhere."""
    if device.type != "cuda":
        return Dispatch("original", NO_STEM_CONVOLUTION)
    chosen = choose(device, dtype)
    if chosen.kind != "kernels":
        return Dispatch("original", chosen.reason)
    if dtype.itemsize != 2:
        return Dispatch("original", f"its kernels are for bfloat16 and float16, not {_name(dtype)}")
    return chosen


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
