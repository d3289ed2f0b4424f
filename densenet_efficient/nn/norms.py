"""Batch-norm modules around the stages: what a call needs of them, and their running statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.specs import NormCall
from ..ops.fallback import accumulation_dtype

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d

_STATS = "_densenet_efficient_stats"


def uses_batch_statistics(norm: BatchNorm) -> bool:
    """Whether a call normalises by the batch: training mode, or no running statistics at all."""
    return norm.training or norm.running_mean is None or norm.running_var is None


def norm_call(norm: BatchNorm, dtype: torch.dtype) -> NormCall:
    """The norm's part in one call with activations of ``dtype``."""
    if uses_batch_statistics(norm):
        return NormCall(norm.eps)
    # A copy: later updates of the module must not reach a backward that is still to come.
    assert norm.running_mean is not None and norm.running_var is not None
    running = torch.stack((norm.running_mean.detach(), norm.running_var.detach()))
    return NormCall(norm.eps, running.to(accumulation_dtype(dtype)))


def attach_stats(y: Tensor, stats: Tensor) -> Tensor:
    """Let y ``[N, C, *spatial]`` carry its channel statistics ``[2, C]`` to the next stage."""
    if not y.is_inference():
        setattr(y, _STATS, (stats, y._version))
    return y


def known_stats(x: Tensor) -> Tensor | None:
    """The statistics x was handed over with, unless x was written to since."""
    entry = None if x.is_inference() else getattr(x, _STATS, None)
    return entry[0] if entry is not None and entry[1] == x._version else None


def is_recomputation() -> bool:
    """Whether this forward runs inside a backward pass: activation checkpointing's second run,
    which must leave running statistics alone."""
    return torch._C._current_graph_task_id() != -1


def update_running_statistics(
    norms: Sequence[BatchNorm], stats: Sequence[Tensor], count: int
) -> None:
    """One training step's update of every norm, after the whole call has succeeded.

    stats: mean and biased variance ``[2, C]`` for each norm, over ``count`` values; the running
    variance takes the unbiased one. ``momentum=None`` is the cumulative average. Norms in eval mode
    or without running statistics are left alone, and so is everything in a recomputation.
    """
    if count == 0 or is_recomputation():
        return
    # (momentum, dtype) -> running means, batch means, running variances, batch variances
    groups: dict[tuple[float, torch.dtype], tuple[list[Tensor], ...]] = {}
    tracked = [pair for pair in zip(norms, stats, strict=True) if _tracks(pair[0])]
    with torch.no_grad():
        counters = [n.num_batches_tracked for n, _ in tracked if n.num_batches_tracked is not None]
        if counters:
            torch._foreach_add_(counters, 1)
        for norm, values in tracked:
            assert norm.running_mean is not None and norm.running_var is not None
            momentum = norm.momentum
            if momentum is None:
                assert norm.num_batches_tracked is not None
                momentum = 1.0 / float(norm.num_batches_tracked)
            dtype = norm.running_mean.dtype
            mean, variance = values if values.dtype == dtype else values.to(dtype)
            means, batch_means, variances, batch_variances = groups.setdefault(
                (momentum, dtype), ([], [], [], [])
            )
            means.append(norm.running_mean)
            batch_means.append(mean)
            variances.append(norm.running_var)
            batch_variances.append(variance)
        for (momentum, _), (means, batch_means, variances, batch_variances) in groups.items():
            torch._foreach_mul_(means + variances, 1.0 - momentum)
            torch._foreach_add_(means, batch_means, alpha=momentum)
            unbiased = count / (count - 1)
            torch._foreach_add_(variances, batch_variances, alpha=momentum * unbiased)


def _tracks(norm: BatchNorm) -> bool:
    return norm.training and norm.running_mean is not None and norm.running_var is not None


def batch_norm(norm: BatchNorm, x: Tensor) -> Tensor:
    """The framework's batch norm with our rule for running statistics. x ``[N, C, *spatial]``."""
    if not uses_batch_statistics(norm):
        return norm(x)
    count = x.numel() // x.shape[1]
    check_count(count, tuple(x.shape))
    y = F.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
    if _tracks(norm):
        stats = known_stats(x)
        if stats is None:
            with torch.no_grad():
                wide = x.detach().to(accumulation_dtype(x.dtype))
                dims = [d for d in range(x.dim()) if d != 1]
                var, mean = torch.var_mean(wide, dim=dims, correction=0)
                stats = torch.stack((mean, var))
        update_running_statistics([norm], [stats], count)
    return y


def check_count(count: int, shape: tuple[int, ...]) -> None:
    """ValueError where batch statistics would be taken of a single value."""
    if count == 1:
        raise ValueError(
            "input must have more than 1 value per channel for batch statistics in training, got "
            f"shape {list(shape)}; put the norms in eval mode or use a larger batch or image"
        )
