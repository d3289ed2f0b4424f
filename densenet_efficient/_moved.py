"""Modules under the paths they had before 0.2: imported from where they are now, with a warning."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

_PACKAGE = __name__.rpartition(".")[0]
MOVED = {
    "agreement": "bench.accuracy",
    "architecture": "nn.architecture",
    "arena": "core.arena",
    "benchmarking": "bench.steps",
    "checkpoint": "train.checkpoint",
    "comparison": "bench.comparison",
    "data": "train.data",
    "features": "nn.features",
    "layers": "nn.layers",
    "library": "ops.library",
    "modules": "nn.dense_block",
    "networks": "models.networks",
    "norms": "nn.norms",
    "recipes": "train.recipes",
    "summary": "report.summary",
    "training": "train.trainer",
    "vision": "torchvision_compat",
    "weights": "models.pretrained",
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds ``densenet_efficient.OLD`` and loads the module it has become."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package != _PACKAGE or name not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        old = spec.name.rpartition(".")[2]
        new = f"{_PACKAGE}.{MOVED[old]}"
        warnings.warn(f"{spec.name} is now {new}", DeprecationWarning, stacklevel=2)
        self._spec, module = None, importlib.import_module(new)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has put the old name's there


def install() -> None:
    """Makes the old paths importable; later calls do nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
