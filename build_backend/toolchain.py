"""What the build needs from the machine: torch, a C++ compiler, ninja, pybind11, perhaps nvcc.

Nothing here imports torch: its folder and its version file are enough, and a build stays quick.
Every failure is a BuildError whose text is one paragraph: what is missing and what to do.
"""

from __future__ import annotations

import importlib.machinery
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

MINIMUM_TORCH = (2, 10)
MINIMUM_CUDA_ARCH = (8, 0)
# One compilation pass per entry: machine code for Ampere (which Ada runs too) and Hopper, and
# Ampere's PTX for everything newer, which the driver compiles when the library is first used.
DEFAULT_CUDA_ARCHS = "8.0+PTX;9.0a"


class BuildError(SystemExit):
    """Ends the build with a message instead of a traceback."""


@dataclass(frozen=True)
class Torch:
    root: Path  # the folder of the package, with include/ and lib/
    version: str
    cuda: str  # the version of CUDA it was built with, "" for none

    @property
    def include(self) -> Path:
        return self.root / "include"

    @property
    def lib(self) -> Path:
        return self.root / "lib"


@dataclass(frozen=True)
class Compiler:
    path: str
    version: str


@dataclass(frozen=True)
class Nvcc:
    path: str
    version: str


def search_path() -> list[str]:
    """Folders in which the environment that is installed into keeps its packages.

    Build isolation removes them from sys.path by environment variables, so a second interpreter
    without those variables is asked. The own sys.path comes first: it is what a build without
    isolation sees.
    """
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONSAFEPATH")
    clean = {k: v for k, v in os.environ.items() if k not in hidden}
    code = "import sys; print('\\n'.join(p for p in sys.path if p))"
    asked = subprocess.run(
        [sys.executable, "-c", code], env=clean, cwd=os.sep, capture_output=True, text=True
    )
    named = os.environ.get("DENSENET_EFFICIENT_TORCH")
    paths = [named] if named else []
    paths += [p for p in sys.path if p] + asked.stdout.split("\n")
    return list(dict.fromkeys(p for p in paths if p))


def find_torch() -> Torch:
    """The torch of the environment that is installed into; BuildError where there is none."""
    paths = search_path()
    # A fresh finder per folder: the path importer cache may hold the isolated environment's answer.
    for folder in paths:
        spec = importlib.machinery.PathFinder.find_spec("torch", [folder])
        if spec is None or spec.origin is None:
            continue
        root = Path(spec.origin).parent
        version_file = root / "version.py"
        if not (root / "include").is_dir() or not version_file.is_file():
            continue
        text = version_file.read_text()
        match = re.search(r"__version__ = '([^']+)'", text)
        version = match.group(1) if match else "unknown"
        cuda = re.search(r"^cuda\b[^=]*= '([^']*)'", text, re.MULTILINE)
        numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
        if numbers < MINIMUM_TORCH:
            raise BuildError(
                f"densenet-efficient needs torch >= 2.10, and {root} is torch {version}. Upgrade "
                "it (pip install --upgrade torch), then run this command again."
            )
        return Torch(root, version, cuda.group(1) if cuda else "")
    raise BuildError(
        "densenet-efficient is built against the PyTorch of the environment it is installed into, "
        f"and the environment of {sys.executable} has none. Install torch >= 2.10 there first (pip "
        "install torch, or the variant that https://pytorch.org/get-started shows for your GPU), "
        "then run this command again. If torch is installed and this tool builds in an environment "
        "of its own (uv, python -m build), switch that off (--no-build-isolation, --no-isolation) "
        "or name the folder that contains torch in DENSENET_EFFICIENT_TORCH."
    )


def find_ninja() -> str:
    """The ninja program: of the ninja package, or on PATH."""
    try:
        import ninja

        program = shutil.which("ninja", path=ninja.BIN_DIR)
        if program:
            return program
    except ImportError:
        pass
    program = shutil.which("ninja")
    if program:
        return program
    raise BuildError(
        "densenet-efficient is compiled with ninja, which was not found as a Python package or on "
        "PATH. Build isolation installs it by itself; without isolation run pip install ninja, "
        "then run this command again."
    )


def find_pybind11(torch: Torch) -> Path:
    """The headers of pybind11: the package's, or the copy that torch carries."""
    try:
        import pybind11

        return Path(pybind11.get_include())
    except ImportError:
        return torch.include


def find_compiler() -> Compiler:
    """The C++ compiler: CXX, else g++, clang++ or c++."""
    named = os.environ.get("CXX")
    candidates = [named] if named else ["g++", "clang++", "c++"]
    path = next((p for p in map(shutil.which, candidates) if p), None)
    if path is None:
        looked = f"CXX={named}" if named else "g++, clang++ and c++"
        raise BuildError(
            f"densenet-efficient needs a C++20 compiler, and {looked} cannot be found on PATH. "
            "Install one (Debian and Ubuntu: apt install g++; Fedora: dnf install gcc-c++; conda: "
            "conda install gxx) or name yours in CXX, then run this command again."
        )
    version = run([path, "--version"]).stdout.split("\n")[0].strip()
    return Compiler(path, version)


def find_nvcc() -> Nvcc | None:
    """nvcc by CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda; None where there is none."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [str(Path(folder, "bin", "nvcc")) for folder in folders if folder]
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    path = next((p for p in map(shutil.which, candidates) if p), None)
    if path is None:
        return None
    match = re.search(r"release [\d.]+, V([\d.]+)", run([path, "--version"]).stdout)
    return Nvcc(path, match.group(1)) if match else None


@dataclass(frozen=True)
class CudaArchs:
    """Targets of nvcc: machine code by sm, and PTX by compute capability, e.g. "90a", "80"."""

    code: tuple[str, ...]
    ptx: tuple[str, ...]

    def flags(self) -> list[str]:
        # -arch=sm_90a would emit code for plain compute_90 too, which lacks Hopper's instructions.
        flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.code]
        return flags + [f"-gencode=arch=compute_{a},code=compute_{a}" for a in self.ptx]


def parse_cuda_archs(text: str) -> CudaArchs:
    """Reads TORCH_CUDA_ARCH_LIST: "8.0;8.6;9.0a;12.0+PTX" (semicolons, commas or spaces).

    9.0 means 9.0a: machine code of either runs on the same GPUs. Entries below 8.0 are left out
    (the kernels need bfloat16 tensor cores); BuildError where nothing is left or an entry is odd.
    """
    code: list[str] = []
    ptx: list[str] = []
    for entry in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise BuildError(
                "TORCH_CUDA_ARCH_LIST must hold entries such as 8.0, 9.0a or 12.0+PTX, separated "
                f"by semicolons, and has {entry!r}. Correct it or unset it (the default is "
                f"{DEFAULT_CUDA_ARCHS}), then run this command again."
            )
        major, minor, suffix, with_ptx = match.groups()
        if (int(major), int(minor)) < MINIMUM_CUDA_ARCH:
            continue
        name = major + minor
        code.append(name + ("a" if name == "90" else suffix))
        if with_ptx:
            ptx.append(name + suffix)
    if not code:
        raise BuildError(
            f"TORCH_CUDA_ARCH_LIST is {text!r}, and the CUDA kernels need at least 8.0. Add such "
            "an architecture, or build without them (DENSENET_EFFICIENT_CUDA=0)."
        )
    return CudaArchs(tuple(dict.fromkeys(code)), tuple(dict.fromkeys(ptx)))


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)
