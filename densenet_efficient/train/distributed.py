"""Several processes, one a device, as torchrun starts them: which this is, what they exchange.

The batch of a recipe is shared out over the processes, so that a recipe means the same for any
number of them. Every process trains; the first one alone prints and writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..reference import DenseNet
from .device import check_device

__all__ = [
    "check_joined",
    "check_shares",
    "first_alone",
    "gradients_stay",
    "is_first",
    "joined",
    "on_first",
    "parallel",
    "process_count",
    "rank",
    "share_buffers",
    "total",
]

Result = TypeVar("Result")


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Join the processes of a torchrun for the length of the context, and leave them after it;
    gives the device of this one. A process on its own keeps `device` and joins nobody.

    Raises:
        ValueError: no such device, or one with a number, which every process would take.
    """
    if _started() == 1:
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    elif device.startswith("cuda"):
        raise ValueError(f"device: expected cuda without a number under torchrun, got {device!r}")
    found = check_device(device)
    if found.type == "cuda":
        torch.cuda.set_device(found)
    dist.init_process_group("nccl" if found.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _started() -> int:
    """How many processes torchrun has started."""
    return int(os.environ.get("WORLD_SIZE") or "1")


def check_joined() -> None:
    """ValueError in one of several processes that have not joined: each would train for itself."""
    if _started() > 1 and not dist.is_initialized():
        raise ValueError(
            f"WORLD_SIZE: expected one process, or several inside train.distributed.joined, got "
            f"{_started()} that have not joined"
        )


def check_shares(batch_size: int) -> None:
    """ValueError where a batch cannot be shared out evenly."""
    if batch_size % process_count():
        raise ValueError(
            f"batch_size: expected a multiple of the {process_count()} processes, which share a "
            f"batch, got {batch_size}"
        )


def process_count() -> int:
    """How many have joined; 1 for a process on its own."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process: 0, 1, ..."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def on_first(function: Callable[[], Result]) -> Result | None:
    """What the function returns, in the first process; None in the others, which do not call it. An
    error of the first is raised in all, so that none of them waits for it."""
    if process_count() == 1:
        return function()
    result, error = None, None
    if is_first():
        try:
            result = function()
        except Exception as raised:
            error = raised
    told: list[Any] = [error]
    dist.broadcast_object_list(told)
    if told[0] is not None:
        raise told[0]
    return result


def first_alone(function: Callable[[], Result]) -> Result:
    """What the function returns in every process; the others call it once the first is done, such
    as with a download."""
    result = on_first(function)
    return function() if result is None else result


def parallel(model: nn.Module, device: torch.device, sync_batch_norm: bool) -> nn.Module:
    """The module to call in training: its backward averages the gradients over the processes, and
    with `sync_batch_norm` statistics are over the batches of all. The first process' parameters and
    buffers are everybody's from here on.

    Raises:
        ValueError: there is one process, or PyTorch's own norms would have to run on the CPU.
    """
    if process_count() == 1:
        if sync_batch_norm:
            raise ValueError("sync_batch_norm: expected several processes (torchrun), got one")
        return model
    if sync_batch_norm and device.type == "cpu" and isinstance(model, DenseNet):
        raise ValueError(
            "sync_batch_norm: expected our operators or a GPU, got the reference on the CPU, where "
            "PyTorch's SyncBatchNorm does not run"
        )
    wrapped = DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    if sync_batch_norm:  # after wrapping, which refuses these norms on the CPU, where ours run
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return wrapped


def gradients_stay(model: nn.Module) -> AbstractContextManager[None]:
    """Within it, backward adds to this process' gradients without exchanging them."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def share_buffers(model: nn.Module) -> None:
    """The first process' buffers for all: running statistics are each process' own in training."""
    if process_count() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def total(values: Tensor) -> Tensor:
    """The sum of the processes' values, in place."""
    if process_count() > 1:
        dist.all_reduce(values)
    return values
