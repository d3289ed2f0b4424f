"""What of a training run fits into memory: its state, its batch of images and its step's plan."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

import torch
from torch import nn

from ..memory.planner import max_batch, plan
from ..ops.dtypes import AUTOCAST
from . import distributed
from .data import Data
from .device import device_memory_bytes
from .recipes import Recipe

__all__ = [
    "image_bytes",
    "largest_batch",
    "plan_run",
    "planned_bytes",
    "run_state_bytes",
    "state_bytes",
]


def planned_bytes(
    model: nn.Module, input_shape: Sequence[int], dtype: torch.dtype | None
) -> int | None:
    """The planned peak of a training step above its baseline, for images [N, C, H, W]; None for
    models without a plan (plain PyTorch). dtype: None is that of the parameters."""
    own = next(model.parameters()).dtype
    try:
        return plan(model, input_shape, dtype or own).peak_bytes
    except TypeError:
        return None


def state_bytes(model: nn.Module, *, momentum: bool = True) -> int:
    """Parameters, buffers and, with `momentum`, a value more for each parameter that is trained."""
    state = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return state + (trained if momentum else 0)


def run_state_bytes(model: nn.Module, recipe: Recipe) -> int:
    """What a run keeps from step to step: `state_bytes` and, where the recipe averages, a copy of
    parameters and buffers."""
    average = state_bytes(model, momentum=False) if recipe.ema_decay else 0
    return state_bytes(model, momentum=recipe.momentum > 0) + average


def image_bytes(channels: int, image_size: int) -> int:
    """An image in float32 and its label."""
    return 4 * channels * image_size**2 + 8


def largest_batch(
    model: nn.Module,
    image: tuple[int, int, int],
    dtype: torch.dtype,
    size: float,
    *,
    training: bool = True,
    parts: int = 1,
) -> int:
    """The largest batch whose planned peak and images [C, H, W] fit into `size` bytes; 0 where none
    does. parts: so many such batches are computed one after the other, and the images of all are
    there. TypeError for models without a plan."""
    if size <= 0:
        return 0

    def needed(batch: int) -> int:
        peak = plan(model, (batch, *image), dtype, training=training).peak_bytes
        return peak + parts * batch * image_bytes(image[0], image[1])

    without_images = max_batch(model, image, dtype, size, training=training)
    return bisect.bisect_right(range(1, without_images + 1), size, key=needed)


def plan_run(
    model: nn.Module, data: Data, recipe: Recipe, amp: str | None, device: torch.device
) -> tuple[int | None, int]:
    """Planned bytes of a step (`planned_bytes`) in this process, and the bytes there before it.

    Raises:
        ValueError: both together are more than the device has.
    """
    size, batch = data.image_size, recipe.batch_size // distributed.process_count()
    part = math.ceil(batch / recipe.parts(batch))
    planned = planned_bytes(model, (part, data.channels, size, size), AUTOCAST.get(amp or ""))
    standing = run_state_bytes(model, recipe) + batch * image_bytes(data.channels, size)
    needed, available = (planned or 0) + standing, device_memory_bytes(device)
    if needed > available:
        raise ValueError(
            f"batch_size: expected one whose step fits into the {available / 1e9:.1f} GB of "
            f"{device}, got {batch}, which needs {needed / 1e9:.1f} GB at {size} px"
        )
    return planned, standing
