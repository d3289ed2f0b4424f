"""Which of the CPU kernels that were compiled runs on this processor.

A library of CPU kernels is compiled for one kind of processor, and a build holds one or several: an
installation from sources holds the one for its own machine, a wheel those for the levels of x86-64.
The last that the processor can run is loaded, unless ``DENSENET_EFFICIENT_CPU`` names another.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from .build_info import LIBRARY, MissingLibraryError, build_info, how_to_build

CPUINFO = Path("/proc/cpuinfo")


def compiled_variants() -> dict[str, list[str]]:
    """The variants and the processor's features that each needs, the least demanding first."""
    built = build_info()
    features = built["cpu_features"].split(";")
    return {
        name: needed.split() for name, needed in zip(built["march"].split(), features, strict=True)
    }


def variant_path(name: str) -> Path:
    """The library of a variant."""
    return LIBRARY.with_name(f"{LIBRARY.stem}_{name}.so")


def choose_variant() -> str:
    """The variant that runs here; `MissingLibraryError` where none does, or not the one that
    ``DENSENET_EFFICIENT_CPU`` names."""
    variants = compiled_variants()
    wanted = os.environ.get("DENSENET_EFFICIENT_CPU", "")
    if wanted and wanted not in variants:
        raise MissingLibraryError(
            f"DENSENET_EFFICIENT_CPU={wanted} names CPU kernels that were not compiled; those that "
            f"were: {', '.join(variants)}."
        )
    candidates = [wanted] if wanted else list(variants)
    present = processor_features()
    if present is None:  # not Linux: nothing is known
        return candidates[0]
    missing = {
        name: [feature for feature in variants[name] if feature not in present]
        for name in candidates
    }
    usable = [name for name in candidates if not missing[name]]
    if usable:
        return usable[-1]
    raise MissingLibraryError(
        f"The compiled operators use CPU features that this machine lacks: "
        f"{' '.join(missing[candidates[0]])} (built with -march={candidates[0]}). Rebuild on this "
        "machine, or with DENSENET_EFFICIENT_MARCH=portable for several machines. "
        f"{how_to_build()}"
    )


def processor_features() -> set[str] | None:
    """What /proc/cpuinfo lists; None where there is no such file or list."""
    try:
        text = CPUINFO.read_text()
    except OSError:
        return None
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return set(match[1].split()) if match else None
