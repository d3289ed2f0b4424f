"""Says what a fresh machine lacks before make starts installing: Python 3.10, venv, a C++ compiler.

Runs under whatever python3 is there, so it keeps to what Python 3.6 understands.
"""

import os
import platform
import shutil
import sys


def main():
    if sys.version_info < (3, 10):  # noqa: UP036
        return (
            f"densenet-efficient needs Python 3.10 or newer, and {sys.executable} is "
            f"{platform.python_version()}. Name a newer one: make PYTHON=python3.12"
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        return (
            f"{sys.executable} cannot make virtual environments ({error}). Debian and Ubuntu keep "
            "that part in a package of its own: apt install python3-venv"
        )
    named = os.environ.get("CXX")
    compilers = [named] if named else ["g++", "clang++", "c++"]
    if not any(map(shutil.which, compilers)):
        return (
            f"No C++ compiler was found (looked for {', '.join(compilers)}). Install one (Debian "
            "and Ubuntu: apt install g++; Fedora: dnf install gcc-c++) or name yours in CXX."
        )
    return None


if __name__ == "__main__":
    sys.exit(main())
