"""One optimiser step on one batch: autocast, loss scaling, accumulation, clipping, averaging; as a
CUDA graph where that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from ..nn.graphed_step import GraphedStep
from ..ops.dtypes import AUTOCAST
from .augmentation import mixing
from .distributed import gradients_stay
from .recipes import Recipe

__all__ = ["Steps"]


class Steps:
    """The steps of a run.

    Args:
        model: called and differentiated; see `distributed.parallel`.
        average: None, or the moving average of the model's parameters and buffers.
        amp: None, "bf16" or "fp16".
        cuda_graph: everything from the gradients to the average is captured once and replayed;
            mixing images and the schedule stay outside.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
        scaler: torch.amp.GradScaler,
        average: AveragedModel | None,
        recipe: Recipe,
        num_classes: int,
        amp: str | None,
        cuda_graph: bool = False,
    ) -> None:
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.scaler, self.average, self.recipe, self.amp = scaler, average, recipe, amp
        self.loss = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
        self.mixing = mixing(recipe, num_classes)
        self.run: Callable[[Tensor, Tensor], Tensor] = self._step
        if cuda_graph:
            averages = [] if average is None else [average]
            self.run = GraphedStep(self._step, model, optimizer, *averages)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Train on images [n, C, H, W] and labels [n]; returns [2] in float64: the sum of the n
        losses and the number of correct answers, on the device, without waiting for it."""
        targets = labels
        if self.mixing is not None:
            images, targets = self.mixing(images, labels)
        sums = self.run(images, targets)
        self.schedule.step()
        return sums

    def _step(self, images: Tensor, targets: Tensor) -> Tensor:
        """Everything but the schedule, on labels [n] or shares of classes [n, classes]."""
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(2, dtype=torch.float64, device=images.device)
        parts = self.recipe.parts(len(images))
        pairs = zip(images.tensor_split(parts), targets.tensor_split(parts), strict=True)
        for index, (part, wanted) in enumerate(pairs):
            last = index + 1 == parts
            with nullcontext() if last else gradients_stay(self.model):
                sums += self._add_gradients(part, wanted, len(part) / len(images))
        if self.recipe.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            module = getattr(self.model, "module", self.model)  # inside DistributedDataParallel
            self.average.update_parameters(module)
        return sums

    def _add_gradients(self, images: Tensor, targets: Tensor, share: float) -> Tensor:
        """share: of the batch's images, with which the mean loss of a part counts."""
        dtype = AUTOCAST.get(self.amp or "")
        with torch.autocast(images.device.type, dtype, enabled=self.amp is not None):
            logits = self.model(images)
            loss = self.loss(logits, targets)
        self.scaler.scale(loss * share).backward()
        with torch.no_grad():
            labels = targets if targets.ndim == 1 else targets.argmax(1)
            correct = (logits.argmax(1) == labels).sum()
            return torch.stack((loss.double() * len(labels), correct.double()))
