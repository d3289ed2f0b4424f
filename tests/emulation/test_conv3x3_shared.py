"""The 3x3 convolution where warps share pixels: few pixels for the device, so that launchers choose
other kernels and other grids than test_conv3x3.py meets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.emulators import check, emulator
from tests.support.identifiers import identifier
from tools.emulation import Device
from tools.op_cases import make

pytestmark = pytest.mark.slow

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FORWARD, BACKWARD = "norm_relu_conv3x3_forward", "norm_relu_conv3x3_backward"
ONE, TWO, THREE, FOUR = (Device(multiprocessors=n) for n in (1, 2, 3, 4))
LITTLE, LITTLE_TWO, LITTLE_THREE = (Device(n, 99 << 10) for n in (1, 2, 3))

# (images, height, width, channels, outputs), dtype, device, then what is launched: template
# arguments, warps of a block, blocks, tiles; reason
FORWARDS = [
    ((1, 8, 8, 64, 32), BF16, ONE, "32, true", 6, (1, 1), 1, "two groups exactly"),
    ((5, 3, 3, 33, 17), FP16, FOUR, "16, true", 3, (2, 2), 2, "blocks divide outputs: 16 and 1"),
    ((2, 9, 9, 40, 24), BF16, TWO, "32, true", 9, (2, 1), 2, "the last group's pixels have a tail"),
    ((1, 14, 14, 128, 32), BF16, TWO, "32, true", 12, (2, 1), 2, "four groups, four panels"),
    ((3, 7, 7, 96, 33), FP16, TWO, "48, true", 9, (2, 1), 2, "48 outputs by one"),
    ((1, 5, 6, 20, 12), BF16, ONE, "16, true", 3, (1, 1), 1, "one group"),
    ((1, 5, 6, 100, 12), BF16, ONE, "16, true", 6, (1, 1), 1, "one group: halves of the depth"),
    ((1, 5, 6, 132, 40), FP32, TWO, "32, true", 6, (1, 2), 1, "TF32: halves of the depth"),
    ((1, 2, 130, 40, 12), BF16, LITTLE, "16, true", 9, (1, 1), 3, "strips, tiles in turn"),
    ((1, 14, 14, 128, 32), BF16, FOUR, "32, true", 6, (4, 1), 4, "tiles with all of their halo"),
    ((1, 28, 28, 72, 32), FP16, LITTLE, "32, false", 5, (1, 1), 3, "none shared, tiles in turn"),
    ((4, 14, 14, 72, 16), FP32, LITTLE, "16, false", 5, (1, 1), 3, "TF32: none shared"),
    ((1, 16, 16, 48, 12), BF16, TWO, "16, true", 12, (2, 1), 2, "four groups, no tail"),
    ((2, 14, 14, 72, 40), FP32, LITTLE_THREE, "48, true", 9, (3, 1), 6, "TF32: tiles in turn"),
    ((5, 3, 3, 33, 24), FP32, ONE, "32, true", 6, (1, 1), 1, "TF32: a third panel of one channel"),
    ((1, 14, 14, 128, 32), BF16, ONE, "32, false", 4, (1, 1), 1, "none shared: one tile"),
]  # fmt: skip
BACKWARDS = [
    ((1, 8, 8, 64, 32), BF16, FOUR, "false, true", 4, (1, 2), 1, "a block for each panel"),
    ((5, 3, 3, 40, 24), FP16, FOUR, "false, true", 4, (1, 2), 1, "the second panel of 8 channels"),
    ((1, 14, 14, 128, 32), BF16, ONE, "false, true", 8, (1, 2), 2, "two panels for each block"),
    ((8, 7, 7, 33, 17), BF16, LITTLE_THREE, "false, true", 10, (3, 1), 3, "C and K tails"),
    ((2, 14, 14, 72, 40), BF16, LITTLE, "false, true", 10, (1, 1), 3, "two panels of outputs"),
    ((1, 2, 130, 40, 12), FP16, LITTLE, "false, true", 6, (1, 1), 3, "strips in turn"),
    ((2, 28, 28, 72, 32), BF16, LITTLE, "false, false", 4, (1, 1), 7, "none shared, C tail"),
    ((1, 28, 28, 72, 32), FP32, LITTLE, "false, false", 4, (1, 1), 4, "TF32: none shared"),
    ((1, 5, 6, 20, 12), BF16, ONE, "false, true", 2, (1, 1), 1, "one group"),
    ((2, 9, 9, 40, 24), FP32, TWO, "false, true", 6, (1, 2), 1, "TF32: channels divided"),
    ((2, 14, 14, 40, 24), FP32, LITTLE, "false, true", 7, (1, 1), 2, "TF32: tiles in turn"),
]  # fmt: skip


def check_launch(
    op: str, sizes: tuple[int, ...], dtype: torch.dtype, device: Device,
    expected: tuple[object, ...], **changes: Any,
) -> None:  # fmt: skip
    """The kernel that is meant, right, the same bits in any order, and no bank conflicts."""
    case = make(op, sizes, dtype, **changes)
    [launch] = [one for one in emulator().call(op, *case.arguments.values(), device=device)
                if "forward_kernel" in one.kernel or "data_kernel" in one.kernel]  # fmt: skip
    arguments = launch.kernel.partition(", ")[2].rstrip(">")
    assert (arguments, launch.block // 32, launch.grid, launch.tiles) == expected
    if all(size % 16 == 0 for size in sizes[3:]):
        assert launch.conflict_factor == 1.0
    check(emulator(), make(op, sizes, dtype, **changes), device)


@pytest.mark.parametrize(
    ("op", "sizes", "dtype", "device", "arguments", "warps", "grid", "tiles", "reason"),
    [(FORWARD, *case) for case in FORWARDS] + [(BACKWARD, *case) for case in BACKWARDS],
    ids=identifier,
)
def test_shared_pixels(
    op: str, sizes: tuple[int, ...], dtype: torch.dtype, device: Device, arguments: str,
    warps: int, grid: tuple[int, int], tiles: int, reason: str,
) -> None:  # fmt: skip
    check_launch(op, sizes, dtype, device, (arguments, warps, grid, tiles))


@pytest.mark.parametrize(
    ("sizes", "dtype", "device", "warps", "grid", "tiles"),
    [
        ((2, 14, 14, 40, 24), BF16, LITTLE_TWO, 8, (2, 1), 4),
        ((2, 14, 14, 40, 24), FP32, LITTLE_TWO, 4, (2, 1), 4),
        ((1, 2, 130, 40, 12), FP16, LITTLE_TWO, 6, (2, 1), 3),
    ],
    ids=identifier,
)
def test_accumulating(
    sizes: tuple[int, ...], dtype: torch.dtype, device: Device, warps: int, grid: tuple[int, int],
    tiles: int,
) -> None:  # fmt: skip
    """A plain layer's data gradient is added to what other layers left, times its own scale."""
    expected = ("true, true", warps, grid, tiles)
    check_launch(BACKWARD, sizes, dtype, device, expected, accumulate=True)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=identifier)
def test_without_statistics(dtype: torch.dtype) -> None:
    expected = ("32, true", 6, (1, 1), 1)
    check_launch(FORWARD, (1, 8, 8, 64, 32), dtype, ONE, expected, stats=None)


@pytest.mark.parametrize("op", [FORWARD, BACKWARD])
def test_rows_aligned_to_eight_bytes_only(op: str) -> None:
    warps = 3 if op == FORWARD else 2
    arguments = "16, true" if op == FORWARD else "false, true"
    check_launch(op, (1, 5, 6, 20, 12), BF16, ONE, (arguments, warps, (1, 1), 1), before=4)
