"""A model on held-out images: mean cross entropy and accuracy, over all processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..ops.dtypes import AUTOCAST
from . import distributed
from .batches import held_out_batches, on_device

__all__ = ["evaluate"]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: Dataset,
    *,
    batch_size: int,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
    amp: str | None = None,
    workers: int = 0,
) -> tuple[float, float]:
    """Mean cross entropy and accuracy on all images, in eval mode, which the model stays in.

    Every process takes its share of the images, with the first process' running statistics.

    Args:
        images: (image [C, H, W] float32, class) each; `batch_size` of them at once in a process.
        amp: None, "bf16" or "fp16" autocast; the loss is computed in float32.

    Raises:
        DataError: there is no image, or one cannot be read.
    """
    model.eval()
    distributed.share_buffers(model)
    loader = held_out_batches(images, batch_size, workers=workers, pin=device.type == "cuda")
    # Loss, correct answers, images.
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for batch, labels in on_device(loader, device, memory_format):
        with torch.autocast(device.type, AUTOCAST.get(amp or ""), enabled=amp is not None):
            logits: Tensor = model(batch)
        loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        correct = (logits.argmax(1) == labels).sum()
        sums += torch.stack((loss.double(), correct.double(), sums.new_tensor(len(labels))))
    loss_sum, correct_sum, count = distributed.total(sums).tolist()
    return loss_sum / count, correct_sum / count
