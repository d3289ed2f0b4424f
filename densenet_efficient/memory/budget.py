"""Bottlenecks kept within a budget: memory that is there anyway, in exchange for time."""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..nn.auto_memory import by_worth
from ..nn.dense_block import DenseBlockExecution
from ..nn.options import check_number
from .planner import Plan, plan


def fit_memory(
    model: nn.Module,
    input_shape: Sequence[int],
    budget: int | float,
    dtype: torch.dtype = torch.float32,
) -> Plan:
    """Keeps as many bottlenecks for the backward pass as a budget allows; in place.

    Each that is kept is not computed again, those first that take the most products for their
    bytes. All blocks of the model are set to ``memory="auto"`` and told of how many of their
    layers, the last ones, to keep the bottlenecks (``block.kept_layers``). Results are the same,
    bit by bit.

    Args:
        model: as for `plan`.
        input_shape: of the images, ``(N, C, *spatial)``.
        budget: bytes of a step's peak above the baseline before it (parameters, optimiser state,
            the input).
        dtype: as for `plan`.

    Returns:
        The plan of a step, whose peak is within the budget.

    Raises:
        TypeError: as for `plan`.
        ValueError: as for `plan`, and where budget is not a positive finite number or less than a
            step needs with no bottleneck kept. The model is unchanged.
    """
    least = math.nextafter(0.0, 1.0)
    budget = check_number("budget", budget, "a positive number of bytes", least, math.inf)
    blocks = [m for m in model.modules() if isinstance(m, DenseBlockExecution)]
    before = [(block.memory, block.kept_layers) for block in blocks]

    def peak(kept: Sequence[int]) -> int:
        _keep(blocks, kept)
        return plan(model, input_shape, dtype).peak_bytes

    try:
        if (needed := peak([0] * len(blocks))) > budget:
            raise ValueError(
                f"budget must be at least the {needed:,} bytes that a step needs with no "
                f"bottleneck kept, got {budget:,.0f}"
            )
        _keep(blocks, _most(blocks, lambda kept: peak(kept) <= budget))
    except BaseException:
        for block, (memory, kept) in zip(blocks, before, strict=True):
            block.memory = memory
            if memory == "auto":
                block.kept_layers = kept
        raise
    return plan(model, input_shape, dtype)


def _keep(blocks: Sequence[DenseBlockExecution], kept: Sequence[int]) -> None:
    for block, layers in zip(blocks, kept, strict=True):
        block.kept_layers = layers


def _most(
    blocks: Sequence[DenseBlockExecution], fits: Callable[[Sequence[int]], bool]
) -> list[int]:
    """Layers to keep in each block: the most worth ones up to the first that does not fit, then
    what still fits of each block, of the last block first."""
    order = [index for index, _ in by_worth(blocks)]

    def counts(layers: int) -> list[int]:
        found = Counter(order[:layers])
        return [found[index] for index in range(len(blocks))]

    # Tried by halves, as if what is kept only added to the peak. Where all of a block is kept, its
    # scratch goes: that last layer may take less than the ones before it.
    tried = range(1, len(order) + 1)
    kept = counts(bisect.bisect_left(tried, True, key=lambda layers: not fits(counts(layers))))
    for index in reversed(range(len(blocks))):
        for layers in range(kept[index] + 1, order.count(index) + 1):
            more = [*kept[:index], layers, *kept[index + 1 :]]
            if not fits(more):
                break
            kept = more
    return kept
