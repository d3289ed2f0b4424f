"""What the compiler made of the convolution kernels: registers, spills, and the instructions around
the tensor cores, read from `ptxas -v` and the disassembly.

    python tools/machine_code.py [--arch 90a] [--write]

prints a table with a row for each kernel, in Markdown; --write puts it into docs/kernels.md, where
tests/tools compares with it. Needs nvcc, and the disassembler cuobjdump: from a
CUDA toolkit, or from the triton package (pip install --no-deps triton).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- machine code: begin -->", "<!-- machine code: end -->"
SOURCES = (
    "norm_relu_conv1x1_forward",
    "norm_relu_conv1x1_backward",
    "norm_relu_conv3x3_forward",
    "norm_relu_conv3x3_backward",
    "transition_forward",
    "transition_backward",
)
# Instructions by the beginning of their name.
TENSOR = ("HMMA", "HGMMA", "UTCHMMA")
LOCAL = ("LDL", "STL")


class MissingToolError(RuntimeError):
    """nvcc or the disassembler is not installed."""


@dataclass(frozen=True)
class Kernel:
    """One row of the table. spills: bytes stored and loaded; local: instructions that touch local
    memory; copies: 16-byte asynchronous copies. Instructions beside each tensor-core instruction:
    `product` in the basic blocks that hold any, `loop` in the innermost loops that hold any, with
    loads under way, ways for unaligned rows that are not taken, and all."""

    name: str
    registers: int
    spills: int
    local: int
    tensor: int
    copies: int
    product: float
    loop: float
    instructions: int

    def blocks(self, threads: int) -> int:
        """Blocks that one multiprocessor's 65,536 registers hold; each of its four parts takes
        whole warps."""
        per_warp = -(-self.registers * 32 // 256) * 256
        return 4 * (16384 // per_warp) // (threads // 32)


def find_tools() -> tuple[str, str]:
    """Paths of nvcc and cuobjdump. Raises MissingToolError."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise MissingToolError("nvcc is not on the path")
    cuobjdump = shutil.which("cuobjdump")
    if cuobjdump is None:
        triton = importlib.util.find_spec("triton")
        if triton is not None and triton.origin is not None:
            found = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
            cuobjdump = str(found) if found.is_file() else None
    if cuobjdump is None:
        raise MissingToolError("cuobjdump is neither on the path nor in an installed triton")
    return nvcc, cuobjdump


def nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+)", text)
    return found.group(1) if found else "unknown"


def compile_kernels(arch: str, sources: tuple[str, ...] = SOURCES) -> list[Kernel]:
    """Compiles the sources for one architecture and reads every tensor-core kernel. Raises
    MissingToolError where a tool is missing and CalledProcessError where compiling fails."""
    tools = find_tools()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = pool.map(lambda source: compile_source(source, arch, Path(folder), tools), sources)
        return sorted((k for part in parts for k in part), key=lambda kernel: kernel.name)


def compile_source(source: str, arch: str, folder: Path, tools: tuple[str, str]) -> list[Kernel]:
    nvcc, cuobjdump = tools
    include = Path(torch.__file__).parent / "include"
    cubin = folder / f"{source}.cubin"
    command = [nvcc, "-std=c++20", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{include}"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v", "-cubin"]
    command += [str(ROOT / "csrc" / "cuda" / f"{source}.cu"), "-o", str(cubin)]
    report = run(command).stderr
    resources = dict(read_resources(report))
    kernels = [
        describe(symbol, instructions, resources[symbol])
        for symbol, instructions in read_functions(run([cuobjdump, "-sass", str(cubin)]).stdout)
    ]
    return [kernel for kernel in kernels if kernel.tensor]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True)


def read_resources(report: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """(symbol, (registers, bytes spilled)) from the compiler's report."""
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    for found in re.finditer(pattern, report, re.DOTALL):
        yield found[1], (int(found[4]), int(found[2]) + int(found[3]))


def read_functions(code: str) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """(symbol, [(address, instruction)]) from cuobjdump -sass."""
    for part in code.split("Function : ")[1:]:
        symbol = part.split(None, 1)[0]
        lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", part, re.MULTILINE)
        yield symbol, [(int(address, 16), text.strip()) for address, text in lines]


def describe(
    symbol: str, instructions: list[tuple[int, str]], resources: tuple[int, int]
) -> Kernel:
    names = [(address, mnemonic(text)) for address, text in instructions]
    tensor = sum(name.startswith(TENSOR) for _, name in names)
    product = sum(len(block) for block in basic_blocks(instructions) if has_tensor(block))
    loops = innermost_loops(instructions)
    in_loops = sum(mnemonic(text).startswith(TENSOR) for loop in loops for text in loop)
    return Kernel(
        name=kernel_name(symbol),
        registers=resources[0],
        spills=resources[1],
        local=sum(name.startswith(LOCAL) for _, name in names),
        tensor=tensor,
        copies=sum(name.startswith("LDGSTS") and ".128" in name for _, name in names),
        product=(product - tensor) / tensor if tensor else 0.0,
        loop=sum(len(loop) for loop in loops) / in_loops - 1 if in_loops else 0.0,
        instructions=sum(name != "NOP" for _, name in names),
    )


def has_tensor(code: list[str]) -> bool:
    return any(mnemonic(text).startswith(TENSOR) for text in code)


def innermost_loops(instructions: list[tuple[int, str]]) -> list[list[str]]:
    """The loops with tensor-core instructions that hold no smaller loop with any."""
    index = {address: i for i, (address, _) in enumerate(instructions)}
    loops: list[tuple[int, int]] = []
    for end, (address, text) in enumerate(instructions):
        target = re.search(r"0x([0-9a-f]+)$", text)
        if mnemonic(text).startswith("BRA") and target and int(target[1], 16) < address:
            begin = index[int(target[1], 16)]
            if has_tensor([code for _, code in instructions[begin : end + 1]]):
                loops.append((begin, end))
    innermost = [
        (begin, end)
        for begin, end in loops
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in loops)
    ]
    return [[code for _, code in instructions[begin : end + 1]] for begin, end in innermost]


def mnemonic(text: str) -> str:
    """The instruction's name, without the predicate before it and the operands behind it."""
    words = text.split()
    return words[1] if words[0].startswith("@") else words[0]


def basic_blocks(instructions: list[tuple[int, str]]) -> list[list[str]]:
    """Runs of instructions that are entered at their first and left at their last."""
    targets = {
        int(t, 16)
        for _, text in instructions
        for t in re.findall(r"0x([0-9a-f]+)$", text)
        if mnemonic(text).startswith(("BRA", "BSSY"))
    }
    blocks: list[list[str]] = [[]]
    for address, text in instructions:
        if address in targets and blocks[-1]:
            blocks.append([])
        blocks[-1].append(text)
        if mnemonic(text).startswith(("BRA", "EXIT", "BAR", "CALL", "RET")):
            blocks.append([])
    return blocks


def kernel_name(symbol: str) -> str:
    """Kernel and template arguments: "norm_relu_conv1x1_forward<bf16, 128, 1>"."""
    demangled = subprocess.run(["c++filt", symbol], capture_output=True, text=True).stdout
    found = re.search(r"(\w+)_kernel(?:<(.*?)>)?\(", demangled)
    if found is None:
        return symbol
    text = re.sub(r"\((?:int|bool)\)", "", found[2] or "")
    names = {"c10::": "", "BFloat16": "bf16", "Half": "fp16", "float": "tf32", "::": ""}
    for old, new in names.items():
        text = text.replace(old, new)
    return f"{found[1]}<{text.strip()}>"


def table(kernels: list[Kernel]) -> str:
    """The kernels as a Markdown table."""
    rows = ["| " + " | ".join(field.name for field in fields(Kernel)) + " |"]
    rows.append("|---" * len(fields(Kernel)) + "|")
    for kernel in kernels:
        values = [getattr(kernel, field.name) for field in fields(Kernel)]
        rows.append(
            "| " + " | ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in values) + " |"
        )
    return "\n".join(rows)


def stored_table(document: str) -> dict[str, Kernel]:
    """The kernels of a document's table, by name."""
    between = document.split(BEGIN, 1)[1].split(END, 1)[0]
    kernels = {}
    for line in between.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) != len(fields(Kernel)) or not cells[1].isdigit():
            continue
        counts = [float(c) if "." in c else int(c) for c in cells[1:]]
        kernels[cells[0]] = Kernel(cells[0], *counts)  # type: ignore[arg-type]
    return kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="90a", help="architecture, as in 80, 90a, 120")
    parser.add_argument("--write", action="store_true", help="put the table into docs/kernels.md")
    arguments = parser.parse_args()
    text = table(compile_kernels(arguments.arch))
    print(text)
    if arguments.write:
        document = DOCUMENT.read_text()
        before, rest = document.split(BEGIN, 1)
        after = rest.split(END, 1)[1]
        title = f"sm_{arguments.arch}, nvcc {nvcc_version(find_tools()[0])}"
        DOCUMENT.write_text(f"{before}{BEGIN}\n{title}\n\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
