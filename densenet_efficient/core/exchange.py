"""Statistics that several processes share, as those of `torch.nn.SyncBatchNorm`.

Every process holds a part of the batch. The moments of a channel are exchanged once, when the
channel is produced; the terms by which they enter the gradient once, when its last consumer has
added to them. Both are two numbers a channel, and every process issues the same collectives in the
same order whatever its part of the batch, also an empty one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import capture


@dataclass(frozen=True)
class Exchange:
    """What the processes of one call know about each other.

    group: their process group. count: rows of this process. total: rows of all of them.
    """

    group: Any
    count: int
    total: int

    @classmethod
    def begin(cls, group: Any, count: int, device: torch.device) -> Exchange:
        """Adds up the rows of all processes. The host waits for the sum: once a module, where
        PyTorch waits once a norm. RuntimeError where a CUDA graph is captured."""
        if capture.is_captured(device):
            raise RuntimeError(
                "norms that share their statistics between processes cannot be part of a CUDA "
                "graph: the host reads how many images the processes have"
            )
        total = torch.full((), count, dtype=torch.int64, device=device)
        dist.all_reduce(total, group=group)
        return cls(group, count, int(total))

    def moments(self, stats: Tensor) -> None:
        """stats ``[2, C]``, mean and biased variance of this process' rows, become those of all
        rows, in place.

        First the mean, then the squares about it: no difference of large sums, and both are sums
        over the processes, which cost fewer bytes than gathering the moments of each.
        """
        if self.count == 0:
            stats.zero_()
        share = self.count / max(self.total, 1)
        mean = stats[0] * share
        dist.all_reduce(mean, group=self.group)
        variance = (stats[0] - mean).square_().add_(stats[1]).mul_(share)
        dist.all_reduce(variance, group=self.group)
        stats[0].copy_(mean)
        stats[1].copy_(variance)

    def sums(self, values: Tensor) -> None:
        """values, any shape, become their sums over the processes, in place."""
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        values.copy_(total)


def statistics_gradient(dnorm: Tensor, norm: Tensor) -> Tensor:
    """The gradient ``[2, C]`` of the mean and variance that a norm uses, from its dgamma and dbeta
    ``dnorm [2, C]``: so a norm leaves its part of the correction to where the channels were
    produced, which exchanges it together with everybody else's."""
    dgamma, dbeta = dnorm
    scale, _, _, rstd, _ = norm
    return torch.stack((-scale * dbeta, -0.5 * scale * rstd * dgamma))


def correction_of(gradient: Tensor, count: int) -> Tensor:
    """p and q ``[2, C]`` of a correction, from the gradient of statistics over ``count`` rows."""
    return gradient * gradient.new_tensor([[-1.0], [-2.0]]).div_(max(count, 1))
