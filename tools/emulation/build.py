"""Builds the kernels' sources for the host, one library for each set of operators.

Objects are kept under build/emulation by a hash of everything they are made of, so a build after a
small change compiles one file, and of several processes one compiles it while the others wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc"
BUILD = ROOT / "build" / "emulation"
TORCH = Path(torch.__file__).resolve().parent


class EmulationError(RuntimeError):
    """The emulation could not be built, or a kernel broke one of its rules."""


@dataclass(frozen=True)
class Mutation:
    """A fault to plant: the one place in csrc/`file` that reads `old` becomes `new`."""

    file: str
    old: str
    new: str


def operator_names() -> list[str]:
    """The operators that have a CUDA kernel file."""
    return sorted(path.stem for path in (SOURCES / "cuda").glob("*.cu"))


def build(
    operators: Sequence[str] | None = None,
    *,
    mutations: Sequence[Mutation] = (),
    sanitize: bool = True,
) -> Path:
    """Compiles the given operators (default: all) and returns the library. Raises EmulationError
    where the checkout or the compiler is missing, a mutation does not apply, or compiling fails."""
    names = operator_names() if operators is None else list(operators)
    unknown = sorted(set(names) - set(operator_names()))
    if unknown:
        raise EmulationError(f"no such operator: {', '.join(unknown)}; known: {operator_names()}")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise EmulationError("the emulation needs g++ (or the compiler that CXX names)")
    if not (SOURCES / "ops.cpp").is_file():
        raise EmulationError(f"the emulation needs a source checkout; {SOURCES} holds none")
    kernels = _mutated_tree(mutations) if mutations else SOURCES
    files = [SOURCES / "ops.cpp", *sorted((SOURCES / "emulation").glob("*.cpp"))]
    files += [kernels / "cuda" / f"{name}.cu" for name in names]
    flags = _flags(sanitize)
    # The emulator itself knows what it does, and is where the time goes: fast and not instrumented.
    own_flags = [*_flags(False), "-O3", *(["-DDE_SANITIZE"] if sanitize else [])]
    BUILD.mkdir(parents=True, exist_ok=True)

    def compile_one(path: Path) -> Path:
        used = own_flags if path.parent.name == "emulation" else flags
        sources = sorted(_with_includes(path))
        name = _digest(*sources, text=f"{compiler} {used} {torch.__version__}")
        target = BUILD / f"{path.stem}-{name}.o"
        if not target.is_file():
            _run([compiler, *used, "-x", "c++", "-c", str(path)], target)
        return target

    with (BUILD / "lock").open("w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects = list(pool.map(compile_one, files))
        library = BUILD / f"libemulation-{_digest(text=' '.join(map(str, objects)))}.so"
        if not library.is_file():
            libraries = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
            _run([compiler, *flags, "-shared", *map(str, objects), *libraries], library)
    return library


def sanitizer_runtime() -> str:
    """What the worker's interpreter loads first, for LD_PRELOAD: the address sanitizer, and the C++
    runtime whose exceptions it watches."""
    compiler = os.environ.get("CXX", "g++")
    paths = []
    for name in ("libasan.so", "libstdc++.so.6"):
        command = [compiler, f"-print-file-name={name}"]
        paths.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return ":".join(path.strip() for path in paths)


def _flags(sanitize: bool) -> list[str]:
    include = TORCH / "include"
    flags = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-DDE_EMULATE", "-DNDEBUG"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-march=native", "-ffp-contract=fast"]
    flags += [
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-Wno-attributes",
        "-fmax-errors=3",
    ]
    flags += ["-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")]
    if sanitize:
        return [*flags, "-O1", "-g1", "-fsanitize=address", "-fno-omit-frame-pointer"]
    return [*flags, "-O2"]


def _run(command: list[str], target: Path) -> None:
    """Runs a compiler with output to `target`, which appears whole or not at all."""
    partial = target.with_suffix(f".{os.getpid()}.partial")
    result = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
    if result.returncode:
        raise EmulationError(f"{' '.join(command)}\n{result.stderr}")
    partial.replace(target)


def _digest(*paths: Path, text: str = "") -> str:
    digest = hashlib.sha256(text.encode())
    for path in paths:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _with_includes(path: Path, seen: frozenset[Path] = frozenset()) -> set[Path]:
    """The file and every file of ours that it includes, directly or not."""
    found = {path}
    for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE):
        header = (path.parent / name).resolve()
        if header.is_file() and header not in seen | found:
            found |= _with_includes(header, seen | found)
    return found


def _mutated_tree(mutations: Sequence[Mutation]) -> Path:
    """A copy of the sources with the faults planted. It bears the faults' hash, so that equal
    faults share a folder and different ones never meet."""
    inputs = sorted(path for path in SOURCES.rglob("*.*") if path.is_file())
    tree = BUILD / f"mutated-{_digest(*inputs, text=repr(mutations))}"
    if tree.is_dir():
        return tree
    partial = tree.with_suffix(f".{os.getpid()}.partial")
    shutil.copytree(SOURCES, partial)
    for mutation in mutations:
        path = partial / mutation.file
        text = path.read_text()
        if text.count(mutation.old) != 1:
            shutil.rmtree(partial)
            raise EmulationError(
                f"{mutation.file} must hold {mutation.old!r} once, found {text.count(mutation.old)}"
            )
        path.write_text(text.replace(mutation.old, mutation.new))
    partial.replace(tree)
    return tree
