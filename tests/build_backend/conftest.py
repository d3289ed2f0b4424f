"""The modules of the build, importable."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def backend() -> Iterator[None]:
    """Makes the modules of the build importable."""
    folder = str(ROOT / "build_backend")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)


@pytest.fixture
def toolchain(backend: None) -> ModuleType:
    return importlib.import_module("toolchain")


@pytest.fixture
def targets(backend: None) -> ModuleType:
    return importlib.import_module("targets")


@pytest.fixture
def native(backend: None) -> ModuleType:
    return importlib.import_module("native")
