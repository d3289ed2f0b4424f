"""What is known before a run begins, as the lines that describe it."""

from __future__ import annotations

from typing import Any

from torch import nn

from . import distributed
from .data import Data
from .options import TrainingOptions
from .recipes import Recipe, schedule_text

__all__ = ["describe_run"]


def describe_run(
    options: TrainingOptions,
    data: Data,
    model: nn.Module,
    planned: int | None,
    standing: int,
    new_classifier: bool = False,
) -> str:
    """Model, data, recipe and memory, a line each. planned, standing: bytes of a step's peak and of
    what is there before it. new_classifier: not among the weights that the run starts from."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    train, held_out = len(data.train), len(data.test)  # type: ignore[arg-type]
    layout = "channels_last" if options.channels_last else "contiguous"
    memory = "no plan for plain PyTorch"
    if planned is not None:
        memory = f"planned peak of a step {planned / 1e6:,.1f} MB"
    graph = ", steps in a CUDA graph" if options.cuda_graph else ""
    processes = distributed.process_count()
    averaged = " average," if options.recipe.ema_decay else ""
    several = f" in each of {processes} processes" if processes > 1 else ""
    start = [f"weights of {options.weights}"] if options.weights else []
    start += ["the classifier is new"] if options.weights and new_classifier else []
    start += [f"frozen: {', '.join(options.freeze)}"] if options.freeze else []
    return "\n".join(
        [
            f"model   {options.network.title}, {parameters:,} parameters; {options.execution}, "
            f"{options.amp or 'fp32'}, {layout}, {options.device}{graph}",
            f"data    {data.name}, {train:,} training and {held_out:,} held-out images, "
            f"{data.num_classes} classes, {data.channels} x {data.image_size} x {data.image_size}",
            f"recipe  {_recipe_line(options.recipe)}",
            f"memory  {memory}, above {standing / 1e6:,.1f} MB of weights,{averaged} momentum and "
            f"images{several}",
            *([f"start   {'; '.join(start)}"] if start else []),
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
        f"RandAugment of magnitude {recipe.randaugment}": recipe.randaugment,
        f"MixUp {recipe.mixup:g}": recipe.mixup,
        f"CutMix {recipe.cutmix:g}": recipe.cutmix,
        f"{recipe.accumulate} parts a batch": recipe.accumulate > 1,
        f"gradients clipped to {recipe.clip_norm:g}": recipe.clip_norm,
        f"averaged by {recipe.ema_decay:g}": recipe.ema_decay,
    }
    return ", ".join([*words, *(text for text, wanted in optional.items() if wanted)])
