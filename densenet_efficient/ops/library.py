"""Loads the compiled operators, once, and says whether a device can use them.

The package imports without them. Whatever runs a compiled operator calls `load` and gets a
`MissingLibraryError` that says why there is none and what to do; whatever can choose asks
`is_available` and `cuda_unavailable_reason` and takes the fallback with the reason at hand. The
environment variable ``DENSENET_EFFICIENT_DISABLE=1`` makes the library count as missing.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import threading
import warnings
from pathlib import Path

import torch

from ..version import __version__
from . import cpu_variants
from .build_info import (
    LIBRARY,
    MissingLibraryError,
    architectures_text,
    build_info,
    hidden_installation,
    how_to_build,
    is_covered,
)
from .interface import CPU_NAMES, CUDA_NAMES

NAMESPACE = "densenet_efficient"
MINIMUM_TORCH = (2, 10)

_lock = threading.Lock()
_loaded: str | None = None  # the variant of the CPU kernels
_failure: str | None = None


def load() -> None:
    """Loads the compiled operators into ``torch.ops.densenet_efficient``; later calls do nothing.

    Raises `MissingLibraryError` where they were not built, were built for another CPU, torch
    or version of this package, or are switched off. Safe to call from several threads.

    Of the CPU kernels that were compiled those are loaded that `cpu_variants` chooses.
    """
    reason = _load()
    if reason is not None:
        raise MissingLibraryError(reason)


def is_available() -> bool:
    """Whether the compiled operators can be loaded. The first "no" warns with the reason."""
    reason = _load()
    if reason is not None:
        _warn_once(reason)
    return reason is None


def unavailable_reason() -> str | None:
    """Why the compiled operators cannot be loaded, in one paragraph; None where they can."""
    return _load()


def cpu_variant() -> str:
    """The variant of the CPU kernels that is loaded: x86-64-v3, say, or native.

    Raises `MissingLibraryError` where there is no library at all.
    """
    load()
    assert _loaded is not None
    return _loaded


@functools.cache
def cpu_unavailable_reason() -> str | None:
    """Why CPU tensors cannot take the compiled kernels, in words; None where they can.

    Raises `MissingLibraryError` where there is no library at all.
    """
    load()
    return without_kernels("CPU")


def cuda_unavailable_reason(device: torch.device) -> str | None:
    """Why tensors on a CUDA device cannot take the compiled kernels, in words; None where they can.

    Raises `MissingLibraryError` where there is no library at all. A device without an index
    is the current one.
    """
    load()
    if not build_info()["cuda_archs"]:
        return f"CUDA kernels were {build_info()['cuda']}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    index = torch.cuda.current_device() if device.index is None else device.index
    return _device_reason(index)


@functools.cache
def _device_reason(index: int) -> str | None:
    built = build_info()
    capability = torch.cuda.get_device_capability(index)
    if not is_covered(capability, built["cuda_archs"].split(), built["cuda_ptx"].split()):
        version = f"{capability[0]}.{capability[1]}"
        return (
            f"the CUDA kernels were compiled for {architectures_text(built)}, and this GPU is "
            f"{version}: rebuild with TORCH_CUDA_ARCH_LIST={version}"
        )
    supported = _driver_version()
    if supported is not None and supported // 1000 < int(built["nvcc"].partition(".")[0]):
        version = f"{supported // 1000}.{supported % 1000 // 10}"
        return (
            f"the CUDA kernels were compiled with CUDA {built['nvcc']}, and this GPU's driver "
            f"supports CUDA {version}: update the driver, or rebuild with an older nvcc"
        )
    return without_kernels("CUDA")


def _driver_version() -> int | None:
    """The newest CUDA that the driver supports, 12080 for 12.8; None where it does not say. torch
    has no function for it."""
    version = ctypes.c_int()
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if status else version.value


def without_kernels(key: str) -> str | None:
    """The operators that no kernel is registered for under a dispatch key, in words; the CPU needs
    none for those of CUDA alone, nor the other way round."""
    prefix = f"{NAMESPACE}::"
    elsewhere = {"CPU": CUDA_NAMES, "CUDA": CPU_NAMES}.get(key, ())
    names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    missing = sorted(
        name.removeprefix(prefix)
        for name in names
        if name.startswith(prefix)
        and name.removeprefix(prefix) not in elsewhere
        and not torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    )
    return f"no {key} kernel was compiled for {', '.join(missing)}" if missing else None


def _load() -> str | None:
    """Loads the library unless it is loaded; the reason where that fails, which is remembered."""
    global _loaded, _failure
    with _lock:
        if _loaded is None and _failure is None:
            try:
                _check_usable()
                variant = cpu_variants.choose_variant()
                kernels = cpu_variants.variant_path(variant)
                _check_there(kernels)
                torch.ops.load_library(str(LIBRARY))
                torch.ops.load_library(str(kernels))
                _loaded = variant
            except MissingLibraryError as error:
                _failure = str(error)
            except OSError as error:
                _failure = _explain_loader(str(error))
        return _failure


def _check_usable() -> None:
    """Says what can be known before the loader, or an illegal instruction, would say it worse."""
    switch = os.environ.get("DENSENET_EFFICIENT_DISABLE", "")
    if switch not in ("", "0"):
        raise MissingLibraryError(
            f"The compiled operators are switched off by DENSENET_EFFICIENT_DISABLE={switch}."
        )
    _check_there(LIBRARY)
    built = build_info()
    if built["version"] != __version__:
        raise MissingLibraryError(
            f"The compiled operators are of version {built['version']}, and this package is "
            f"{__version__}. {how_to_build()}"
        )
    numbers = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if numbers < MINIMUM_TORCH:
        raise MissingLibraryError(
            f"The compiled operators, built against torch {built['torch']}, need torch >= 2.10, "
            f"and this is torch {torch.__version__}."
        )


def _check_there(library: Path) -> None:
    if not library.is_file():
        raise MissingLibraryError(
            f"{library} does not exist{hidden_installation()}. {how_to_build()}"
        )


def _explain_loader(message: str) -> str:
    built = build_info()
    if "undefined symbol" in message:
        return (
            f"The compiled operators were built against torch {built['torch']} and do not load in "
            f"torch {torch.__version__}: {message}. {how_to_build()}"
        )
    return f"The compiled operators do not load: {message}. {how_to_build()}"


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"Taking the fallback through PyTorch's own operators, which is slower. {reason}",
        RuntimeWarning,
        stacklevel=3,
    )
