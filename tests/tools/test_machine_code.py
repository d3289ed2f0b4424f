"""The convolution kernels' machine code against the table in docs/kernels.md: no spills, no local
memory, tensor cores and 16-byte asynchronous copies in use, occupancy and instruction counts no
worse than they were."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCH = "90a"

DTYPES = ("bf16", "fp16", "tf32")

# Blocks that a multiprocessor is meant to hold, by kernel, and their threads. T: any dtype that has
# no entry of its own.
DESIGNED = {
    "norm_relu_conv1x1_forward<T, 64, 1>": (3, 128),
    "norm_relu_conv1x1_forward<T, 128, 1>": (1, 256),
    "norm_relu_conv1x1_forward<T, 96, 2>": (1, 256),
    "norm_relu_conv1x1_backward<T, 64>": (3, 128),
    "norm_relu_conv1x1_backward<T, 128>": (3, 128),
    "norm_relu_conv1x1_backward<tf32, 128>": (2, 128),
    "norm_relu_conv1x1_backward<bf16, 192>": (2, 128),
    "norm_relu_conv1x1_backward<fp16, 192>": (2, 128),
    "norm_relu_conv3x3_forward<T, 16>": (2, 192),
    "norm_relu_conv3x3_forward<T, 32>": (2, 192),
    "norm_relu_conv3x3_forward<T, 48>": (1, 192),
    "norm_relu_conv3x3_backward_data<T, false>": (2, 192),
    "norm_relu_conv3x3_backward_data<T, true>": (2, 192),
    "norm_relu_conv3x3_backward_weight<T, 1>": (2, 192),
    "norm_relu_conv3x3_backward_weight<T, 2>": (2, 192),
    "norm_relu_conv3x3_backward_weight<T, 3>": (1, 192),
    "transition_forward<T, 64, 1>": (2, 128),
    "transition_forward<T, 128, 1>": (2, 128),
    "transition_forward<T, 128, 2>": (2, 128),
    "transition_backward_product<T>": (2, 128),
    "transition_backward_weight<T>": (2, 128),
}


def designed() -> dict[str, tuple[int, int]]:
    """The same by the kernels' names."""
    every = {n.replace("<T", f"<{t}"): d for n, d in DESIGNED.items() if "<T" in n for t in DTYPES}
    return every | {n: d for n, d in DESIGNED.items() if "<T" not in n}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "machine_code", ROOT / "tools" / "machine_code.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["machine_code"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stored(tool: ModuleType) -> dict[str, Any]:
    return tool.stored_table(tool.DOCUMENT.read_text())


@pytest.fixture(scope="module")
def compiled(tool: ModuleType) -> dict[str, Any]:
    try:
        tool.find_tools()
    except tool.MissingToolError as missing:
        pytest.skip(str(missing))
    return {kernel.name: kernel for kernel in tool.compile_kernels(ARCH)}


def test_the_table_names_every_kernel(stored: dict[str, Any]) -> None:
    assert set(stored) == set(designed())


def test_the_table_is_clean(stored: dict[str, Any]) -> None:
    assert all(kernel.spills == 0 and kernel.local == 0 for kernel in stored.values())


@pytest.mark.slow
def test_kernels_use_the_hardware(compiled: dict[str, Any]) -> None:
    for kernel in compiled.values():
        assert kernel.spills == 0 and kernel.local == 0, f"{kernel.name} spills registers"
        assert kernel.tensor > 0, f"{kernel.name} has no tensor-core instructions"
        assert kernel.copies > 0, f"{kernel.name} has no 16-byte asynchronous copies"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["86", "89", "100", "120"])
def test_no_kernel_spills_on_other_architectures(tool: ModuleType, arch: str) -> None:
    """The build compiles sm_80 and sm_90a, and its report is checked as well."""
    try:
        tool.find_tools()
    except tool.MissingToolError as missing:
        pytest.skip(str(missing))
    for kernel in tool.compile_kernels(arch):
        assert kernel.spills == 0 and kernel.local == 0, f"{kernel.name} spills on sm_{arch}"


@pytest.mark.slow
def test_registers_leave_room_for_the_designed_blocks(compiled: dict[str, Any]) -> None:
    for name, (blocks, threads) in designed().items():
        kernel = compiled[name]
        assert kernel.blocks(threads) >= blocks, f"{name}: {kernel.registers} registers"


@pytest.mark.slow
def test_no_more_instructions_than_the_table_says(
    compiled: dict[str, Any], stored: dict[str, Any]
) -> None:
    assert set(compiled) == set(stored), "python tools/machine_code.py --write brings it up to date"
    for name, kernel in compiled.items():
        before = stored[name]
        assert kernel.tensor == before.tensor, name
        assert kernel.product <= 1.05 * before.product, f"{name}: {kernel.product:.2f}"
        assert kernel.instructions <= 1.05 * before.instructions, name


def test_blocks_of_a_multiprocessor(tool: ModuleType) -> None:
    """Warps of 32 threads take registers in steps of 256; four parts hold 16,384 each."""

    def blocks(registers: int, threads: int) -> int:
        return tool.Kernel("", registers, 0, 0, 1, 1, 0.0, 0.0, 1).blocks(threads)

    assert blocks(168, 128) == 3 and blocks(169, 128) == 2
    assert blocks(128, 256) == 2 and blocks(129, 256) == 1
    assert blocks(255, 256) == 1


def test_disassembly_is_read(tool: ModuleType) -> None:
    """A loop of four instructions with two products, behind a predicate and a branch."""
    code = """
        Function : kernel
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   LDSM.16.M88.4 R4, [R0] ;
        /*0020*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0030*/              @!P0 HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0040*/               @P0 BRA 0x10 ;
        /*0050*/                   LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64] ;
        /*0060*/                   STL [R1], R2 ;
        /*0070*/                   EXIT ;
"""
    [(symbol, instructions)] = list(tool.read_functions(code))
    assert symbol == "kernel" and len(instructions) == 8
    kernel = tool.describe(symbol, instructions, (40, 8))
    assert (kernel.tensor, kernel.copies, kernel.local, kernel.spills) == (2, 1, 1, 8)
    assert kernel.product == 1.0 and kernel.loop == 1.0
