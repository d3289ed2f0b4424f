"""Builds the operator library and the pybind11 module; everything else is in pyproject.toml."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))
import native  # noqa: E402

PACKAGE = "densenet_efficient"
LIBRARY = f"lib{PACKAGE}.so"


class BuildNative(build_ext):
    """Both artefacts are built by ninja in build/, then copied: into the wheel, or, for an editable
    installation, next to the sources."""

    def run(self) -> None:
        built = native.build(ROOT, self.distribution.get_version())
        folder = ROOT / PACKAGE if self._in_place() else Path(self.build_lib) / PACKAGE
        folder.mkdir(parents=True, exist_ok=True)
        for source, name in ((built.library, LIBRARY), (built.module, self._module_name())):
            # A running process may have the old file mapped: replace it, never write into it.
            target = folder / name
            staged = target.with_suffix(".new")
            shutil.copy2(source, staged)
            staged.replace(target)

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib) / PACKAGE
        return [str(folder / LIBRARY), str(folder / self._module_name())]

    def get_output_mapping(self) -> dict[str, str]:
        if not self._in_place():
            return {}
        folder = Path(self.build_lib) / PACKAGE
        names = (LIBRARY, self._module_name())
        return {str(folder / name): str(ROOT / PACKAGE / name) for name in names}

    def _in_place(self) -> bool:
        return bool(self.inplace or self.editable_mode)

    def _module_name(self) -> str:
        return Path(self.get_ext_filename("_module")).name


setup(
    ext_modules=[Extension(f"{PACKAGE}._module", ["csrc/module.cpp"])],
    cmdclass={"build_ext": BuildNative},
)
