"""Batch-norm modules around the operators: what a call needs of them, and their running statistics.

The rules are those of ``torch.nn.BatchNorm*d.forward``, read at every call: which statistics
normalise, whether the running ones are updated, and by how much.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import running
from ..core.exchange import Exchange
from ..core.functions import Result, SharedNormFunction
from ..core.running import Running
from ..core.specs import NormSpec, PoolSpec
from ..ops import dispatch
from ..ops.dtypes import accumulation_dtype
from .handover import known_stats

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
WITH_ACTIVATION = ("timm.layers.norm_act.BatchNormAct2d",)
"""Classes derived from a batch norm whose forward goes on through their children drop and act."""


def _includes_activation(module: object) -> bool:
    cls = type(module)
    return cls not in BATCH_NORMS and f"{cls.__module__}.{cls.__qualname__}" in WITH_ACTIVATION


def is_batch_norm(module: object) -> bool:
    """Whether the module is one of PyTorch's batch norms, with its activation inside or not."""
    return type(module) in BATCH_NORMS or _includes_activation(module)


def includes_relu(norm: object) -> bool:
    """Whether the norm's forward ends with its ReLU."""
    return _includes_activation(norm) and activation_problem(norm) is None


def activation_problem(norm: Any) -> str | None:
    """Why what a norm does after normalising is not a ReLU alone; None for a mere norm, too."""
    if not _includes_activation(norm):
        return None
    if type(norm.act) is not nn.ReLU:
        return f"is followed by a {type(norm.act).__name__}"
    if type(norm.drop) is not nn.Identity:
        return f"drops out by a {type(norm.drop).__name__}"
    return None


def norm_problem(norm: nn.Module) -> str | None:
    """Why the operators cannot replace this norm, in words; None where they can."""
    if not is_batch_norm(norm):
        return f"is a {type(norm).__name__}"
    problem = activation_problem(norm)
    if problem is not None:
        return problem
    if (norm.running_mean is None) != (norm.running_var is None):
        return "has only one of running_mean and running_var"
    return None


def features_of(norm: BatchNorm) -> int:
    """The channels of a norm, as its tensors have them: PyTorch's forward reads no num_features."""
    tensors = (norm.weight, norm.bias, norm.running_mean)
    return next((len(tensor) for tensor in tensors if tensor is not None), norm.num_features)


def uses_batch_statistics(norm: BatchNorm) -> bool:
    """Whether a call normalises by the batch: training mode, or no running statistics at all."""
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def tracks(norm: BatchNorm) -> bool:
    """Whether a call updates the running statistics and the counter, as far as there are any."""
    return norm.training and norm.track_running_stats


def process_group(norm: nn.Module, training: bool | None = None) -> Any:
    """The processes that share the statistics of this norm's batch, by the rule of
    `torch.nn.SyncBatchNorm.forward`: in training (or as given), where there are several. None where
    the statistics are this process' own."""
    if type(norm) is not nn.SyncBatchNorm or not (norm.training if training is None else training):
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def begin_exchange(group: Any, x: Tensor, known: Exchange | None) -> Exchange | None:
    """What a call of norms with batch statistics of x ``[N, C, *spatial]`` needs of other
    processes, None without a group. known: the exchange by which x's statistics are shared
    already. ValueError where the batch, all processes together, is a single value a channel."""
    if known is not None:
        return known
    count = x.numel() // x.shape[1]
    if group is None:
        check_count(count, tuple(x.shape))
        return None
    exchange = Exchange.begin(group, count, x.device)
    check_count(exchange.total, tuple(x.shape))
    return exchange


def norm_spec(norm: BatchNorm, dtype: torch.dtype) -> NormSpec:
    """The norm's part in one call with activations of ``dtype``."""
    if uses_batch_statistics(norm):
        group = process_group(norm) if type(norm) is nn.SyncBatchNorm else None
        return NormSpec(norm.eps, group=group)
    # A copy: later updates of the module must not reach a backward that is still to come.
    assert norm.running_mean is not None and norm.running_var is not None
    acc = accumulation_dtype(dtype)
    moments = [norm.running_mean.detach().to(acc), norm.running_var.detach().to(acc)]
    return NormSpec(norm.eps, torch.stack(moments))  # which autocast does not know of float16


def running_of(norms: Sequence[BatchNorm]) -> Running:
    """What the norms keep of the batches they have seen."""
    return Running(
        [norm.running_mean for norm in norms],
        [norm.running_var for norm in norms],
        [norm.num_batches_tracked for norm in norms],
        [norm.momentum for norm in norms],
    )


def update_running_statistics(norm: BatchNorm, stats: Tensor, count: int) -> None:
    """One training step's update, after the whole call has succeeded.

    stats: mean and biased variance ``[2, C]`` over ``count`` values. A norm in eval mode or without
    running statistics is left alone.
    """
    if tracks(norm):
        running.update(running_of([norm]), stats, (0,), count)


def batch_norm(norm: BatchNorm, x: Tensor) -> Tensor:
    """PyTorch's batch norm with our rule for running statistics, and the activation that the norm
    may include. x ``[N, C, *spatial]``."""
    batch, count = uses_batch_statistics(norm), x.numel() // x.shape[1]
    moments: tuple[Tensor | None, ...] = (norm.running_mean, norm.running_var)
    if batch:
        group = process_group(norm)
        if group is not None:
            return _shared_batch_norm(norm, x, group)
        check_count(count, tuple(x.shape))
        moments = (None, None)
    # PyTorch's backward on the CPU takes these for dense where images are channels last.
    mean, var, gamma = (None if t is None else t.contiguous() for t in (*moments, norm.weight))
    y = F.batch_norm(x, mean, var, gamma, norm.bias, batch, 0.0, norm.eps)
    if tracks(norm):
        stats, _ = known_stats(x)
        if stats is None:
            with torch.no_grad():
                values = x.detach().to(accumulation_dtype(x.dtype))
                dims = [d for d in range(x.dim()) if d != 1]
                var, mean = torch.var_mean(values, dim=dims, correction=0)
                stats = torch.stack((mean, var))
        update_running_statistics(norm, stats, count)
    return norm.act(norm.drop(y)) if _includes_activation(norm) else y  # type: ignore[operator]


def _shared_batch_norm(norm: BatchNorm, x: Tensor, group: Any) -> Tensor:
    stats, known = known_stats(x, group)
    exchange = begin_exchange(group, x, known)
    assert exchange is not None
    operators = dispatch.choose(x.device, x.dtype).operators
    spec = PoolSpec(norm_spec(norm, x.dtype), operators, False, exchange, known is not None)
    result = Result()
    y = SharedNormFunction.apply(spec, x, stats, result, norm.weight, norm.bias)
    assert result.used is not None
    update_running_statistics(norm, result.used, exchange.total)
    return y


def check_count(count: int, shape: tuple[int, ...]) -> None:
    """ValueError where batch statistics would be taken of a single value."""
    if count == 1:
        raise ValueError(
            "input must have more than 1 value per channel for batch statistics in training, got "
            f"shape {list(shape)}; put the norms in eval mode or use a larger batch or image"
        )
