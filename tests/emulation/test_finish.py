"""The second pass of reductions over blocks (csrc/cuda/reduce/finish.cuh), of few partial results
and of many.

Moments of statistics that lose digits, by `channel_stats`: its blocks' partial moments are exact
here, so that what is lost is lost in this pass. At 64 channels that are read one by one a block
takes 32 rows, and a thread every fourth of them; two rows of a thread that follow each other lie as
far above its block's mean as below it.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.support.emulators import SEEDS, check, emulator
from tests.support.kernel_check import compare
from tools.emulation import Device, Emulator, Mutation
from tools.op_cases import make

pytestmark = pytest.mark.slow

CHANNELS, LANES, PAIRS = 64, 4, 4
BLOCK_ROWS = 2 * LANES * PAIRS
STEPS = 4 * torch.finfo(torch.float32).eps * 2**13  # 1e4 and a few of them are exact, and sums too


def statistics(emulator: Emulator, means: Tensor, deviations: Tensor) -> tuple[Tensor, Tensor]:
    """What the operator says and what is right, of blocks with these means and deviations
    [blocks, CHANNELS]."""
    signs = torch.tensor([1.0, -1.0]).repeat(PAIRS).repeat_interleave(LANES)
    rows = means[:, None, :] + signs[None, :, None] * deviations[:, None, :]
    x = rows.reshape(-1, CHANNELS).float()
    wider = torch.full((len(x), CHANNELS + 1), math.nan)  # rows at odd addresses
    wider[:, 1:] = x
    results = []
    for seed in SEEDS:
        stats = torch.full((2, CHANNELS), math.nan)
        first, finish = emulator.call("channel_stats", wider[:, 1:], stats, seed=seed)
        results.append(stats)
    assert finish.kernel.startswith("channel_stats_finish")
    assert first.grid[0] >= len(means)
    assert all(torch.equal(stats, results[0]) for stats in results), "depends on the order"
    wide = x.double()
    return results[0].double(), torch.stack((wide.mean(0), wide.var(0, correction=0)))


def hard_blocks(blocks: int) -> tuple[Tensor, Tensor]:
    """Block means and deviations, a kind of statistics for every channel in turn."""
    torch.manual_seed(blocks)
    means = torch.randn(blocks, CHANNELS)
    deviations = torch.rand(blocks, CHANNELS)
    kind = torch.arange(CHANNELS) % 4
    far = 1e4 + STEPS * torch.randint(-3, 4, (blocks, CHANNELS))
    means = torch.where(kind == 1, far, means)
    deviations = torch.where(kind == 1, STEPS * torch.randint(0, 3, (blocks, CHANNELS)), deviations)
    means = torch.where(kind == 2, torch.tensor(1e4), means)  # constant
    deviations = torch.where(kind == 2, torch.tensor(0.0), deviations)
    outlier = (torch.arange(blocks) == blocks // 2)[:, None] & (kind == 3)
    return torch.where(outlier, torch.tensor(1e6), means), deviations


def check_moments(stats: Tensor, right: Tensor) -> None:
    constant = torch.arange(CHANNELS) % 4 == 2
    assert torch.equal(stats[:, constant], right[:, constant])
    scale = (right[0] ** 2 + right[1]).sqrt()
    torch.testing.assert_close(stats[0] / scale, right[0] / scale, rtol=0, atol=2e-7)
    torch.testing.assert_close(stats[1], right[1], rtol=1e-6, atol=0)


# Threads without a partial, with one, with several; more than one batch.
@pytest.mark.parametrize("blocks", [1, 5, 70, 520])
def test_no_digit_is_lost(blocks: int) -> None:
    check_moments(*statistics(emulator(), *hard_blocks(blocks)))


def test_blocks_of_no_rows_count_nothing() -> None:
    more = Mutation(
        "cuda/tiling/columns.h",
        "parts = ceil_div(steps, steps_each);",
        "parts = 100 + ceil_div(steps, steps_each);",
    )
    with Emulator(["channel_stats"], mutations=[more]) as mutated:
        check_moments(*statistics(mutated, *hard_blocks(5)))


# One team for each piece, several; as many as a block holds; more than one batch.
@pytest.mark.parametrize("images", [1, 30, 520])
def test_sums_of_a_norm(images: int) -> None:
    for dtype in (torch.float32, torch.float64):
        check(emulator(), make("stem_backward", (images, 2, 2, 9), dtype))


def test_sums_of_a_weight_gradient_over_many_blocks() -> None:
    case = make("norm_relu_conv1x1_backward", (30 * 256, 20, 8), torch.bfloat16)
    inputs = case.inputs()
    device = Device(multiprocessors=30)
    first, _ = emulator().call(case.op, *case.arguments.values(), device=device)
    assert first.grid == (120, 1)
    compare(case.op, inputs, case.outputs)
