"""The fused 3x3 convolution's kernels: shapes at the edges of their tiles, and their traffic
against the byte models stated in norm_relu_conv3x3_forward.cu and the headers of its backward."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support.bad_calls import assert_refused
from tests.support.emulators import check, emulator, total
from tests.support.identifiers import identifier
from tools.emulation import Launch
from tools.op_cases import make

pytestmark = pytest.mark.slow

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FORWARD, BACKWARD = "norm_relu_conv3x3_forward", "norm_relu_conv3x3_backward"

# (images, height, width, channels, outputs), dtype, channels in front of each slice, reason
FORWARD_SHAPES = [
    ((1, 8, 8, 32, 16), BF16, 0, "64 pixels: one warp's tile exactly"),
    ((1, 1, 64, 16, 8), FP16, 0, "one row as wide as a tile may be: no neighbour above or below"),
    ((1, 1, 65, 16, 8), BF16, 0, "one wider: two strips, 33 and 32 columns"),
    ((2, 4, 1, 16, 12), FP16, 0, "one column: no neighbour to the left or right"),
    (
        (5, 3, 3, 16, 24),
        BF16,
        0,
        "several images in one tile: rows of neighbours are not neighbours",
    ),
    (
        (1, 7, 7, 33, 17),
        FP16,
        0,
        "a second panel of one channel, the next wider tile by one output",
    ),
    ((1, 6, 6, 96, 33), BF16, 0, "three panels; 48 outputs by one"),
    ((1, 3, 9, 24, 49), FP16, 0, "a second column of the grid with one output"),
    ((1, 5, 6, 20, 12), BF16, 4, "rows aligned to 8 bytes only, growth rate 12"),
    ((3, 9, 11, 16, 12), BF16, 0, "more pixels than a tile: the last one has a tail"),
    ((1, 8, 8, 16, 16), FP32, 0, "TF32: one warp's tile, one panel of 16 channels exactly"),
    ((5, 3, 3, 33, 24), FP32, 0, "TF32: several images in one tile; a third panel of one channel"),
    ((1, 2, 65, 16, 40), FP32, 0, "TF32: two strips, 48 outputs"),
    ((1, 5, 6, 22, 12), FP32, 2, "TF32: rows aligned to 8 bytes only"),
    ((1, 1, 1, 3, 5), FP32, 1, "TF32: one pixel, rows aligned to 4 bytes only"),
]
BACKWARD_SHAPES = [
    ((1, 8, 8, 64, 32), BF16, 0, "64 pixels, 64 channels, 32 outputs: no tail anywhere"),
    ((1, 1, 64, 16, 8), FP16, 0, "one row as wide as a tile may be"),
    ((1, 2, 65, 16, 8), BF16, 0, "one wider: two strips"),
    ((2, 4, 1, 16, 12), FP16, 0, "one column"),
    ((5, 3, 3, 40, 24), BF16, 0, "several images in one tile, growth rate 24"),
    ((1, 5, 5, 65, 17), FP16, 0, "a second block of one channel; 32 outputs by one"),
    ((1, 4, 5, 32, 33), BF16, 0, "two panels of outputs, the second of one"),
    ((1, 3, 5, 20, 49), FP16, 0, "outputs in two blocks of the weight gradient"),
    ((1, 5, 6, 20, 12), BF16, 4, "rows aligned to 8 bytes only, growth rate 12"),
    ((2, 11, 13, 16, 12), BF16, 0, "several tiles a block: sums of tiles add up in order"),
    ((1, 8, 8, 64, 32), FP32, 0, "TF32: no tail anywhere; two panels of outputs"),
    ((5, 3, 3, 40, 24), FP32, 0, "TF32: several images in one tile, growth rate 24"),
    ((1, 2, 65, 65, 17), FP32, 0, "TF32: two strips; a second block of one channel"),
    ((2, 11, 13, 20, 49), FP32, 0, "TF32: several tiles; outputs in two blocks"),
    ((1, 5, 6, 22, 12), FP32, 2, "TF32: rows aligned to 8 bytes only"),
    ((1, 1, 1, 3, 5), FP32, 1, "TF32: one pixel, rows aligned to 4 bytes only"),
]


@pytest.mark.parametrize(("sizes", "dtype", "before", "reason"), FORWARD_SHAPES, ids=identifier)
def test_forward(sizes: tuple[int, ...], dtype: torch.dtype, before: int, reason: str) -> None:
    check(emulator(), make(FORWARD, sizes, dtype, before=before))


@pytest.mark.parametrize(("sizes", "dtype", "before", "reason"), BACKWARD_SHAPES, ids=identifier)
def test_backward(sizes: tuple[int, ...], dtype: torch.dtype, before: int, reason: str) -> None:
    check(emulator(), make(BACKWARD, sizes, dtype, before=before))


@pytest.mark.parametrize(("outputs", "dtype"), [(12, BF16), (40, BF16), (24, FP32)], ids=identifier)
def test_plain_layer_accumulates(outputs: int, dtype: torch.dtype) -> None:
    """A plain layer's data gradient is added to what other layers left, times its own scale."""
    check(emulator(), make(BACKWARD, (2, 5, 6, 40, outputs), dtype, accumulate=True))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=identifier)
@pytest.mark.parametrize("op", [FORWARD, BACKWARD])
def test_weight_layouts_agree(op: str, dtype: torch.dtype) -> None:
    """A channels-last weight is used as it lies, any other is copied; its gradient is written in
    either layout: the same bits."""
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        case = make(op, (1, 5, 6, 24, 12), dtype)
        for name in {"weight", "dweight"} & case.arguments.keys():
            case.arguments[name] = case.arguments[name].contiguous(memory_format=layout)
        launches = emulator().call(op, *case.arguments.values())
        assert ("pack" in launches[0].kernel) == (layout == torch.contiguous_format)
        results.append({name: value.clone() for name, value in case.outputs.items()})
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def halo_rows(rows: int, tiles: int) -> int:
    """Image rows loaded by tiles, as high as each other, and the row above and below each."""
    height = math.ceil(rows / tiles)
    firsts = range(0, rows, height)
    return sum(min(rows, first + height + 1) - max(0, first - 1) for first in firsts)


LAYERS = [
    ((1, 28, 28, 128, 32), "DenseNet-121, a layer of block 2"),
    ((1, 32, 32, 48, 16), "BC-100-12's sizes, an output slice of whole sectors"),
]


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=identifier)
@pytest.mark.parametrize(("sizes", "reason"), LAYERS, ids=identifier)
def test_forward_traffic(sizes: tuple[int, ...], reason: str, dtype: torch.dtype) -> None:
    N, H, W, C, K = sizes
    size = dtype.itemsize
    case = make(FORWARD, sizes, dtype)
    case.arguments["weight"] = case.arguments["weight"].contiguous(
        memory_format=torch.channels_last
    )
    launches = emulator().call(FORWARD, *case.arguments.values())
    kernel = launches[0]
    tiles, (blocks, beside) = kernel.tiles, kernel.grid
    loads = beside * (size * halo_rows(N * H, tiles) * W * C + tiles * 2 * 4 * C)
    loads += tiles * size * 9 * K * C + 3 * 4 * K * blocks
    stores = size * N * H * W * K + 3 * 4 * K * blocks + 2 * 4 * K
    expect_traffic(launches, loads, stores)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=identifier)
@pytest.mark.parametrize(("sizes", "reason"), LAYERS, ids=identifier)
def test_backward_traffic(sizes: tuple[int, ...], reason: str, dtype: torch.dtype) -> None:
    N, H, W, C, K = sizes
    size = dtype.itemsize
    case = make(BACKWARD, sizes, dtype)
    case.arguments["weight"] = case.arguments["weight"].contiguous(
        memory_format=torch.channels_last
    )
    launches = emulator().call(BACKWARD, *case.arguments.values())
    data, weight, _ = launches
    pixels, rows = N * H * W, N * H
    panel = 64 // size  # channels
    panels = math.ceil(C / panel) * panel

    tiles, (blocks, beside) = data.tiles, data.grid
    sums = 2 * 4 * panels
    loads = size * pixels * C + beside * 2 * size * halo_rows(rows, tiles) * W * K
    loads += tiles * (size * 9 * K * C + 4 * 4 * C) + sums * tiles + beside * blocks * 4 * 4 * K
    stores = size * pixels * C + sums * tiles

    channel_blocks = math.ceil(C / 64)
    row_blocks = weight.grid[0] // channel_blocks
    loads += size * pixels * C + channel_blocks * 2 * size * halo_rows(rows, weight.tiles) * W * K
    loads += weight.tiles * 2 * 4 * C + row_blocks * channel_blocks * 4 * 4 * K
    partial = row_blocks * 4 * 9 * K * channel_blocks * 64
    loads += row_blocks * 4 * 9 * K * C
    stores += partial + 4 * (9 * K + 2) * C
    expect_traffic(launches, loads, stores)


def expect_traffic(launches: list[Launch], loads: int, stores: int) -> None:
    """Bytes within 2 % of the model, at least 95 % of the sectors needed, no bank conflicts."""
    load, store = total(launches)
    assert load.bytes == pytest.approx(loads, rel=0.02)
    assert store.bytes == pytest.approx(stores, rel=0.02)
    assert load.efficiency >= 0.95 and store.efficiency >= 0.95
    for launch in launches:
        assert launch.conflict_factor == 1.0, launch.kernel


@pytest.mark.parametrize("op", [FORWARD, BACKWARD])
def test_pixels_too_far_apart_for_32_bits_are_refused(op: str) -> None:
    case = make(op, (1, 1, 2, 16, 8), BF16)
    case.arguments["x"] = torch.zeros(1, 1, 2, 2_800_000, dtype=BF16)[..., :16]
    message = "x must have pixels at most 2097152 bytes apart, got 5600000"
    for written in case.outputs.values():
        written.zero_()  # NaN until then, which equals nothing
    assert_refused(emulator().call, op, tuple(case.arguments.values()), message)
