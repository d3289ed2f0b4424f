"""Reads ptxas's resource reports of a build: registers, shared memory and spills of every kernel.

    python tools/ptxas_report.py build/native/cuda [--csv]

Prints a table and exits with 1 where any kernel spills registers to local memory.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Kernel:
    """What ptxas allots to one kernel on one architecture."""

    file: str
    arch: str
    name: str  # demangled where c++filt is there
    registers: int
    shared: int  # bytes, static
    stack: int  # bytes of local memory a thread
    spill_stores: int  # bytes
    spill_loads: int  # bytes


_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse_report(text: str, file: str) -> list[Kernel]:
    """The kernels of one report, the output of ``nvcc -Xptxas -v``."""
    kernels = []
    entry: tuple[str, str] | None = None
    stack = (0, 0, 0)
    for line in text.splitlines():
        if match := _ENTRY.search(line):
            entry, stack = (match[1], match[2]), (0, 0, 0)
        elif match := _STACK.search(line):
            stack = (int(match[1]), int(match[2]), int(match[3]))
        elif entry and (match := _USED.search(line)):
            shared = _SHARED.search(line)
            kernels.append(
                Kernel(
                    file,
                    entry[1],
                    entry[0],
                    int(match[1]),
                    int(shared[1]) if shared else 0,
                    *stack,
                )
            )
            entry = None
    return kernels


def read_reports(folder: Path) -> list[Kernel]:
    """All kernels of a build folder, names demangled; SystemExit where it holds no report."""
    reports = sorted(folder.glob("*.ptxas"))
    if not reports:
        raise SystemExit(f"{folder} holds no *.ptxas reports: build the CUDA kernels first")
    kernels = [
        kernel
        for report in reports
        for kernel in parse_report(report.read_text(), report.name.partition(".")[0])
    ]
    return demangled(kernels)


def demangled(kernels: list[Kernel]) -> list[Kernel]:
    """The same kernels under readable names: no return type, no argument list, no namespace."""
    if shutil.which("c++filt") is None:
        return kernels
    names = "\n".join(kernel.name for kernel in kernels)
    plain = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True)
    result = []
    for kernel, name in zip(kernels, plain.stdout.split("\n"), strict=False):
        short = re.sub(r"\(anonymous namespace\)::|densenet_efficient::|cuda::", "", name)
        short = re.sub(r"^void ", "", short)
        depth = 0
        for position, character in enumerate(short):
            depth += (character == "<") - (character == ">")
            if character == "(" and depth == 0:
                short = short[:position]
                break
        result.append(Kernel(**{**kernel.__dict__, "name": short}))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--csv", action="store_true", help="print comma-separated values")
    arguments = parser.parse_args()
    kernels = read_reports(arguments.folder)
    header = ("file", "arch", "registers", "shared", "stack", "spills", "kernel")
    rows = [
        (k.file, k.arch, k.registers, k.shared, k.stack, k.spill_stores + k.spill_loads, k.name)
        for k in kernels
    ]
    if arguments.csv:
        print("\n".join(",".join(map(str, row)) for row in [header, *rows]))
    else:
        for file, arch, registers, shared, stack, spills, name in [header, *rows]:
            print(f"{file:<28}{arch:<8}{registers:>10}{shared:>9}{stack:>7}{spills:>8}  {name}")
    return check(kernels)


def check(kernels: list[Kernel]) -> int:
    """Names the kernels that spill; the exit status, 1 where there is one."""
    spilling = [k for k in kernels if k.spill_stores + k.spill_loads]
    for k in spilling:
        print(
            f"error: {k.file} ({k.arch}): {k.name} spills {k.spill_stores} bytes of stores and "
            f"{k.spill_loads} of loads",
            file=sys.stderr,
        )
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
