"""The training loop: epochs of SGD with logs and checkpoints, resumable at every epoch.

Everything random follows from the seed and from the generators' states, which a checkpoint holds:
on the CPU a resumed run continues bit by bit as the uninterrupted one.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..memory.process import peak_bytes
from ..models.networks import check_image_size
from .capacity import check_memory, image_bytes, planned_bytes, state_bytes
from .checkpoint import CheckpointError, read_checkpoint, restore_checkpoint, save_checkpoint
from .data import Data, loader, on_device
from .device import check_device
from .header import describe_run
from .options import AMP, TrainingOptions
from .outputs import check_installed, open_tensorboard, prepare_folder, write_log, write_weights
from .recipes import advance, build_optimizer, build_schedule
from .rng import seed_everything

__all__ = ["AMP", "CHECKPOINT", "Trainer", "TrainingError", "TrainingOptions"]

CHECKPOINT = "checkpoint.pt"


class TrainingError(RuntimeError):
    """Training cannot go on, such as after a loss that is not finite."""


class Trainer:
    """One training run. Everything that can be known to fail is checked before it begins.

    Raises:
        ValueError: the output folder holds another run and neither resume nor overwrite was asked,
            or cannot be written; images that are too small for the network; a batch that needs more
            memory than the device has; one of several processes (torchrun).
        ImportError: a package of the extra "train" is missing.
        CheckpointError: the checkpoint to resume is damaged or belongs to something else.
    """

    def __init__(self, options: TrainingOptions, data: Data) -> None:
        self.options, self.data = options, data
        self.checkpoint = options.out / CHECKPOINT
        _check_one_process()
        check_installed("safetensors", "tqdm", *["tensorboard"] * options.tensorboard)
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
        check_image_size(model, data.image_size)
        self.model = model.to(device=self.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        size, batch = data.image_size, options.recipe.batch_size
        shape = (batch, data.channels, size, size)
        self.planned = planned_bytes(self.model, shape, AMP.get(options.amp or ""))
        self.standing = state_bytes(self.model, momentum=options.recipe.momentum > 0)
        self.standing += batch * image_bytes(data.channels, size)
        check_memory((self.planned or 0) + self.standing, batch, size, self.device)
        self.optimizer = build_optimizer(self.model, options.recipe)
        self.train_loss = nn.CrossEntropyLoss(label_smoothing=options.recipe.label_smoothing)
        self.steps_per_epoch = max(len(self._train_loader(0)), 1)
        self.schedule = build_schedule(self.optimizer, options.recipe, self.steps_per_epoch)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.amp == "fp16")
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        if state is not None:
            self._resume(state)
        prepare_folder(options.out, self.model)

    def _resume(self, state: dict[str, Any]) -> None:
        """Continue a checkpoint's run; with another number of epochs its schedule is stretched."""
        recipe = state["description"].get("recipe")
        described = self.describe()
        epochs = recipe.get("epochs") if isinstance(recipe, dict) else None
        same = epochs == self.options.recipe.epochs
        if not same and type(epochs) is int:
            described["recipe"]["epochs"] = epochs
        if state["epoch"] > self.options.recipe.epochs:
            raise CheckpointError(
                f"checkpoint's epochs: expected at most the recipe's {self.options.recipe.epochs}, "
                f"got {state['epoch']} finished ones"
            )
        parts = self._state()
        parts["schedule"] = self.schedule if same else None
        restore_checkpoint(state, **parts, description=described)
        self.epoch, self.history = state["epoch"], state["history"]
        if not same:
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"]
            self.schedule = build_schedule(
                self.optimizer, self.options.recipe, self.steps_per_epoch
            )
            advance(self.schedule, self.epoch * self.steps_per_epoch)

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
            "data": {
                "name": self.data.name,
                "image_size": self.data.image_size,
                "classes": list(self.data.classes),
                "images": [len(self.data.train), len(self.data.test)],  # type: ignore[arg-type]
            },
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

        After every epoch the checkpoint, `log.csv` and the TensorBoard log are written, and
        `best.safetensors` where the held-out accuracy is the highest so far; at the end
        `model.safetensors`. An interruption (ctrl-C) loses the epoch under way only.

        Raises:
            TrainingError: a loss that is not finite, memory that does not suffice, or files that
                cannot be written.
        """
        writer = None
        if self.options.progress:
            header = (self.options, self.data, self.model, self.planned, self.standing)
            print(describe_run(*header), flush=True)
        if self.options.tensorboard:
            writer = open_tensorboard(self.options.out, self.epoch + 1)
        try:
            while self.epoch < self.options.recipe.epochs:
                with self._named_failures():
                    row = self._run_epoch()
                self._finish_epoch(row)
                if writer is not None:
                    for name, value in row.items():
                        writer.add_scalar(name, value, self.epoch)
                    writer.flush()
                self._print(row)
        finally:
            if writer is not None:
                writer.close()
        with self._named_failures():
            self._write_weights("model.safetensors", self.history[-1])
        return self.history

    def _finish_epoch(self, row: dict[str, Any]) -> None:
        """Keep what the epoch gave. The best weights come first: a run that is killed between the
        two writes trains the epoch again."""
        best = all(row["test_accuracy"] > other["test_accuracy"] for other in self.history)
        with self._named_failures():
            if best:
                self._write_weights("best.safetensors", row)
            self.history.append(row)
            self.epoch += 1
            self._save()

    def _write_weights(self, name: str, row: dict[str, Any]) -> None:
        options = self.options
        write_weights(self.model, options.out / name, options.network, self.data, row)

    @contextmanager
    def _named_failures(self) -> Iterator[None]:
        """Errors of files and memory as a TrainingError of one line."""
        saved = f"{self.epoch} finished epochs are in {self.checkpoint}" if self.epoch else ""
        try:
            yield
        except (OSError, RuntimeError) as error:
            text = str(error)
            if isinstance(error, torch.OutOfMemoryError) or "t allocate memory" in text:
                reason = (
                    f"memory: a step with batch {self.options.recipe.batch_size} at "
                    f"{self.data.image_size} px does not fit on {self.device}"
                )
            elif isinstance(error, OSError):
                reason = f"out: could not write into {self.options.out}: {text.splitlines()[0]}"
            else:
                raise
            raise TrainingError("; ".join(filter(None, [reason, saved]))) from error

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
        """The checkpoint comes last: until it is there, the epoch is trained and logged again."""
        write_log(self.options.out / "log.csv", self.history)
        save_checkpoint(
            self.checkpoint,
            **self._state(),
            description=self.describe(),
            epoch=self.epoch,
            history=self.history,
            arguments=self.options.arguments,
        )

    def _print(self, row: dict[str, Any]) -> None:
        if self.options.progress:
            print(
                f"epoch {row['epoch']:>3}  loss {row['train_loss']:.4f}  accuracy "
                f"{row['train_accuracy']:.2%}  held out {row['test_accuracy']:.2%}  "
                f"{row['images_per_second']:.0f} images/s  {row['peak_memory_mb']:.0f} MB",
                flush=True,
            )


def _check_one_process() -> None:
    """torchrun starts one process a GPU; all of them would train the same into one folder."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes not in ("", "1"):
        raise ValueError(
            f"WORLD_SIZE: expected one process, got {processes} (torchrun?); training on several "
            "devices is not supported"
        )
