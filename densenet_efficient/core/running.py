"""Running statistics of batch norms: one training step's update, by PyTorch's rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Running(NamedTuple):
    """What one norm keeps: mean and variance ``[C]``, the number of batches, each None where there
    is none, and its momentum, None for the average over all batches."""

    mean: Tensor | None
    variance: Tensor | None
    batches: Tensor | None
    momentum: float | None


def is_recomputation() -> bool:
    """Whether this forward runs inside a backward pass: activation checkpointing's second run,
    which must leave running statistics alone."""
    return torch._C._current_graph_task_id() != -1


def update(norms: Sequence[Running], stats: Sequence[Tensor], count: int) -> None:
    """Mixes the statistics of a batch into the running ones of every norm, in place.

    stats: mean and biased variance ``[2, C]`` for each norm, over ``count`` values; the running
    variance takes the unbiased one. ``momentum=None`` is the cumulative average. The moments are
    mixed in the accumulation dtype before they are stored: the variance of a float16 batch need not
    fit float16. Nothing happens in a recomputation, or without values.
    """
    if count == 0 or is_recomputation():
        return
    # momentum -> running means and variances, batch means and variances, all in one dtype
    groups: dict[tuple[float, torch.dtype], tuple[list[Tensor], ...]] = {}
    narrow: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        counters = [norm.batches for norm in norms if norm.batches is not None]
        if counters:
            torch._foreach_add_(counters, 1)
        for norm, values in zip(norms, stats, strict=True):
            if norm.mean is None or norm.variance is None:
                continue
            moments = [norm.mean, norm.variance]
            if norm.mean.dtype != values.dtype:
                wide = [moment.to(values.dtype) for moment in moments]
                narrow += zip(moments, wide, strict=True)
                moments = wide
            if norm.momentum is None:
                _average_cumulatively(norm.batches, moments, values, count)
                continue
            group = groups.setdefault((norm.momentum, values.dtype), ([], [], [], []))
            for members, moment in zip(group, (*moments, *values), strict=True):
                members.append(moment)
        for (momentum, _), (means, variances, batch_means, batch_variances) in groups.items():
            torch._foreach_mul_(means + variances, 1.0 - momentum)
            torch._foreach_add_(means, batch_means, alpha=momentum)
            torch._foreach_add_(variances, batch_variances, alpha=momentum * count / (count - 1))
        for stored, moment in narrow:
            stored.copy_(moment)


def _average_cumulatively(
    batches: Tensor | None, moments: Sequence[Tensor], values: Tensor, count: int
) -> None:
    """The running moments become the average over all batches; without a counter they stay. The
    weight is a tensor, so that the host does not wait for the device."""
    if batches is None:
        return
    weight = batches.to(values.dtype).reciprocal()
    moments[0].lerp_(values[0], weight)
    moments[1].lerp_(values[1] * (count / (count - 1)), weight)
