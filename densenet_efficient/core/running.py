"""Running statistics of batch norms: one training step's update, by PyTorch's rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import compiled, dispatch
from . import eager


class Running(NamedTuple):
    """What some norms keep: means and variances ``[C]`` and the numbers of batches, each None where
    a norm has none, and momenta, None for the average over all batches."""

    means: Sequence[Tensor | None]
    variances: Sequence[Tensor | None]
    batches: Sequence[Tensor | None]
    momenta: Sequence[float | None]


class _Norm(NamedTuple):
    mean: Tensor | None
    variance: Tensor | None
    batches: Tensor | None
    momentum: float | None


Replacement = tuple[list[Tensor], tuple[Tensor, ...]]
"""Tensors, and the values that they are to have."""


def is_recomputation() -> bool:
    """Whether this forward runs inside a backward pass: activation checkpointing's second run,
    which must leave running statistics alone."""
    return torch._C._current_graph_task_id() != -1


def update(norms: Running, table: Tensor, first: Sequence[int], count: int) -> None:
    """Mixes the statistics of a batch into the running ones of every norm, in place.

    table: mean and biased variance ``[2, ...]`` over ``count`` values; a norm's are in the columns
    from its number in first on. The running variance takes the unbiased one. ``momentum=None`` is
    the cumulative average. The moments are mixed in the accumulation dtype before they are stored:
    the variance of a float16 batch need not fit float16. norms: at least one; count: not 1, of
    which there is no variance. Nothing happens in a recomputation, or without values. Whatever
    fails or interrupts, all are updated or none.
    """
    if count == 0 or is_recomputation() or _update_together(norms, table, first, count):
        return
    every = [_Norm(*norm) for norm in zip(*norms, strict=True)]
    columns = []
    for norm, start in zip(every, first, strict=True):
        width = None if norm.mean is None else len(norm.mean)
        columns.append(table[:, start : None if width is None else start + width])
    # Autocast knows no concatenation of float16 on the CPU.
    with torch.no_grad(), eager.without_autocast(table.device):
        _update_one_by_one(every, columns, count)


def _update_together(norms: Running, table: Tensor, first: Sequence[int], count: int) -> bool:
    """By one operator, which writes when it has checked all. False, and no value has changed, where
    it does not take these norms: without one momentum, with something left out, of several dtypes
    or devices, negative views, or memory in two places (``csrc/running.cpp``)."""
    means, variances, batches, momenta = norms
    every = (*means, *variances, *batches)
    if momenta[0] is None or momenta.count(momenta[0]) != len(momenta):
        return False
    if type(None) in map(type, every):
        return False
    if dispatch.choose(table.device, torch.bfloat16, 2).operators is not compiled:
        return False
    torch.autograd.graph.increment_version(every)  # type: ignore[arg-type]
    update: bool = torch.ops.densenet_efficient_calls.running_update.default(
        table, means, variances, batches, first, momenta[0], count / (count - 1)
    )
    return update


def _update_one_by_one(every: Sequence[_Norm], stats: Sequence[Tensor], count: int) -> None:
    """By PyTorch's operators, those of one momentum and dtype together."""
    first: dict[int, tuple[_Norm, Tensor]] = {}
    again: list[tuple[_Norm, Tensor]] = []  # of a norm that stands in several places
    for norm, values in zip(every, stats, strict=True):
        owner = id(norm.batches if norm.mean is None else norm.mean)
        if owner in first:
            again.append((norm, values))
        else:
            first[owner] = norm, values
    groups: dict[tuple[float | None, torch.dtype], list[tuple[_Norm, Tensor]]] = {}
    for norm, values in first.values():
        counts = norm.momentum is not None or norm.batches is not None
        if norm.mean is not None and norm.variance is not None and counts:
            groups.setdefault((norm.momentum, norm.mean.dtype), []).append((norm, values))
    replaced = [_mixed(group, count) for group in groups.values()]
    counters = [norm.batches for norm, _ in first.values() if norm.batches is not None]
    if counters:
        replaced.append((counters, torch.stack(counters).add_(1).unbind()))
    _replace(replaced)
    if again:
        _update_one_by_one([norm for norm, _ in again], [values for _, values in again], count)


def _mixed(group: Sequence[tuple[_Norm, Tensor]], count: int) -> Replacement:
    """The running means and then variances of norms of one momentum and dtype, and what they are to
    become. Computed on all channels together: one operation for each moment, not for each norm."""
    norms, stats = zip(*group, strict=True)
    old: list[Tensor] = [norm.mean for norm in norms] + [norm.variance for norm in norms]
    batch = torch.cat(stats, 1)
    new = torch.cat(old).to(batch.dtype).view(2, -1)
    unbiased, momentum = count / (count - 1), norms[0].momentum
    if momentum is None:  # the average over all batches; a tensor, so that the host does not wait
        shares = [(norm.batches + 1).to(batch.dtype).reciprocal_() for norm in norms]
        sizes = [len(norm.mean) for norm in norms]
        share = torch.cat([one.expand(size) for one, size in zip(shares, sizes, strict=True)])
        new[0].lerp_(batch[0], share)
        new[1].lerp_(batch[1] * unbiased, share)
    else:
        new.mul_(1.0 - momentum)
        new[0].add_(batch[0], alpha=momentum)
        new[1].add_(batch[1], alpha=momentum * unbiased)
    return old, new.view(-1).split_with_sizes([moment.numel() for moment in old])


def _replace(replaced: Sequence[Replacement]) -> None:
    """Puts new values into all tensors or into none: nothing is allocated any more, and a ctrl-C
    between two copies is passed on when both are done."""
    try:
        for old, new in replaced:
            torch._foreach_copy_(old, new)
    except BaseException:
        for old, new in replaced:
            torch._foreach_copy_(old, new)
        raise
