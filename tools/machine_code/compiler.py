"""The compiler and the disassembler: from a kernel file to each kernel's instructions, the place in
the source that each came from, and what the compiler reported."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from densenet_efficient.ops.interface import CUDA_NAMES, NAMES
from tools import ptxas_report

ROOT = Path(__file__).resolve().parents[2]
# The operators that multiply: what their tensor-core instructions come with is what is counted.
SOURCES = (
    *(name for name in NAMES if name.startswith(("norm_relu_conv", "transition"))),
    *CUDA_NAMES,
)
FAMILIES = {"86": ("86", "89"), "100": ("100", "120")}
"""Further architectures, by the one whose PTX they share: no condition of the sources tells them
apart, so the front end, most of a compilation, need run for the first of a family only."""
Listing = list[tuple[int, str]]
Place = tuple[str, int]  # file, line


class MissingToolError(RuntimeError):
    """nvcc or the disassembler is not installed."""


@dataclass(frozen=True)
class Tools:
    nvcc: str
    cuobjdump: str
    nvdisasm: str | None  # gives the places in the source


@dataclass(frozen=True)
class Compiled:
    """A kernel: its name with its template arguments, such as "norm_relu_conv1x1_forward<bf16, 128,
    1>", its instructions by address, and each one's places in the source, the innermost first."""

    name: str
    registers: int
    spills: int  # bytes, stored and loaded
    listing: Listing
    places: dict[int, tuple[Place, ...]] = field(default_factory=dict)


def find_tools() -> Tools:
    """Raises MissingToolError."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise MissingToolError("nvcc is not on the path")
    cuobjdump = _disassembler("cuobjdump")
    if cuobjdump is None:
        raise MissingToolError("cuobjdump is neither on the path nor in an installed triton")
    return Tools(nvcc, cuobjdump, _disassembler("nvdisasm"))


def _disassembler(name: str) -> str | None:
    found = shutil.which(name)
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
        return str(path) if path.is_file() else None
    return found


def nvcc_version(nvcc: str) -> str:
    text = run([nvcc, "--version"]).stdout
    found = re.search(r"V(\d+\.\d+)", text)
    return found.group(1) if found else "unknown"


def compile_kernels(arch: str, sources: tuple[str, ...] = SOURCES) -> list[Compiled]:
    """Compiles the sources for one architecture. Raises MissingToolError where a tool is missing
    and CalledProcessError where compiling fails."""
    tools = find_tools()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = pool.map(lambda source: _compile(source, arch, Path(folder), tools), sources)
        return sorted((k for part in parts for k in part), key=lambda kernel: kernel.name)


def reports_of_families(sources: tuple[str, ...] = SOURCES) -> list[ptxas_report.Kernel]:
    """What the compiler allots to every kernel on the architectures of FAMILIES, by "sm_86". Raises
    as compile_kernels."""
    tools = find_tools()
    targets = [
        f"-gencode=arch=compute_{first},code=[{','.join(f'sm_{arch}' for arch in family)}]"
        for first, family in FAMILIES.items()
    ]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:

        def allotted(source: str) -> list[ptxas_report.Kernel]:
            output = Path(folder, f"{source}.fatbin")
            report = _nvcc(source, [*targets, "-fatbin"], output, tools)
            return ptxas_report.parse_report(report, source)

        return [kernel for part in pool.map(allotted, sources) for kernel in part]


def _nvcc(source: str, options: list[str], output: Path, tools: Tools) -> str:
    """Compiles a kernel file; returns the report."""
    include = Path(torch.__file__).parent / "include"
    command = [tools.nvcc, "-std=c++20", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{include}", "-Xptxas", "-v"]
    command += [*options, str(ROOT / "csrc" / "cuda" / f"{source}.cu"), "-o", str(output)]
    return run(command).stderr


def _compile(source: str, arch: str, folder: Path, tools: Tools) -> list[Compiled]:
    cubin = folder / f"{source}.cubin"
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    resources = dict(read_resources(_nvcc(source, [target, "-lineinfo", "-cubin"], cubin, tools)))
    functions = dict(read_functions(run([tools.cuobjdump, "-sass", str(cubin)]).stdout))
    places: dict[str, dict[int, tuple[Place, ...]]] = {}
    if tools.nvdisasm is not None:
        places = read_places(run([tools.nvdisasm, "-gi", "-c", str(cubin)]).stdout)
    return [
        Compiled(kernel_name(symbol), *resources[symbol], listing, places.get(symbol, {}))
        for symbol, listing in functions.items()
    ]


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


def read_functions(code: str) -> Iterator[tuple[str, Listing]]:
    """(symbol, [(address, instruction)]) from cuobjdump -sass."""
    for part in code.split("Function : ")[1:]:
        symbol = part.split(None, 1)[0]
        lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", part, re.MULTILINE)
        yield symbol, [(int(address, 16), text.strip()) for address, text in lines]


def read_places(code: str) -> dict[str, dict[int, tuple[Place, ...]]]:
    """Of each symbol, an instruction's places by its address, from nvdisasm -gi."""
    result: dict[str, dict[int, tuple[Place, ...]]] = {}
    for part in re.split(r"^\.text\.", code, flags=re.MULTILINE)[1:]:
        symbol, _, body = part.partition(":")
        own = result.setdefault(symbol, {})
        current: list[Place] = []
        after_code = True
        for line in body.splitlines():
            if found := re.match(r'\s*//## File "([^"]*)", line (\d+)', line):
                if after_code:
                    current = []
                current.append((Path(found[1]).name, int(found[2])))
                after_code = False
            elif found := re.match(r"\s+/\*([0-9a-f]{4,})\*/", line):
                own[int(found[1], 16)] = tuple(current)
                after_code = True
    return result


def kernel_name(symbol: str) -> str:
    """Kernel and template arguments: "norm_relu_conv1x1_forward<bf16, 128, 1>"."""
    demangled = subprocess.run(["c++filt", symbol], capture_output=True, text=True).stdout
    found = re.search(r"(\w+)_kernel(?:<(.*?)>)?\(", demangled)
    return symbol if found is None else short_name(found[1], found[2] or "")


def short_name(kernel: str, arguments: str) -> str:
    """Of a kernel without its ending, and its template arguments as a compiler prints them."""
    text = re.sub(r"\((?:int|bool)\)", "", arguments)
    names = {"c10::": "", "BFloat16": "bf16", "Half": "fp16", "float": "tf32", "::": ""}
    for old, new in names.items():
        text = text.replace(old, new)
    return f"{kernel}<{text.strip()}>" if text.strip() else kernel
