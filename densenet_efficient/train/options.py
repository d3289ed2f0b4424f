"""What to train and how: the options of a run, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..models.networks import NetworkSpec
from ..ops.dtypes import AUTOCAST
from .device import check_device
from .recipes import Recipe

__all__ = ["TrainingOptions"]


@dataclass(frozen=True)
class TrainingOptions:
    """What to train and how.

    network, execution: see `networks`. recipe: see `recipes`. amp: None, "bf16" or "fp16" autocast
    (fp16 with loss scaling). device: such as "cpu" or "cuda:0". out: folder of the logs, weights
    and checkpoint. weights, freeze: see `finetuning`. sync_batch_norm: statistics over the batches
    of all processes (torchrun). deterministic: PyTorch's deterministic algorithms. resume: a
    checkpoint to continue; the recipe may have more epochs than its own. workers: processes that
    load data. profile, memory_snapshot: see `profiling`. arguments: of the command line, kept in
    the checkpoint.

    Raises:
        ValueError: amp, seed, workers or device is none of these.
    """

    network: NetworkSpec
    recipe: Recipe
    out: Path
    execution: str = "recompute"
    amp: str | None = None
    device: str = "cpu"
    channels_last: bool = True
    weights: str | None = None
    freeze: tuple[str, ...] = ()
    sync_batch_norm: bool = False
    seed: int = 0
    deterministic: bool = False
    resume: Path | None = None
    overwrite: bool = False
    workers: int = 0
    tensorboard: bool = False
    profile: bool = False
    memory_snapshot: bool = False
    progress: bool = True
    arguments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.amp is not None and self.amp not in AUTOCAST:
            names = ", ".join(AUTOCAST)
            raise ValueError(f"amp: expected one of {names} or None, got {self.amp!r}")
        for name in ("seed", "workers"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}: expected an integer >= 0, got {value!r}")
        check_device(self.device)
