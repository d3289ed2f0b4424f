"""`densenet_efficient.info`: versions, the compiled library, and what serves each device."""

from __future__ import annotations

import platform
import textwrap
from dataclasses import dataclass

import torch

from ..version import __version__
from . import cpu_variants, library
from .build_info import LIBRARY, MissingLibraryError, architectures_text, build_info


@dataclass(frozen=True)
class Device:
    """A device, and whether the compiled kernels serve its tensors."""

    name: str  # "cpu", "cuda:0 (NVIDIA H200, compute capability 9.0)"
    unavailable_reason: str | None  # why the compiled kernels do not serve it

    def __str__(self) -> str:
        path = (
            "compiled kernels"
            if self.unavailable_reason is None
            else f"fallback: {self.unavailable_reason}"
        )
        return f"{self.name}: {path}"


@dataclass(frozen=True)
class Info:
    """What runs here: versions, the compiled library, and what serves each device."""

    version: str
    python: str
    torch: str
    library: str | None  # path of the loaded library
    cpu_variant: str | None  # which of the compiled CPU kernels is loaded: x86-64-v3, native
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
            rows.append(("  compiler", built["compiler"]))
            compiled = cpu_variants.compiled_variants()
            names = ", ".join(compiled)
            loaded = self.cpu_variant is not None and len(compiled) > 1
            rows.append(("  CPU kernels", f"{self.cpu_variant}, of {names}" if loaded else names))
            features = compiled[self.cpu_variant or names.partition(",")[0]]
            rows.append(("  CPU features", " ".join(features) or "none required"))
            cuda = built["cuda"]
            if built["cuda_archs"]:
                cuda = f"nvcc {built['nvcc']}, for {architectures_text(built)}"
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
    problem = library.unavailable_reason()
    try:
        build = build_info()
    except MissingLibraryError:
        build = {}
    devices = [Device("cpu", problem or library.without_kernels("CPU"))]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            name = torch.cuda.get_device_name(index)
            devices.append(
                Device(
                    f"cuda:{index} ({name}, compute capability {major}.{minor})",
                    problem or library.cuda_unavailable_reason(torch.device("cuda", index)),
                )
            )
    return Info(
        version=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        library=str(LIBRARY) if problem is None else None,
        cpu_variant=library.cpu_variant() if problem is None else None,
        problem=problem,
        build=build,
        devices=tuple(devices),
    )
