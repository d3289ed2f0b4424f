"""The fused 1x1 convolution's kernels: shapes at the edges of their tiles, and their traffic
against the byte models stated in norm_relu_conv1x1_forward.cu and _backward.cu."""

from __future__ import annotations

import math
import re

import pytest
import torch

from tests.support.emulators import check, emulator, total
from tests.support.identifiers import identifier
from tools.emulation import Device, Launch
from tools.op_cases import make

pytestmark = pytest.mark.slow

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FORWARD, BACKWARD = "norm_relu_conv1x1_forward", "norm_relu_conv1x1_backward"

# (rows, channels, outputs), dtype, channels in front of each slice, reason
FORWARD_SHAPES = [
    ((32, 32, 64), BF16, 0, "one tile exactly: no tail anywhere"),
    ((31, 33, 63), FP16, 0, "one less, one more, one less"),
    ((33, 31, 65), BF16, 0, "a second tile of one row; the next wider tile by one output"),
    ((257, 64, 128), BF16, 0, "several tiles a block: the loads run ahead across tiles"),
    ((64, 1, 16), FP16, 0, "one channel: 31 of a panel's 32 are padding"),
    ((40, 72, 129), BF16, 8, "two warps side by side, 128 + 1 outputs; an aligned slice"),
    ((48, 20, 96), FP16, 4, "growth rate 24; rows aligned to 8 bytes only"),
    ((16, 40, 160), BF16, 2, "growth rate 40; rows aligned to 4 bytes only"),
    ((20, 16, 193), FP16, 0, "a second column of the grid with one output"),
    ((32, 16, 64), FP32, 0, "TF32: one tile, one panel of 16 channels exactly"),
    ((257, 49, 128), FP32, 0, "TF32: several tiles a block, a fourth panel of one channel"),
    ((40, 20, 129), FP32, 2, "TF32: two warps side by side; rows aligned to 8 bytes only"),
    ((33, 7, 20), FP32, 1, "TF32: rows aligned to 4 bytes only"),
]
BACKWARD_SHAPES = [
    ((32, 64, 64), BF16, 0, "one tile, one block of channels exactly"),
    ((31, 65, 63), FP16, 0, "a second block of one channel"),
    ((33, 16, 65), BF16, 0, "one warp; a second tile of one row; the next wider tile by one"),
    ((100, 17, 129), FP16, 0, "two warps, the least that more than 128 outputs need"),
    ((140, 48, 48), BF16, 0, "BC-100-12: three warps, a panel shared by one warp"),
    ((300, 80, 128), BF16, 8, "several tiles a block and several blocks; an aligned slice"),
    ((50, 20, 96), FP16, 4, "growth rate 24; rows aligned to 8 bytes only"),
    ((40, 7, 20), BF16, 2, "rows aligned to 4 bytes only"),
    ((64, 1, 12), FP16, 0, "one channel"),
    ((20, 8, 193), BF16, 0, "a second call with one output"),
    ((32, 64, 64), FP32, 0, "TF32: one tile, one block of channels exactly"),
    ((300, 80, 128), FP32, 4, "TF32: the widest kernel, several tiles and blocks; aligned slice"),
    ((33, 17, 65), FP32, 0, "TF32: two warps, the least that more than 64 outputs need"),
    ((50, 20, 48), FP32, 2, "TF32: rows aligned to 8 bytes only"),
    ((40, 7, 20), FP32, 1, "TF32: rows aligned to 4 bytes only"),
    ((20, 8, 129), FP32, 0, "TF32: a second call with one output"),
]


# Each kernel of the forward pass: its template arguments, (rows, channels, outputs), and the
# multiprocessors of a device that takes it.
FORWARD_KERNELS = [
    ("_kernel<T, 128, 1>", (150, 150, 125), 2),
    ("_kernel<T, 64, 1>", (515, 20, 44), 1),
    ("_kernel<T, 64, 2>", (270, 20, 125), 1),
    ("_kernel<T, 96, 2>", (150, 20, 130), 1),
    ("_narrow_kernel<T, 64, 4, 2>", (150, 20, 190), 8),
    ("_narrow_kernel<T, 64, 4, 1>", (37, 20, 125), 4),
    ("_narrow_kernel<T, 48, 4, 1>", (70, 72, 190), 4),
    ("_narrow_kernel<T, 32, 4, 1>", (515, 20, 130), 32),
    ("_narrow_kernel<T, 32, 8, 1>", (20, 1000, 44), 16),
]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=identifier)
@pytest.mark.parametrize(("kernel", "sizes", "multiprocessors"), FORWARD_KERNELS, ids=identifier)
def test_every_forward_kernel(
    kernel: str, sizes: tuple[int, int, int], multiprocessors: int, dtype: torch.dtype
) -> None:
    """With tails of rows, channels and outputs; several tiles a block where a kernel has them."""
    device = Device(multiprocessors)
    case = make(FORWARD, sizes, dtype)
    [launch, *_] = emulator().call(FORWARD, *case.arguments.values(), device=device)
    arguments = launch.kernel.partition("<")[2].partition(",")[2]
    assert kernel.partition("<")[0] in launch.kernel
    assert re.findall(r"\d+", arguments) == re.findall(r"\d+", kernel.partition(",")[2])
    check(emulator(), make(FORWARD, sizes, dtype), device)
    if dtype == BF16:
        check(emulator(), make(FORWARD, sizes, dtype, stats=None), device)


@pytest.mark.parametrize("outputs", [60, 128], ids=["wide", "narrow"])
@pytest.mark.parametrize(
    ("channels", "dtype"),
    [(36, BF16), (38, FP16), (37, BF16), (38, FP32), (37, FP32)],
    ids=identifier,
)
def test_weights_aligned_less_than_the_rows(
    channels: int, dtype: torch.dtype, outputs: int
) -> None:
    """As in every other layer of growth rate 12, whose features are padded to whole sectors: to
    eight or four bytes, or to a value."""
    rows, device = (257, Device(1)) if outputs == 60 else (40, Device())
    case = make(FORWARD, (rows, channels, outputs), dtype, widths={"x": 48})
    check(emulator(), case, device)


@pytest.mark.parametrize(("sizes", "dtype", "before", "reason"), FORWARD_SHAPES, ids=identifier)
def test_forward(sizes: tuple[int, int, int], dtype: torch.dtype, before: int, reason: str) -> None:
    check(emulator(), make(FORWARD, sizes, dtype, before=before))


@pytest.mark.parametrize(("sizes", "dtype", "before", "reason"), BACKWARD_SHAPES, ids=identifier)
def test_backward(
    sizes: tuple[int, int, int], dtype: torch.dtype, before: int, reason: str
) -> None:
    check(emulator(), make(BACKWARD, sizes, dtype, before=before))


def test_statistics_do_not_cancel() -> None:
    """A channel whose mean is 300 times its deviation keeps its variance."""
    case = make(FORWARD, (200, 16, 16), BF16)
    arguments = case.arguments
    arguments["norm"][:] = torch.tensor([[0.0], [64.0], [0.0], [1.0], [64.0]])
    arguments["weight"].fill_(0.25)
    arguments["norm"][0, 0] = 1.0
    emulator().call(FORWARD, *arguments.values())
    y = arguments["y"].double()
    exact = y.var(0, unbiased=False)
    assert y.mean() > 200 and 0 < exact.max() < 4
    torch.testing.assert_close(arguments["stats"][1].double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(arguments["stats"][0].double(), y.mean(0), rtol=1e-6, atol=0)


def test_not_a_number_spreads_only_within_its_row() -> None:
    case = make(FORWARD, (40, 24, 16), BF16, stats=None)
    case.arguments["x"][7, 5] = math.nan
    emulator().call(FORWARD, *case.arguments.values())
    rows = case.arguments["y"].isnan().any(1).nonzero().flatten().tolist()
    assert rows == [7]


LAYERS = [
    ((1568, 128, 128), "DenseNet-121, a layer of block 2"),
    ((1024, 96, 48), "BC-100-12, a layer of block 1"),
]


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=identifier)
@pytest.mark.parametrize(("sizes", "reason"), LAYERS, ids=identifier)
def test_forward_traffic(sizes: tuple[int, int, int], reason: str, dtype: torch.dtype) -> None:
    M, C, K = sizes
    size = dtype.itemsize
    case = make(FORWARD, sizes, dtype)
    launches = emulator().call(FORWARD, *case.arguments.values())
    kernel = launches[0]
    tiles, blocks = math.ceil(M / kernel.block), kernel.grid[0]  # 32 rows a warp
    loads = size * M * C + tiles * (size * K * C + 2 * 4 * C) + 3 * 4 * K * blocks
    stores = size * M * K + 3 * 4 * K * blocks + 2 * 4 * K
    expect_traffic(launches, loads, stores)
    columns = 64 if K <= 64 else 128
    assert kernel.mma == tiles * kernel.block // 16 * math.ceil(C * size / 64) * 2 * columns // 8


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=identifier)
@pytest.mark.parametrize(
    ("sizes", "multiprocessors"),
    [((48, 128, 192), 4), ((160, 64, 192), 8), ((64, 64, 48), 4)],
    ids=identifier,
)
def test_narrow_forward_traffic(
    sizes: tuple[int, int, int], multiprocessors: int, dtype: torch.dtype
) -> None:
    M, C, K = sizes
    size = dtype.itemsize
    case = make(FORWARD, sizes, dtype)
    launches = emulator().call(FORWARD, *case.arguments.values(), device=Device(multiprocessors))
    kernel = launches[0]
    assert "narrow" in kernel.kernel
    columns, _, row_tiles = map(int, re.findall(r" (\d+)", kernel.kernel))
    assert kernel.tiles == M // (16 * row_tiles) and K % columns == 0
    beside, ranges = K // columns, kernel.ranges
    loads = beside * (size * M * C + kernel.tiles * (size * columns * C + 2 * 4 * C))
    expect_traffic([kernel], loads, size * M * K + 3 * 4 * K * ranges)
    assert kernel.mma == M // 16 * math.ceil(C * size / 64) * 2 * K // 8


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=identifier)
@pytest.mark.parametrize(("sizes", "reason"), LAYERS, ids=identifier)
def test_backward_traffic(sizes: tuple[int, int, int], reason: str, dtype: torch.dtype) -> None:
    M, C, K = sizes
    size = dtype.itemsize
    case = make(BACKWARD, sizes, dtype)
    launches = emulator().call(BACKWARD, *case.arguments.values())
    kernel = launches[0]
    channel_blocks = math.ceil(C / (kernel.block // 32 * 16))
    row_blocks = kernel.grid[0] // channel_blocks
    partial = row_blocks * (K + 2) * C * 4
    tables = row_blocks * (channel_blocks * 4 * 4 * K + 4 * 4 * C + size * K * C)
    loads = 2 * size * M * C + channel_blocks * 2 * size * M * K + tables + partial
    stores = size * M * C + partial + 4 * (K + 2) * C
    expect_traffic(launches, loads, stores)
    outputs = 64 if K <= 64 else 128
    assert kernel.mma == math.ceil(M / 32) * math.ceil(C / 16) * 4 * size * outputs // 16


def expect_traffic(launches: list[Launch], loads: int, stores: int) -> None:
    """Bytes within 2 % of the model, at least 95 % of the sectors needed, no bank conflicts."""
    load, store = total(launches)
    assert load.bytes == pytest.approx(loads, rel=0.02)
    assert store.bytes == pytest.approx(stores, rel=0.02)
    assert load.efficiency >= 0.95 and store.efficiency >= 0.95
    assert launches[0].conflict_factor == 1.0
