"""Prints what the compiler made of the convolution kernels, and what they execute at the stages of
DenseNet-121, as two Markdown tables.

    python -m tools.machine_code [--arch 90a] [--write]

--write puts them into docs/kernels.md, where tests/tools compares with them. Needs nvcc, g++ and
the disassemblers cuobjdump and nvdisasm: from a CUDA toolkit, or from the triton package (pip
install --no-deps triton).
"""

from __future__ import annotations

import argparse

from . import document
from .compiler import compile_kernels, find_tools, nvcc_version
from .stages import stages
from .static import describe


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.machine_code", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--arch", default="90a", help="architecture, as in 80, 90a, 120")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/kernels.md")
    options = parser.parse_args()
    compiled = compile_kernels(options.arch)
    static = document.static_table([k for k in map(describe, compiled) if k.tensor])
    executed = document.executed_table(list(stages(compiled)))
    print(static, executed, sep="\n\n")
    if options.write:
        title = f"sm_{options.arch}, nvcc {nvcc_version(find_tools().nvcc)}"
        text = document.DOCUMENT.read_text()
        text = document.replaced(text, document.STATIC, f"{title}\n\n{static}")
        text = document.replaced(text, document.EXECUTED, f"{title}\n\n{executed}")
        document.DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()
