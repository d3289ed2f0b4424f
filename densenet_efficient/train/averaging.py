"""The moving average of a run's weights and running statistics."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

__all__ = ["MovingAverage"]


class MovingAverage(AveragedModel):
    """PyTorch's, of parameters and buffers, in eval mode; but only the first update asks the device
    whether it is the first, so that the host waits once, and others can be part of a CUDA graph.
    All are counted on the model's device, where a replay counts, too.

    decay: the share of itself that the average keeps at each update.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        average = get_ema_multi_avg_fn(decay)
        super().__init__(model, multi_avg_fn=average, use_buffers=True)
        self.n_averaged = self.n_averaged.to(next(model.parameters()).device)
        self._average, self._begun = average, False
        self.eval()

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """One step towards the model's values; the first takes them over."""
        if not self._begun:
            super().update_parameters(model)
            self._begun = True
            return
        averaged: list[Any] = [*chain(self.module.parameters(), self.module.buffers())]
        current: list[Any] = [*chain(model.parameters(), model.buffers())]
        groups: dict[Any, Any] = _group_tensors_by_device_and_dtype([averaged, current])
        for (own, others), _ in groups.values():
            self._average(own, others, self.n_averaged)
        self.n_averaged += 1

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As of every module; the number of updates is asked again."""
        self._begun = False
        return super().load_state_dict(state_dict, *args, **kwargs)
