"""Loads the compiled operators, once, and says what they are: ``load``, ``is_available``, ``info``.

The package imports without them. Whatever runs a compiled operator calls :func:`load` and gets a
:class:`MissingLibraryError` that says why there is none and what to do; whatever can choose asks
:func:`is_available` and :func:`cuda_gap` and takes the general path with the reason at hand. The
environment variable ``DENSENET_EFFICIENT_DISABLE=1`` makes the library count as missing.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import textwrap
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from ..version import __version__

NAMESPACE = "densenet_efficient"
LIBRARY = Path(__file__).parents[1] / "libdensenet_efficient.so"
MINIMUM_TORCH = (2, 10)
CPUINFO = Path("/proc/cpuinfo")

_lock = threading.Lock()
_loaded = False
_failure: str | None = None


class MissingLibraryError(ImportError):
    """The compiled operators are missing, switched off, or do not run here; the text says which."""


def load() -> None:
    """Loads the compiled operators into ``torch.ops.densenet_efficient``; later calls do nothing.

    Raises :class:`MissingLibraryError` where they were not built, were built for another CPU, torch
    or version of this package, or are switched off. Safe to call from several threads.
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


@functools.cache
def cpu_gap() -> str | None:
    """Why CPU tensors cannot take the compiled kernels, in words; None where they can.

    Raises :class:`MissingLibraryError` where there is no library at all.
    """
    load()
    return _without_kernels("CPU")


def cuda_gap(device: torch.device) -> str | None:
    """Why tensors on a CUDA device cannot take the compiled kernels, in words; None where they can.

    Raises :class:`MissingLibraryError` where there is no library at all. A device without an index
    is the current one.
    """
    load()
    if not build_info()["cuda_archs"]:
        return f"CUDA kernels were {build_info()['cuda']}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    index = torch.cuda.current_device() if device.index is None else device.index
    return _cuda_gap(index)


@functools.cache
def _cuda_gap(index: int) -> str | None:
    built = build_info()
    capability = torch.cuda.get_device_capability(index)
    if not is_covered(capability, built["cuda_archs"].split(), built["cuda_ptx"].split()):
        version = f"{capability[0]}.{capability[1]}"
        return (
            f"the CUDA kernels were compiled for {_arch_text(built)}, and this GPU is {version}: "
            f"rebuild with TORCH_CUDA_ARCH_LIST={version}"
        )
    # 12080 for CUDA 12.8
    supported = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    if supported // 1000 < int(built["nvcc"].partition(".")[0]):
        version = f"{supported // 1000}.{supported % 1000 // 10}"
        return (
            f"the CUDA kernels were compiled with CUDA {built['nvcc']}, and this GPU's driver "
            f"supports CUDA {version}: update the driver, or rebuild with an older nvcc"
        )
    return _without_kernels("CUDA")


def _without_kernels(key: str) -> str | None:
    """The operators that no kernel is registered for under a dispatch key, in words."""
    prefix = f"{NAMESPACE}::"
    names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    missing = sorted(
        name.removeprefix(prefix)
        for name in names
        if name.startswith(prefix) and not torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    )
    return f"no {key} kernel was compiled for {', '.join(missing)}" if missing else None


@functools.cache
def build_info() -> dict[str, str]:
    """What the library was built from and for; lists are texts separated by spaces.

    Raises :class:`MissingLibraryError` where the compiled module is not there.
    """
    try:
        from .. import _module
    except ImportError as error:
        raise MissingLibraryError(
            f"densenet_efficient._module is not built for Python {platform.python_version()} "
            f"({error}). {_how_to_build()}"
        ) from None
    info: dict[str, str] = _module.build_info()
    return info


def is_covered(capability: tuple[int, int], archs: list[str], ptx: list[str]) -> bool:
    """Whether code for ``archs`` ("80", "90a") or PTX for ``ptx`` ("80") runs on ``capability``.

    Machine code runs on its own major version from its own minor version on; with the suffix "a"
    on exactly its own, with "f" as without. PTX runs on everything from its version on.
    """

    def parse(arch: str) -> tuple[int, int, str]:
        match = re.fullmatch(r"(\d+)(\d)([af]?)", arch)
        if match is None:
            raise ValueError(f'architectures must look like "80" or "90a", got {arch!r}')
        return int(match[1]), int(match[2]), match[3]

    major, minor = capability
    for code_major, code_minor, suffix in map(parse, archs):
        if (code_major, code_minor) == (major, minor):
            return True
        if suffix != "a" and code_major == major and code_minor < minor:
            return True
    return any(
        (m, n) == (major, minor) or (not suffix and (m, n) < (major, minor))
        for m, n, suffix in map(parse, ptx)
    )


@dataclass(frozen=True)
class Device:
    """A device and what keeps its tensors off the compiled kernels: None where nothing does."""

    name: str  # "cpu", "cuda:0 (NVIDIA H200, compute capability 9.0)"
    gap: str | None

    def __str__(self) -> str:
        path = "compiled kernels" if self.gap is None else f"general path: {self.gap}"
        return f"{self.name}: {path}"


@dataclass(frozen=True)
class Info:
    """What runs here: versions, the compiled library, and the path each device takes."""

    version: str
    python: str
    torch: str
    library: str | None  # path of the loaded library
    problem: str | None  # why there is none
    build: dict[str, str]  # build_info(), empty where the compiled module is missing
    devices: tuple[Device, ...]

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that were compiled."""
        if not self.build:
            return ()
        return ("cpu", "cuda") if self.build["cuda_archs"] else ("cpu",)

    def __str__(self) -> str:
        rows = [
            ("densenet-efficient", self.version),
            ("python", self.python),
            ("torch", self.torch),
            ("library", self.library or f"none. {self.problem}"),
        ]
        if self.build:
            built = self.build
            commit = f"commit {built['commit']}, " if built["commit"] else ""
            rows.append(("  built", f"{commit}{built['date']}, against torch {built['torch']}"))
            march = built["march"] or "the compiler's default"
            rows.append(("  CPU", f"{built['compiler']}, -march: {march}"))
            rows.append(("  CPU features", built["cpu_features"] or "none required"))
            cuda = built["cuda"]
            if built["cuda_archs"]:
                cuda = f"nvcc {built['nvcc']}, for {_arch_text(built)}"
            rows.append(("  CUDA", cuda))
            if built["debug"] or built["sanitize"]:
                options = ["debug"] if built["debug"] else []
                options += [f"sanitizer {built['sanitize']}"] if built["sanitize"] else []
                rows.append(("  options", ", ".join(options)))
        rows += [("path" if i == 0 else "", str(d)) for i, d in enumerate(self.devices)]
        indent = " " * 20
        return "\n".join(
            textwrap.fill(
                value,
                100,
                initial_indent=f"{key:<20}",
                subsequent_indent=indent,
                break_long_words=False,
                break_on_hyphens=False,
            )
            for key, value in rows
        )


def info() -> Info:
    """Versions, the compiled library, backends and devices, and which path is active and why.

    Never raises where the library is missing: it is what a user runs to find out.
    """
    problem = _load()
    try:
        build = build_info()
    except MissingLibraryError:
        build = {}
    devices = [Device("cpu", problem or _without_kernels("CPU"))]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            name = torch.cuda.get_device_name(index)
            devices.append(
                Device(
                    f"cuda:{index} ({name}, compute capability {major}.{minor})",
                    problem or cuda_gap(torch.device("cuda", index)),
                )
            )
    return Info(
        version=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        library=str(LIBRARY) if problem is None else None,
        problem=problem,
        build=build,
        devices=tuple(devices),
    )


def _load() -> str | None:
    """Loads the library unless it is loaded; the reason where that fails, which is remembered."""
    global _loaded, _failure
    with _lock:
        if not _loaded and _failure is None:
            try:
                _check_usable()
                torch.ops.load_library(str(LIBRARY))
                _loaded = True
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
    if not LIBRARY.is_file():
        raise MissingLibraryError(f"{LIBRARY} does not exist. {_how_to_build()}")
    built = build_info()
    if built["version"] != __version__:
        raise MissingLibraryError(
            f"The compiled operators are of version {built['version']}, and this package is "
            f"{__version__}. {_how_to_build()}"
        )
    numbers = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if numbers < MINIMUM_TORCH:
        raise MissingLibraryError(
            f"The compiled operators need torch >= 2.10, and this is torch {torch.__version__}."
        )
    missing = missing_cpu_features(built["cpu_features"].split())
    if missing:
        raise MissingLibraryError(
            f"The compiled operators use CPU features that this machine lacks: {' '.join(missing)} "
            f"(built with -march={built['march']}). Rebuild on this machine, or with "
            f"DENSENET_EFFICIENT_MARCH=x86-64-v3 or none for several machines. {_how_to_build()}"
        )


def missing_cpu_features(required: list[str]) -> list[str]:
    """Those of ``required`` that /proc/cpuinfo does not list; none where there is no such file."""
    try:
        text = CPUINFO.read_text()
    except OSError:
        return []
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    present = set(match[1].split()) if match else set(required)
    return [name for name in required if name not in present]


def _explain_loader(message: str) -> str:
    built = build_info()
    if "undefined symbol" in message:
        return (
            f"The compiled operators were built against torch {built['torch']} and do not load in "
            f"torch {torch.__version__}: {message}. {_how_to_build()}"
        )
    return f"The compiled operators do not load: {message}. {_how_to_build()}"


def _how_to_build() -> str:
    sources = LIBRARY.parent.parent
    if (sources / "setup.py").is_file():
        return f"Build them: run pip install -e . in {sources}."
    return "Build them: run pip install . in the folder of densenet-efficient's sources."


def _arch_text(built: dict[str, str]) -> str:
    code = [f"sm_{arch}" for arch in built["cuda_archs"].split()]
    return ", ".join(code + [f"PTX {arch}" for arch in built["cuda_ptx"].split()])


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"Taking the general path. {reason}", RuntimeWarning, stacklevel=3)
