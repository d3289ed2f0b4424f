"""A CUDA graph captured as PyTorch's documentation has it, without `GraphedStep`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from densenet_efficient.core import arena


def captured(step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The graph of a step after three steps on a side stream, and what it returns."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    arena.release()  # the graph must not depend on slabs that it does not own
    torch.cuda.empty_cache()
    return graph, loss
