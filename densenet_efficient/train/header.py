"""What is known before a run begins: its memory, and the lines that describe it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..memory.planner import plan
from .data import Data
from .device import device_memory_bytes
from .options import TrainingOptions
from .recipes import Recipe, schedule_text

__all__ = ["check_memory", "describe_run", "planned_bytes"]


def planned_bytes(
    model: nn.Module, data: Data, recipe: Recipe, dtype: torch.dtype | None
) -> int | None:
    """The planned peak of a training step above its baseline; None for models without a plan
    (plain PyTorch)."""
    shape = (recipe.batch_size, data.channels, data.image_size, data.image_size)
    own = next(model.parameters()).dtype
    try:
        return plan(model, shape, dtype or own).peak_bytes
    except TypeError:
        return None


def _standing_bytes(model: nn.Module, data: Data, recipe: Recipe) -> int:
    """Bytes of the baseline: parameters, buffers, momentum, and a batch of images and labels."""
    state = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    momentum = sum(parameter.nbytes for parameter in trained) if recipe.momentum else 0
    image = 4 * data.channels * data.image_size**2 + 8
    return state + momentum + recipe.batch_size * image


def check_memory(
    model: nn.Module, data: Data, recipe: Recipe, planned: int | None, device: torch.device
) -> None:
    """ValueError where a training step needs more memory than the device has."""
    available = device_memory_bytes(device)
    needed = (planned or 0) + _standing_bytes(model, data, recipe)
    if needed > available:
        raise ValueError(
            f"batch_size: expected one whose step fits into the {available / 1e9:.1f} GB of "
            f"{device}, got {recipe.batch_size}, which needs {needed / 1e9:.1f} GB at "
            f"{data.image_size} px"
        )


def describe_run(
    options: TrainingOptions, data: Data, model: nn.Module, planned: int | None
) -> str:
    """Model, data, recipe and memory, a line each."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    train, held_out = len(data.train), len(data.test)  # type: ignore[arg-type]
    layout = "channels_last" if options.channels_last else "contiguous"
    memory = "no plan for plain PyTorch"
    if planned is not None:
        memory = f"planned peak of a step {planned / 1e6:,.1f} MB"
    standing = _standing_bytes(model, data, options.recipe) / 1e6
    return "\n".join(
        [
            f"model   {options.network.title}, {parameters:,} parameters; {options.execution}, "
            f"{options.amp or 'fp32'}, {layout}, {options.device}",
            f"data    {data.name}, {train:,} training and {held_out:,} held-out images, "
            f"{data.num_classes} classes, {data.channels} x {data.image_size} x {data.image_size}",
            f"recipe  {_recipe_line(options.recipe)}",
            f"memory  {memory}, above {standing:,.1f} MB of weights, momentum and images",
        ]
    )


def _recipe_line(recipe: Recipe) -> str:
    """One line."""
    words = [f"{recipe.epochs} epochs", f"batches of {recipe.batch_size}"]
    words.append(f"SGD at {recipe.learning_rate:g}, momentum {recipe.momentum:g}")
    words.append(f"weight decay {recipe.weight_decay:g}")
    words.append(f"{recipe.schedule} schedule ({schedule_text(recipe)})")
    optional: dict[str, Any] = {
        f"label smoothing {recipe.label_smoothing:g}": recipe.label_smoothing,
        "augmentation": recipe.augment,
    }
    return ", ".join([*words, *(text for text, wanted in optional.items() if wanted)])
