"""Runs the tests of the CPU operators and of what calls them under the sanitizers: `make sanitize`.

    python -m tools.sanitize [address] [thread] [-- PYTEST ARGUMENTS]

Two builds of csrc, each with a copy of the package and the tests in build/sanitize/NAME, so that
the checkout stays as it is: `address`, which includes undefined behaviour, and `thread`. The tests
run in two threads there, as nothing can race in one. Whatever a sanitizer reports, in any process
of the tests, is printed and makes the command fail.

Only csrc is instrumented, neither torch nor Python, and only what csrc does to memory is looked at.
Nothing is suppressed: torch's threads meet in an OpenMP runtime that the thread sanitizer does not
see, and csrc/cpu/parallel.h tells it of those meetings. Leaks are not looked for: Python leaves
most of its memory to the end of the process.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
COPIED = ("densenet_efficient", "tests", "tools", "csrc", "pyproject.toml", "setup.py")
TESTS = ("tests/ops", "tests/core", "tests/nn", "tests/compatibility/test_threads.py")
THREADS = "2"


@dataclass(frozen=True)
class Sanitizer:
    """One build. flags: of -fsanitize. runtimes: what the interpreter loads first; the C++ runtime
    comes along because its exceptions are watched. options: name and value of the environment
    variables that the runtimes read; log_path is added to each. An allocation of more than there is
    fails (allocator_may_return_null), as without a sanitizer: a test asks for one. The warning that
    says so is no finding."""

    flags: str
    runtimes: tuple[str, ...]
    options: dict[str, str]


SANITIZERS = {
    "address": Sanitizer(
        "address,undefined",
        ("libasan.so", "libubsan.so", "libstdc++.so.6"),
        {
            "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
    ),
    "thread": Sanitizer(
        "thread",
        ("libtsan.so", "libstdc++.so.6"),
        # Tests that fork with threads about would end there; a second lock of one thread is
        # Python's own business; what torch does to memory between its threads is torch's.
        {
            "TSAN_OPTIONS": "die_after_fork=0:detect_deadlocks=0:history_size=4"
            ":ignore_noninstrumented_modules=1:allocator_may_return_null=1"
        },
    ),
}
FINDING = re.compile(r"(?:ERROR|WARNING): \w+Sanitizer|: runtime error: ")
REFUSAL = re.compile(r"^==\d+==WARNING: \w+Sanitizer failed to allocate .*\n", re.MULTILINE)


def prepare(name: str) -> Path:
    """Builds csrc with the sanitizer, next to a copy of what the tests need."""
    folder = BUILD / name
    environment = {
        **os.environ,
        "DENSENET_EFFICIENT_CUDA": "0",
        "DENSENET_EFFICIENT_DEBUG": "1",
        "DENSENET_EFFICIENT_SANITIZE": SANITIZERS[name].flags,
    }
    for part in COPIED:
        target = folder / part
        if target.is_dir():
            shutil.rmtree(target)
        if (ROOT / part).is_dir():
            shutil.copytree(
                ROOT / part, target, ignore=shutil.ignore_patterns("*.so", "__pycache__")
            )
        else:
            shutil.copy2(ROOT / part, target)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return folder


def runtime(name: str) -> str:
    """The sanitizer's runtime, for LD_PRELOAD."""
    paths = []
    for library in SANITIZERS[name].runtimes:
        command = [os.environ.get("CXX", "g++"), f"-print-file-name={library}"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(found).is_absolute():
            raise SystemExit(f"{library}: the compiler has no such sanitizer runtime")
        paths.append(found)
    return ":".join(paths)


def run(name: str, arguments: list[str]) -> bool:
    """Runs the tests under one sanitizer and prints what it found; whether all was well."""
    folder = prepare(name)
    logs = folder / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    options = {
        variable: f"{value}:log_path={logs / 'log'}"
        for variable, value in SANITIZERS[name].options.items()
    }
    environment = {
        **os.environ,
        **options,
        "LD_PRELOAD": runtime(name),
        "OMP_NUM_THREADS": THREADS,
        "PYTHONPATH": str(folder),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    start = time.monotonic()
    # Without a random layout of memory: the thread sanitizer needs its own.
    done = subprocess.run(["setarch", "-R", *command], cwd=folder, env=environment)
    written = [REFUSAL.sub("", log.read_text()) for log in sorted(logs.iterdir())]
    reports = [report for report in written if report.strip()]
    findings = sum(len(FINDING.findall(report)) for report in reports)
    for report in reports:
        print(report)
    good = done.returncode == 0 and not reports
    print(
        f"{name} ({SANITIZERS[name].flags}, {THREADS} threads): "
        f"{'clean' if good else 'FAILED'}, {findings} findings, pytest exit status "
        f"{done.returncode}, {time.monotonic() - start:.0f} s",
        flush=True,
    )
    return good


def main() -> int:
    """The command."""
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sanitizers", nargs="*", metavar="SANITIZER", help=", ".join(SANITIZERS))
    chosen = parser.parse_args(words[:at]).sanitizers or list(SANITIZERS)
    outcomes = [run(name, words[at + 1 :] or list(TESTS)) for name in chosen]
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
