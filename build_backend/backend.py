"""PEP 517 and PEP 660 build backend: setuptools, once the target environment's torch is found.

torch is no build requirement: the library must be compiled against the torch it will run with,
not against a second one that an installer would fetch into its isolated environment.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import targets
import toolchain
from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (hooks that need no torch)
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)


def check_machine() -> None:
    """A missing torch or compiler is reported before anything else."""
    toolchain.find_torch()
    targets.variants(toolchain.find_compiler())


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    check_machine()
    return build_meta.get_requires_for_build_wheel(config_settings)


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    check_machine()
    return build_meta.get_requires_for_build_editable(config_settings)


def build_wheel(
    wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None
) -> str:
    # setuptools copies the package into build/lib* and never removes what the sources have lost.
    for stale in Path("build").glob("lib*"):
        shutil.rmtree(stale)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None
) -> str:
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
