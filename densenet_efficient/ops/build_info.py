"""What the compiled library was built from and for, where it is, and how to get one.

The package imports without the library; everything here works without it, too.
"""

from __future__ import annotations

import functools
import platform
import re
from importlib import metadata
from pathlib import Path

DISTRIBUTION = "densenet-efficient"
LIBRARY = Path(__file__).parents[1] / "libdensenet_efficient.so"


class MissingLibraryError(ImportError):
    """The compiled operators are missing, switched off, or do not run here; the text says which."""


@functools.cache
def build_info() -> dict[str, str]:
    """What the library was built from and for; lists are texts separated by spaces.

    Raises `MissingLibraryError` where the compiled module is not there.
    """
    try:
        from .. import _module
    except ImportError as error:
        raise MissingLibraryError(
            f"densenet_efficient._module is not built for Python {platform.python_version()} "
            f"({error}){hidden_installation()}. {how_to_build()}"
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


def how_to_build() -> str:
    """One sentence: the command that builds the library."""
    sources = LIBRARY.parent.parent
    if (sources / "setup.py").is_file():
        return f"Build them: run pip install -e . in {sources}."
    return "Build them: run pip install . in the folder of densenet-efficient's sources."


def hidden_installation() -> str:
    """Where these sources are not built and hide an installed package that is: a clause that says
    so. Empty otherwise."""
    if LIBRARY.is_file():
        return ""
    for distribution in metadata.distributions(name=DISTRIBUTION):
        installed = Path(str(distribution.locate_file("densenet_efficient"))) / LIBRARY.name
        if installed.is_file() and installed.parent.resolve() != LIBRARY.parent.resolve():
            return (
                f": the sources in {LIBRARY.parent.parent}, which are not built, hide the package "
                f"that is installed in {installed.parent} and is. Run from another folder to use "
                "the installed one"
            )
    return ""


def architectures_text(built: dict[str, str]) -> str:
    """The GPUs that the library holds code for, in words."""
    code = [f"sm_{arch}" for arch in built["cuda_archs"].split()]
    return ", ".join(code + [f"PTX {arch}" for arch in built["cuda_ptx"].split()])
