"""The training loop: epochs of SGD with logs and checkpoints, resumable at every epoch.

Everything random follows from the seed and from the generators' states, which a checkpoint holds:
on the CPU a resumed run continues bit by bit as the uninterrupted one.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import write_atomically
from ..memory.process import peak_bytes
from ..models.networks import NetworkSpec
from .checkpoint import (
    export_safetensors,
    read_checkpoint,
    restore_checkpoint,
    save_checkpoint,
)
from .data import Data, loader, on_device
from .recipes import Recipe, build_optimizer, build_schedule
from .rng import seed_everything

__all__ = ["AMP", "Trainer", "TrainingError", "TrainingOptions", "train"]

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
CHECKPOINT = "checkpoint.pt"


class TrainingError(RuntimeError):
    """Training cannot go on, such as after a loss that is not finite."""


@dataclass(frozen=True)
class TrainingOptions:
    """What to train and how.

    network, execution: see `networks`. recipe: see `recipes`. amp: None, "bf16" or "fp16" autocast
    (fp16 with loss scaling). device: such as "cpu" or "cuda:0". out: folder of the logs, weights
    and checkpoint. resume: a checkpoint to continue. workers: processes that load data.
    """

    network: NetworkSpec
    recipe: Recipe
    out: Path
    execution: str = "recompute"
    amp: str | None = None
    device: str = "cpu"
    channels_last: bool = True
    seed: int = 0
    resume: Path | None = None
    overwrite: bool = False
    workers: int = 0
    tensorboard: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if self.amp is not None and self.amp not in AMP:
            raise ValueError(f"amp: expected one of {', '.join(AMP)} or None, got {self.amp!r}")
        for name in ("seed", "workers"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}: expected an integer >= 0, got {value!r}")
        check_device(self.device)


def check_device(name: str) -> torch.device:
    """The device of that name. ValueError where there is none."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected such as cpu or cuda:0, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected one of {torch.cuda.device_count()} CUDA devices that torch "
            f"{torch.__version__} sees, got {name!r}"
        )
    return device


class Trainer:
    """One training run.

    Raises:
        ValueError: the output folder holds another run and neither resume nor overwrite was asked.
        CheckpointError: the checkpoint to resume is damaged or belongs to something else.
    """

    def __init__(self, options: TrainingOptions, data: Data) -> None:
        self.options, self.data = options, data
        self.checkpoint = options.out / CHECKPOINT
        if self.checkpoint.exists() and options.resume is None and not options.overwrite:
            raise ValueError(
                f"out: expected a folder without a run, or resume or overwrite, got "
                f"{self.checkpoint}"
            )
        state = None if options.resume is None else read_checkpoint(options.resume)
        seed_everything(options.seed)
        self.device = check_device(options.device)
        self.memory_format = (
            torch.channels_last if options.channels_last else torch.contiguous_format
        )
        model = options.network.build(options.execution)
        self.model = model.to(device=self.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        self.optimizer = build_optimizer(self.model, options.recipe)
        self.train_loss = nn.CrossEntropyLoss(label_smoothing=options.recipe.label_smoothing)
        self.schedule = build_schedule(
            self.optimizer, options.recipe, max(len(self._train_loader(0)), 1)
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.amp == "fp16")
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        if state is not None:
            restore_checkpoint(state, **self._state(), description=self.describe())
            self.epoch, self.history = state["epoch"], state["history"]

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "scaler": self.scaler,
        }

    def describe(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be continued."""
        return {
            "network": self.options.network.describe(),
            "data": {"name": self.data.name, "image_size": self.data.image_size},
            "recipe": self.options.recipe.describe(),
            "amp": self.options.amp,
            "seed": self.options.seed,
        }

    def _train_loader(self, epoch: int) -> Any:
        return loader(
            self.data.train,
            self.options.recipe.batch_size,
            shuffle=True,
            seed=self.options.seed * 1_000_003 + epoch,
            workers=self.options.workers,
            pin=self.device.type == "cuda",
        )

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        amp = self.options.amp
        with torch.autocast(self.device.type, AMP.get(amp or ""), enabled=amp is not None):
            yield

    def run(self) -> list[dict[str, Any]]:
        """Train to the recipe's last epoch; returns one row of figures per epoch.

        After every epoch the checkpoint, `log.csv` and the TensorBoard log are written; at the end
        `model.safetensors`. An interruption (ctrl-C) loses the epoch under way only.

        Raises:
            TrainingError: a loss that is not finite.
        """
        writer = self._tensorboard()
        try:
            while self.epoch < self.options.recipe.epochs:
                row = self._run_epoch()
                self.history.append(row)
                self.epoch += 1
                self._save()
                if writer is not None:
                    for name, value in row.items():
                        writer.add_scalar(name, value, self.epoch)
                    writer.flush()
                self._print(row)
        finally:
            if writer is not None:
                writer.close()
        metadata = {"format": "pt", "model": self.options.network.title, "epochs": self.epoch}
        export_safetensors(self.model, self.options.out / "model.safetensors", metadata)
        return self.history

    def _run_epoch(self) -> dict[str, Any]:
        start = time.perf_counter()
        learning_rate = self.schedule.get_last_lr()[0]
        batches = self._train_loader(self.epoch)
        train_loss, train_accuracy, images = self._train_epoch(batches)
        seconds = time.perf_counter() - start
        test_loss, test_accuracy = self.evaluate()
        return {
            "epoch": self.epoch + 1,
            "learning_rate": learning_rate,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "images_per_second": images / seconds,
            "seconds": time.perf_counter() - start,
            "peak_memory_mb": peak_bytes(self.device) / 1e6,
        }

    def _train_epoch(self, batches: Any) -> tuple[float, float, int]:
        """Mean loss, accuracy and number of images of one epoch."""
        from tqdm import tqdm

        self.model.train()
        # Sums stay on the device: reading them at every step would make the host wait.
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        images_seen = 0
        bar = tqdm(
            on_device(batches, self.device, self.memory_format),
            total=len(batches),
            desc=f"epoch {self.epoch + 1}/{self.options.recipe.epochs}",
            unit="batch",
            leave=False,
            disable=None if self.options.progress else True,
        )
        start = time.perf_counter()
        for step, (images, labels) in enumerate(bar):
            with self._autocast():
                logits = self.model(images)
                loss = self.train_loss(logits, labels)
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.schedule.step()
            images_seen += len(labels)
            with torch.no_grad():
                correct = (logits.argmax(1) == labels).sum()
                sums += torch.stack((loss.double() * len(labels), correct.double()))
            if step % 10 == 9 or step + 1 == len(batches):
                mean, accuracy = (sums / images_seen).tolist()
                self._check_finite(mean)
                rate = images_seen / (time.perf_counter() - start)
                bar.set_postfix_str(
                    f"loss {mean:.4f}, accuracy {accuracy:.2%}, {rate:.0f} images/s, "
                    f"{peak_bytes(self.device) / 1e6:.0f} MB"
                )
        mean, accuracy = (sums / images_seen).tolist()
        return mean, accuracy, images_seen

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            saved = f"{self.epoch} finished epochs are in {self.checkpoint}"
            raise TrainingError(
                f"loss: expected a finite number, got {loss} in epoch {self.epoch + 1}; "
                + (saved if self.epoch else "try a smaller learning rate or a warm-up")
            )

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Mean cross entropy and accuracy on the held-out images, in eval mode."""
        self.model.eval()
        test = loader(
            self.data.test,
            self.options.recipe.batch_size,
            shuffle=False,
            seed=0,
            workers=self.options.workers,
            pin=self.device.type == "cuda",
        )
        loss, correct, count = 0.0, 0, 0
        for images, labels in on_device(test, self.device, self.memory_format):
            with self._autocast():
                logits: Tensor = self.model(images)
            loss += float(nn.functional.cross_entropy(logits.float(), labels, reduction="sum"))
            correct += int((logits.argmax(1) == labels).sum())
            count += len(labels)
        return loss / count, correct / count

    def _save(self) -> None:
        save_checkpoint(
            self.checkpoint,
            **self._state(),
            description=self.describe(),
            epoch=self.epoch,
            history=self.history,
        )
        write_atomically(self.options.out / "log.csv", self._write_csv)

    def _write_csv(self, path: str) -> None:
        with open(path, "w", newline="") as file:
            table = csv.DictWriter(file, fieldnames=list(self.history[0]))
            table.writeheader()
            table.writerows(self.history)

    def _tensorboard(self) -> Any:
        if not self.options.tensorboard:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("tensorboard: needs `pip install tensorboard`") from error
        return SummaryWriter(str(self.options.out / "tensorboard"), purge_step=self.epoch + 1)

    def _print(self, row: dict[str, Any]) -> None:
        if self.options.progress:
            print(
                f"epoch {row['epoch']:>3}  loss {row['train_loss']:.4f}  accuracy "
                f"{row['train_accuracy']:.2%}  held out {row['test_accuracy']:.2%}  "
                f"{row['images_per_second']:.0f} images/s  {row['peak_memory_mb']:.0f} MB",
                flush=True,
            )


def train(options: TrainingOptions, data: Data) -> list[dict[str, Any]]:
    """`Trainer(options, data).run()`."""
    return Trainer(options, data).run()
