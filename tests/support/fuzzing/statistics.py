"""Values at which low precision goes wrong: what the channels of an input and the parameters of a
norm may be like."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .structures import norms_of

CHANNELS = ["ordinary", "ordinary", "offset", "far", "constant", "outlier", "small", "large"]
GAMMAS = ["ordinary", "ordinary", "zero", "tiny", "huge", "negative"]


def channel(kind: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """One channel of a batch, in float64; large stays within float16."""
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "offset":
        return 5 + 0.1 * values
    if kind == "far":
        return 1e4 + 1e-2 * values
    if kind == "constant":
        return torch.full_like(values, 1e4 * torch.rand((), generator=generator).item())
    if kind == "outlier":
        values.view(-1)[torch.randint(values.numel(), (), generator=generator)] = 1e3
    return values * {"small": 1e-4, "large": 1e3}.get(kind, 1)


def batch(shape: Sequence[int], kinds: Sequence[str], seed: int) -> Tensor:
    """Images ``[N, C, *spatial]`` in float64 whose channels are of these kinds, in turn."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (shape[0], *shape[2:])
    values = [channel(kinds[c % len(kinds)], sizes, generator) for c in range(shape[1])]
    return torch.stack(values, 1)


def set_gammas(module: nn.Module, kinds: Sequence[str]) -> None:
    """Makes the scales of every norm of these kinds, channel by channel in turn."""
    factors = {"zero": 0.0, "tiny": 1e-4, "huge": 1e2, "negative": -1.0}
    with torch.no_grad():
        for norm in norms_of(module):
            if norm.weight is not None:
                for c in range(len(norm.weight)):
                    norm.weight[c] *= factors.get(kinds[c % len(kinds)], 1.0)
