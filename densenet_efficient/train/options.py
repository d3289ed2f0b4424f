"""What to train and how: the options of a run, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..models.networks import NetworkSpec
from ..nn.options import MEMORY_MODES
from ..ops.dtypes import AUTOCAST
from . import distributed
from .device import check_device
from .recipes import Recipe

__all__ = ["TrainingOptions"]


@dataclass(frozen=True)
class TrainingOptions:
    """What to train and how.

    network, execution: see `networks`. recipe: see `recipes`. amp: None, "bf16" or "fp16" autocast
    (fp16 with loss scaling). device: such as "cpu" or "cuda:1". out: folder of the logs, weights
    and checkpoint. weights, freeze: see `finetuning`. sync_batch_norm: statistics over the batches
    of all processes (torchrun). cuda_graph: a step is captured once and replayed. deterministic:
    PyTorch's deterministic algorithms. resume: a checkpoint to continue; the recipe may have more
    epochs than its own. workers: processes that load data. profile, memory_snapshot: see
    `profiling`. arguments: of the command line, kept in the checkpoint.

    Raises:
        ValueError: amp, seed, workers or device is none of these; a CUDA graph without a GPU, with
            fp16, whose loss scale decides on the host whether a step is left out, or in one of
            several processes, which exchange gradients.
    """

    network: NetworkSpec
    recipe: Recipe
    out: Path
    execution: str = MEMORY_MODES[0]
    amp: str | None = None
    device: str = "cpu"
    channels_last: bool = True
    weights: str | None = None
    freeze: tuple[str, ...] = ()
    sync_batch_norm: bool = False
    cuda_graph: bool = False
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
        device = check_device(self.device)
        if self.cuda_graph:
            processes = distributed.process_count()
            for fits, expected, got in (
                (device.type == "cuda", "a CUDA device", f"device {device}"),
                (self.amp != "fp16", "amp bf16 or none", "amp fp16"),
                (processes == 1, "one process", f"{processes} processes"),
            ):
                if not fits:
                    raise ValueError(f"cuda_graph: expected {expected}, got {got}")
