"""The convolution kernels' machine code against the tables in docs/kernels.md: no spills, no local
memory, tensor cores and 16-byte asynchronous copies in use, occupancy, instruction counts and
executed instructions no worse than they were."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from densenet_efficient.ops.interface import CUDA_NAMES
from tools import ptxas_report
from tools.emulation import Device
from tools.machine_code import compiler, decode, document, launches, sources, stages, warp
from tools.machine_code.executed import execute, name_of
from tools.machine_code.static import Kernel, describe
from tools.op_cases import make

ROOT = Path(__file__).resolve().parents[2]
ARCH = "90a"

DTYPES = ("bf16", "fp16", "tf32")

# Blocks that a multiprocessor is meant to hold, by kernel, and their threads. T: any dtype that has
# no entry of its own.
DESIGNED = {
    "norm_relu_conv1x1_forward<T, 64, 1>": (3, 128),
    "norm_relu_conv1x1_forward<T, 128, 1>": (2, 128),
    "norm_relu_conv1x1_forward<T, 64, 2>": (3, 128),
    "norm_relu_conv1x1_forward_narrow<T, 64, 4, 2>": (3, 128),
    "norm_relu_conv1x1_forward_narrow<T, 64, 4, 1>": (4, 128),
    "norm_relu_conv1x1_forward_narrow<T, 48, 4, 1>": (4, 128),
    "norm_relu_conv1x1_forward_narrow<T, 32, 4, 1>": (4, 128),
    "norm_relu_conv1x1_forward_narrow<T, 32, 8, 1>": (2, 256),
    "norm_relu_conv1x1_forward<T, 96, 2>": (2, 128),
    "norm_relu_conv1x1_backward<T, 64>": (1, 384),
    "norm_relu_conv1x1_backward<T, 128>": (1, 384),
    "norm_relu_conv1x1_backward<tf32, 128>": (1, 256),
    "norm_relu_conv1x1_backward<bf16, 192>": (1, 256),
    "norm_relu_conv1x1_backward<fp16, 192>": (1, 256),
    "norm_relu_conv3x3_forward<T, 16, false>": (2, 192),
    "norm_relu_conv3x3_forward<T, 32, false>": (2, 192),
    "norm_relu_conv3x3_forward<T, 48, false>": (1, 192),
    "norm_relu_conv3x3_forward<T, 16, true>": (1, 384),
    "norm_relu_conv3x3_forward<T, 32, true>": (1, 384),
    "norm_relu_conv3x3_forward<T, 48, true>": (1, 384),
    "norm_relu_conv3x3_backward_data<T, false, false>": (2, 192),
    "norm_relu_conv3x3_backward_data<T, true, false>": (2, 192),
    "norm_relu_conv3x3_backward_data<T, false, true>": (1, 384),
    "norm_relu_conv3x3_backward_data<T, true, true>": (1, 384),
    "norm_relu_conv3x3_backward_weight<T, 1>": (2, 192),
    "norm_relu_conv3x3_backward_weight<T, 2>": (2, 192),
    "norm_relu_conv3x3_backward_weight<T, 3>": (1, 192),
    "transition_forward<T, 64, 1>": (2, 128),
    "transition_forward<T, 128, 1>": (2, 128),
    "transition_forward<T, 128, 2>": (2, 128),
    "transition_backward_product<T>": (2, 128),
    "transition_backward_weight<T>": (2, 128),
    **{f"stem_conv_forward<{t}, {c}, {u}>": (3 if u == 2 and c % 2 else 2, 128)
       for t in ("bf16", "fp16") for c in (1, 2, 3, 4) for u in (2, 3)},
    **{f"stem_conv_backward_weight<{t}, {c}, {u}>": (1 if (c, u) == (4, 3) else 2, 224)
       for t in ("bf16", "fp16") for c in (1, 2, 3, 4) for u in (2, 3)},
}  # fmt: skip


def designed() -> dict[str, tuple[int, int]]:
    """The same by the kernels' names."""
    every = {n.replace("<T", f"<{t}"): d for n, d in DESIGNED.items() if "<T" in n for t in DTYPES}
    return every | {n: d for n, d in DESIGNED.items() if "<T" not in n}


@pytest.fixture(scope="module")
def stored() -> dict[str, Kernel]:
    return document.stored_kernels(document.DOCUMENT.read_text())


@pytest.fixture(scope="module")
def stored_stages() -> dict[tuple[str, str], document.StoredStage]:
    return document.stored_stages(document.DOCUMENT.read_text())


@pytest.fixture(scope="module")
def machine_code() -> list[compiler.Compiled]:
    try:
        return compiler.compile_kernels(ARCH)
    except compiler.MissingToolError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def on_other_architectures() -> list[ptxas_report.Kernel]:
    try:
        return compiler.reports_of_families()
    except compiler.MissingToolError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def compiled(machine_code: list[compiler.Compiled]) -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in map(describe, machine_code) if kernel.tensor}


@pytest.mark.slow
def test_no_instruction_that_ptxas_gets_wrong(machine_code: list[compiler.Compiled]) -> None:
    """max(min(n, 8), 0) == 8 becomes a VIMNMX.RELU whose two predicates share a register, which
    then says n > 0: seen with ptxas 13.0 on a GPU, as stores past the last channel."""
    wrong = re.compile(r"VIMNMX\.RELU \w+, (P[0-6]), \1,")
    for kernel in machine_code:
        found = [text for _, text in kernel.listing if wrong.search(text)]
        assert not found, f"{kernel.name}: {found[:3]}"


def test_the_table_names_every_kernel(stored: dict[str, Kernel]) -> None:
    assert set(stored) == set(designed())


def test_the_table_is_clean(stored: dict[str, Kernel]) -> None:
    assert all(kernel.spills == 0 and kernel.local == 0 for kernel in stored.values())


@pytest.mark.slow
def test_kernels_use_the_hardware(compiled: dict[str, Kernel]) -> None:
    for kernel in compiled.values():
        assert kernel.spills == 0 and kernel.local == 0, f"{kernel.name} spills registers"
        assert kernel.tensor > 0, f"{kernel.name} has no tensor-core instructions"
        if not kernel.name.startswith("stem_conv_forward"):  # which rounds pixels on their way
            assert kernel.copies > 0, f"{kernel.name} has no 16-byte asynchronous copies"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["86", "89", "100", "120"])
def test_no_kernel_spills_on_other_architectures(
    on_other_architectures: list[ptxas_report.Kernel], arch: str
) -> None:
    """The build compiles sm_80 and sm_90a, and its report is checked as well. What touches local
    memory has a stack there."""
    kernels = [kernel for kernel in on_other_architectures if kernel.arch == f"sm_{arch}"]
    assert {kernel.file for kernel in kernels} == set(compiler.SOURCES)
    for kernel in kernels:
        spills = kernel.spill_stores + kernel.spill_loads
        assert spills == 0 and kernel.stack == 0, f"{kernel.name} spills on {kernel.arch}"


def test_no_source_tells_the_architectures_of_a_family_apart() -> None:
    """Which share the code that their machine code is made from."""
    for path in (ROOT / "csrc").rglob("*.cu*"):
        for condition in re.findall(r"^\s*#.*__CUDA_ARCH.*", path.read_text(), re.MULTILINE):
            for bound in map(int, re.findall(r"\b\d+\b", condition)):
                for first, *others in compiler.FAMILIES.values():
                    apart = any(10 * int(first) < bound <= 10 * int(other) for other in others)
                    assert not apart, f"{path}: {condition}"


@pytest.mark.slow
def test_registers_leave_room_for_the_designed_blocks(compiled: dict[str, Kernel]) -> None:
    for name, (blocks, threads) in designed().items():
        kernel = compiled[name]
        assert kernel.blocks(threads) >= blocks, f"{name}: {kernel.registers} registers"


@pytest.mark.slow
def test_no_more_instructions_than_the_table_says(
    compiled: dict[str, Kernel], stored: dict[str, Kernel]
) -> None:
    assert set(compiled) == set(stored), "python -m tools.machine_code --write renews it"
    for name, kernel in compiled.items():
        before = stored[name]
        assert kernel.tensor == before.tensor, name
        assert kernel.product <= 1.05 * before.product, f"{name}: {kernel.product:.2f}"
        assert kernel.instructions <= 1.05 * before.instructions, name


@pytest.mark.slow
def test_no_stage_executes_more_than_the_table_says(
    machine_code: list[compiler.Compiled],
    stored_stages: dict[tuple[str, str], document.StoredStage],
) -> None:
    """Of the stem and of two blocks, whose kernels and tiles are those of all."""
    for block, one in stages.stages(machine_code, ("stem", "block 1", "block 4")):
        before = stored_stages[block, one.kernel]
        assert one.per_tensor <= 1.02 * before.per_tensor, f"{block}, {one.kernel}"
        assert one.per_copy <= 1.02 * before.per_copy, f"{block}, {one.kernel}"


@pytest.mark.slow
def test_as_many_products_are_executed_as_emulated(machine_code: list[compiler.Compiled]) -> None:
    """The machine code followed, and the sources emulated, for one layer of each kernel."""
    by_name = {kernel.name: kernel for kernel in machine_code}
    sizes = {"1x1": (2048, 96, 128), "3x3": (8, 14, 14, 64, 32), "stem": (8, 64, 64, 3, 64)}
    operators = (*stages.OPERATORS, *CUDA_NAMES)
    with launches.Launchers(operators) as launchers:
        for op in operators:
            shape = launches.Shape(op, next(s for name, s in sizes.items() if name in op))
            listed = launchers.launches(shape, Device())
            case = make(op, shape.sizes, torch.bfloat16)
            emulated = launchers.emulator.call(op, *case.arguments.values())
            for launch, done in zip(listed, emulated, strict=True):
                if launch.tiles:
                    one = execute(launch, by_name[name_of(launch)])
                    assert one.tensor == done.mma > 0, one.kernel


def test_a_loop_and_a_divergent_branch_are_followed() -> None:
    """Six trips for the warp; the region that eight lanes skip is issued once."""
    listing = [
        (0x00, "S2R R0, SR_TID.X"),
        (0x10, "MOV R1, RZ"),
        (0x20, "ISETP.GE.AND P1, PT, R0, 0x8, PT"),
        (0x30, "BSSY B0, 0x60"),
        (0x40, "@!P1 BRA 0x60"),
        (0x50, "IADD3 R2, R0, -0x8, RZ"),
        (0x60, "BSYNC B0"),
        (0x70, "IADD3 R1, R1, 0x1, RZ"),
        (0x80, "ISETP.LT.U32.AND P0, PT, R1, c[0x0][0x210], PT"),
        (0x90, "@P0 BRA 0x70"),
        (0xA0, "EXIT"),
    ]
    state = warp.LaunchState({0x210: 6}, (1, 1), 32, 0)
    [one] = warp.run_block(decode.Code.of(listing), state, (0, 0))
    assert [one.issued[at] for at, _ in listing] == [1, 1, 1, 1, 1, 1, 1, 6, 6, 6, 1]


def test_a_way_that_depends_on_data_is_refused() -> None:
    listing = [
        (0x00, "LDG.E R0, desc[UR4][R2.64]"),
        (0x10, "ISETP.NE.AND P0, PT, R0, RZ, PT"),
        (0x20, "@P0 BRA 0x0"),
        (0x30, "EXIT"),
    ]
    with pytest.raises(warp.UnknownWayError, match="0x20"):
        warp.run_block(decode.Code.of(listing), warp.LaunchState({}, (1, 1), 32, 0), (0, 0))


def test_parts_follow_the_functions_of_the_sources() -> None:
    def line_of(file: str, text: str) -> tuple[str, int]:
        path = next((ROOT / "csrc").rglob(file))
        lines = path.read_text().splitlines()
        return file, next(i for i, line in enumerate(lines, 1) if text in line)

    load = line_of("norm_relu_conv1x1_forward.cu", "cp_async<16>(stage + to + row")
    wait = line_of("norm_relu_conv1x1_forward.cu", "cp_async_wait<kStages - 2>")
    moments = line_of("epilogue.cuh", "m2s[k] +=")
    assert [sources.part_of((place,)) for place in (load, wait, moments)] == [
        "copies",
        "rest",
        "moments",
    ]


def test_blocks_of_a_multiprocessor() -> None:
    """Warps of 32 threads take registers in steps of 256; four parts hold 16,384 each."""

    def blocks(registers: int, threads: int) -> int:
        return Kernel("", registers, 0, 0, 1, 1, 0.0, 0.0, 1).blocks(threads)

    assert blocks(168, 128) == 3 and blocks(169, 128) == 2
    assert blocks(128, 256) == 2 and blocks(129, 256) == 1
    assert blocks(255, 256) == 1


def test_disassembly_is_read() -> None:
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
    [(symbol, instructions)] = list(compiler.read_functions(code))
    assert symbol == "kernel" and len(instructions) == 8
    kernel = describe(compiler.Compiled(symbol, 40, 8, instructions))
    assert (kernel.tensor, kernel.copies, kernel.local, kernel.spills) == (2, 1, 1, 8)
    assert kernel.product == 1.0 and kernel.loop == 1.0
