"""What can go wrong in the middle of a run, each as an error of one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .options import TrainingOptions

__all__ = ["TrainingError", "named_failures"]


class TrainingError(RuntimeError):
    """Training cannot go on, such as after a loss that is not finite."""


@contextmanager
def named_failures(
    options: TrainingOptions, image_size: int, device: torch.device, saved: str
) -> Iterator[None]:
    """Errors of files and memory as a TrainingError. saved: what of the run is kept."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or "t allocate memory" in text:
            reason = (
                f"memory: a step with batch {options.recipe.batch_size} at {image_size} px does "
                f"not fit on {device}"
            )
        elif isinstance(error, OSError):
            reason = f"out: could not write into {options.out}: {text.splitlines()[0]}"
        else:
            raise
        raise TrainingError("; ".join(filter(None, [reason, saved]))) from error
