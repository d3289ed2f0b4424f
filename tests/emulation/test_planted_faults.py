"""Faults planted in the kernels' sources, one at a time, and what the emulation says to each.

A fault is a change of one place of the text; should that place change, the test says so. Each is of
a kind that a GPU would often forgive: it runs, and is wrong now and then.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tests.support.emulators import HOPPER, emulator
from tests.support.kernel_check import compare
from tools.emulation import Device, EmulationError, Emulator, Mutation
from tools.op_cases import Case, make

pytestmark = pytest.mark.slow

SEEDS = range(4)


@dataclass(frozen=True)
class Fault:
    name: str
    operator: str
    sizes: tuple[int, ...]
    mutation: Mutation
    message: str  # of the error
    before: int = 0  # channels in front of the slice
    dtype: torch.dtype = torch.bfloat16
    width: int | None = None  # channels from row to row of x, where not to the next sector
    device: Device = HOPPER

    def case(self) -> Case:
        widths = {} if self.width is None else {"x": self.width}
        return make(self.operator, self.sizes, self.dtype, before=self.before, widths=widths)


FAULTS = [
    Fault(
        "missing block barrier",
        "channel_stats",
        (300, 16),
        Mutation(
            "cuda/reduce/block.cuh",
            "    sync_threads();\n    if (half == 0) break;",
            "    if (half == 0) break;",
        ),
        "race: shared byte",
    ),
    Fault(
        "barrier that some threads skip",
        "channel_stats",
        (300, 16),
        Mutation(
            "cuda/reduce/block.cuh",
            "    sync_threads();\n    if (half == 0) break;",
            "    if (at.lane < plan.lanes / 2) sync_threads();\n    if (half == 0) break;",
        ),
        "divergent barrier|not all threads reached a barrier",
    ),
    Fault(
        "tail longer by one row",
        "channel_stats",
        (300, 16),
        Mutation("cuda/channel_stats.cu", "if (row < end) {", "if (row <= end) {"),
        "heap-buffer-overflow",
    ),
    Fault(
        "shared memory too small by one plane",
        "channel_stats",
        (300, 16),
        Mutation("cuda/reduce/block.cuh", "(2 * V + Merge::kCounts)", "(2 * V)"),
        "access outside of shared memory",
    ),
    Fault(
        "vectors wider than the alignment",
        "channel_stats",
        (300, 12),
        Mutation("cuda/tiling/columns.h", "while (width > 1 &&", "while (width > 8 &&"),
        "misaligned access of 16 bytes",
        before=12,
    ),
    Fault(
        "asynchronous copy not waited for",
        "transition_forward",
        (1, 8, 8, 64, 32),
        Mutation("cuda/transition_forward.cu", "cp_async_wait<0>();", "cp_async_wait<1>();"),
        "before its asynchronous copy was waited for",
    ),
    Fault(
        "stage overwritten while others still read it",
        "transition_forward",
        (1, 8, 8, 64, 32),
        Mutation(
            "cuda/transition_forward.cu",
            "      cp_async_wait<0>();\n      sync_threads();\n",
            "      cp_async_wait<0>();\n      sync_warp();\n",
        ),
        "race: shared byte",
    ),
    Fault(
        "warp primitive that some lanes skip",
        "transition_forward",
        (1, 8, 8, 64, 32),
        Mutation(
            "cuda/gemm/epilogue.cuh",
            "shared_store(own + c, 0.0f);\n    sync_warp();",
            "shared_store(own + c, 0.0f);\n"
            "    if (lane_index() < 31) sync_warp(); else sync_warp();",
        ),
        "divergent warp primitive",
    ),
    Fault(
        "pixels overwritten while others still read them",
        "stem_conv_forward",
        (2, 40, 16, 3, 8),
        Mutation(
            "cuda/stem_conv_forward.cu",
            "    sync_threads();  // everyone is done with the tile before\n",
            "",
        ),
        "race: shared byte",
    ),
    Fault(
        "row of the gradient not waited for",
        "stem_conv_backward_weight",
        (1, 12, 16, 3, 8),
        Mutation("cuda/stem_conv_backward_weight.cu", "cp_async_wait<0>();", "cp_async_wait<1>();"),
        "before its asynchronous copy was waited for",
    ),
    Fault(
        "weight that is not rounded to TF32",
        "norm_relu_conv1x1_forward",
        (32, 16, 16),
        Mutation("cuda/conv1x1/forward.cuh", "    round_operands<T>(b);\n", ""),
        "operand that is not rounded to TF32",
        dtype=torch.float32,
    ),
    Fault(
        "sums overwritten while other warps still read them",
        "norm_relu_conv1x1_forward",
        (40, 16, 128),
        Mutation(
            "cuda/conv1x1/narrow_forward.cuh",
            "      if (group > 0 || tile > first_tile) sync_threads();",
            "",
        ),
        "race: shared byte",
    ),
    Fault(
        "panel overwritten while other lanes still read it",
        "norm_relu_conv1x1_forward",
        (40, 520, 128),
        Mutation(
            "cuda/conv1x1/narrow_forward.cuh",
            "      cp_async_wait<kStages - 2>();\n      sync_warp();\n",
            "      cp_async_wait<kStages - 2>();\n",
        ),
        "race: shared byte",
    ),
    Fault(
        "row of pixels before the first",
        "norm_relu_conv3x3_forward",
        (3, 14, 14, 128, 32),
        Mutation("cuda/conv3x3/halo.cuh", "return tile > 0 && tile <", "return tile <"),
        "heap-buffer-overflow",
        width=128,
        device=Device(multiprocessors=1),
    ),
]


def identifier(value: object) -> str:
    return value.name.replace(" ", "-") if isinstance(value, Fault) else str(value)


@pytest.mark.parametrize("fault", FAULTS, ids=identifier)
def test_fault_is_named(fault: Fault) -> None:
    torch.manual_seed(0)
    case = fault.case()
    with (
        Emulator([fault.operator], mutations=[fault.mutation]) as mutated,
        pytest.raises(EmulationError, match=fault.message),
    ):
        for seed in SEEDS:
            mutated.call(case.op, *case.arguments.values(), seed=seed, device=fault.device)


def test_read_of_an_unwritten_channel_shows_in_the_values() -> None:
    """Features after the last channel hold NaN; a zero weight would not hide them."""
    fault = Mutation(
        "cuda/transition_forward.cu",
        "exists ? left : 0, args.x.vector);",
        "exists ? left + (left == 4) : 0, args.x.vector);",
    )
    case = make("transition_forward", (1, 4, 4, 36, 16), torch.bfloat16)
    with Emulator(["transition_forward"], mutations=[fault]) as mutated:
        mutated.call(case.op, *case.arguments.values())
    assert case.outputs["y"].isnan().any()


def test_rows_that_no_warp_copies_show_in_the_values() -> None:
    fault = Mutation(
        "cuda/conv3x3/copies.cuh", "  if (part.one_more) cp_async", "  if (0) cp_async"
    )
    case = make("norm_relu_conv3x3_forward", (1, 40, 40, 128, 32), torch.bfloat16)
    inputs = case.inputs()
    with Emulator(["norm_relu_conv3x3_forward"], mutations=[fault]) as mutated:
        mutated.call(case.op, *case.arguments.values(), device=Device(multiprocessors=1))
    with pytest.raises(AssertionError):
        compare(case.op, inputs, case.outputs)


def test_result_that_depends_on_the_order_of_blocks_shows_in_the_bits() -> None:
    """Moments kept by the order in which blocks arrive, as with floating-point atomics."""
    fault = Mutation(
        "cuda/reduce/block.cuh",
        "  A* const out = partials + int64_t(block_x()) *",
        "  static int arrivals = 0;\n"
        "  const int slot = block_y() == 0 && thread == 0 ? arrivals++ : arrivals - 1;\n"
        "  A* const out = partials + int64_t(slot % grid_x()) *",
    )
    case = make("channel_stats", (3000, 64), torch.float32)
    results = []
    with Emulator(["channel_stats"], mutations=[fault]) as mutated:
        for seed in (0, 1):
            mutated.call(case.op, *case.arguments.values(), seed=seed)
            results.append(case.outputs["stats"].clone())
    assert not torch.equal(*results)


def test_sources_without_a_fault_pass() -> None:
    """The same calls, with nothing planted, are right: the messages above are the faults' own."""
    calls = {(f.operator, f.sizes, f.dtype, f.before, f.width, f.device): f for f in FAULTS}
    for fault in calls.values():
        case = fault.case()
        inputs = case.inputs()
        for seed in SEEDS:
            emulator().call(case.op, *case.arguments.values(), seed=seed, device=fault.device)
        compare(case.op, inputs, case.outputs)


def test_mutation_must_apply() -> None:
    with pytest.raises(EmulationError, match="must hold 'no such text' once, found 0"):
        Emulator(["norm_fold"], mutations=[Mutation("cuda/norm_fold.cu", "no such text", "")])


def test_unknown_stage_is_named() -> None:
    with pytest.raises(EmulationError, match="no such operator: pooling"):
        Emulator(["pooling"])
