"""Builds the operator libraries and the pybind11 module; everything else is in pyproject.toml."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))
import native  # noqa: E402
import targets  # noqa: E402

PACKAGE = "densenet_efficient"


class BuildNative(build_ext):
    """All is built by ninja in build/, then copied: into the wheel, or, for an editable
    installation, next to the sources."""

    names: tuple[str, ...] = ()  # of the files

    def run(self) -> None:
        built = native.build(ROOT, self.distribution.get_version())
        folder = ROOT / PACKAGE if self._in_place() else Path(self.build_lib) / PACKAGE
        folder.mkdir(parents=True, exist_ok=True)
        self.names = tuple(source.name for source in built.files)
        for source in built.files:
            # A running process may have the old file mapped: replace it, never write into it.
            target = folder / source.name
            staged = target.with_suffix(".new")
            shutil.copy2(source, staged)
            staged.replace(target)
        for library in folder.glob(f"lib{PACKAGE}*.so"):  # kernels of an earlier build
            if library.name not in self.names:
                library.unlink()

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / PACKAGE / name) for name in self.names]

    def get_output_mapping(self) -> dict[str, str]:
        if not self._in_place():
            return {}
        folder = Path(self.build_lib) / PACKAGE
        return {str(folder / name): str(ROOT / PACKAGE / name) for name in self.names}

    def _in_place(self) -> bool:
        return bool(self.inplace or self.editable_mode)


class Wheel(bdist_wheel):
    """The tag of a wheel names the Pythons that its module is compiled for."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (*targets.wheel_tag(python, abi), platform)


setup(
    ext_modules=[Extension(f"{PACKAGE}._module", ["csrc/module.cpp"])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
