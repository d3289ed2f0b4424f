"""Several processes on this machine, joined by gloo. What they run must be a function at the top of
a module, which each of them imports anew."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing


def results_of(function: Callable[..., Any], processes: int, *arguments: Any) -> list[Any]:
    """What ``function(rank, *arguments)`` returns in each process, in order of rank."""
    with tempfile.TemporaryDirectory() as folder:
        given = (function, processes, folder, arguments)
        multiprocessing.spawn(_process, given, nprocs=processes)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(processes)]


def _process(
    rank: int, function: Callable[..., Any], processes: int, folder: str, arguments: tuple[Any, ...]
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes
    )
    torch.save(function(rank, *arguments), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
