"""The training loop: epochs of SGD with logs and checkpoints, resumable at every epoch.

Everything random follows from the seed and from the generators' states, which a checkpoint holds:
on the CPU a resumed run continues bit by bit as the uninterrupted one.
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..memory.process import peak_bytes
from ..models.networks import check_image_size
from . import distributed
from .averaging import MovingAverage
from .batches import on_device, training_batches
from .capacity import plan_run
from .checkpoint import CheckpointError, read_checkpoint, restore_checkpoint, save_checkpoint
from .data import Data
from .device import check_device
from .evaluation import evaluate
from .failures import TrainingError, named_failures
from .finetuning import freeze, start_from, train_mode
from .header import describe_run
from .options import TrainingOptions
from .outputs import (
    check_installed,
    check_unused,
    open_tensorboard,
    prepare_folder,
    write_log,
    write_weights,
)
from .profiling import check_profiling, profiled
from .recipes import advance, build_optimizer, build_schedule
from .rng import deterministic_algorithms, seed_everything
from .steps import Steps

__all__ = ["CHECKPOINT", "Trainer", "TrainingError", "TrainingOptions"]

CHECKPOINT = "checkpoint.pt"


class Trainer:
    """One training run. Everything that can be known to fail is checked before it begins.

    Raises:
        ValueError: the output folder holds another run and neither resume nor overwrite was asked,
            or cannot be written; images that are too small for the network; a batch that needs more
            memory than the device has, or that the processes cannot share; one of several processes
            (torchrun) outside `distributed.joined`; weights or names to freeze that are not the
            network's.
        ImportError: a package of the extra "train" is missing.
        CheckpointError: the checkpoint to resume is damaged or belongs to something else.
    """

    def __init__(self, options: TrainingOptions, data: Data) -> None:
        self.options, self.data = options, data
        recipe = options.recipe
        self.checkpoint = options.out / CHECKPOINT
        distributed.check_joined()
        distributed.check_shares(recipe.batch_size)
        check_installed("safetensors", "tqdm", *["tensorboard"] * options.tensorboard)
        if options.resume is None and not options.overwrite:
            distributed.on_first(lambda: check_unused(self.checkpoint))
        state = None if options.resume is None else read_checkpoint(options.resume)
        seed_everything(options.seed)
        self.device = check_device(options.device)
        self.memory_format = (
            torch.channels_last if options.channels_last else torch.contiguous_format
        )
        model = options.network.build(options.execution)
        check_image_size(model, data.image_size)
        self.new_classifier = False
        if options.weights is not None and state is None:
            self.new_classifier = not start_from(model, options.network, options.weights)
        freeze(model, options.freeze)
        self.model = model.to(device=self.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        self.planned, self.standing = plan_run(self.model, data, recipe, options.amp, self.device)
        self.optimizer = build_optimizer(self.model, recipe, options.cuda_graph or None)
        self.steps_per_epoch = max(len(self._train_batches(0)), 1)
        self.schedule = build_schedule(self.optimizer, recipe, self.steps_per_epoch)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.amp == "fp16")
        decay = recipe.ema_decay
        self.average = MovingAverage(self.model, decay) if decay else None
        wanted = {"profile": options.profile, "memory_snapshot": options.memory_snapshot}
        check_profiling(self.device, self.steps_per_epoch, **wanted)
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        if state is not None:
            try:
                self._resume(state)
            except CheckpointError as error:
                raise CheckpointError(f"{options.resume}: {error}") from error
        trained = distributed.parallel(self.model, self.device, options.sync_batch_norm)
        parts = {**self._state(), "model": trained}
        known: dict[str, Any] = {
            "recipe": recipe,
            "num_classes": data.num_classes,
            "amp": options.amp,
        }
        self.steps = Steps(**parts, **known, cuda_graph=options.cuda_graph)
        copies = 3 if self.average is None else 4  # with the momentum, and the best weights
        distributed.on_first(lambda: prepare_folder(options.out, self.model, copies))

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
            "average": self.average,
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
            "freeze": list(self.options.freeze),
            "seed": self.options.seed,
        }

    def _train_batches(self, epoch: int) -> DataLoader:
        return training_batches(
            self.data.train,
            self.options.recipe.batch_size,
            seed=self.options.seed * 1_000_003,
            epoch=epoch,
            workers=self.options.workers,
            pin=self.device.type == "cuda",
        )

    def run(self) -> list[dict[str, Any]]:
        """Train to the recipe's last epoch; returns one row of figures per epoch.

        After every epoch the checkpoint, `log.csv` and the TensorBoard log are written, and
        `best.safetensors` where the held-out accuracy is the highest so far; at the end
        `model.safetensors`. An interruption (ctrl-C) loses the epoch under way only.

        Raises:
            TrainingError: a loss that is not finite, memory that does not suffice, or files that
                cannot be written.
        """
        options, writer = self.options, None
        if self._shows:
            known = (self.planned, self.standing, self.new_classifier)
            print(describe_run(options, self.data, self.model, *known), flush=True)
        if options.tensorboard and distributed.is_first():
            writer = open_tensorboard(options.out, self.epoch + 1)
        try:
            with deterministic_algorithms(options.deterministic):
                self._run_epochs(writer)
        finally:
            if writer is not None:
                writer.close()
        with self._named_failures():
            self._write_weights("model.safetensors", self.history[-1])
        return self.history

    def _run_epochs(self, writer: Any) -> None:
        while self.epoch < self.options.recipe.epochs:
            with self._named_failures():
                row = self._run_epoch()
            self._finish_epoch(row)
            if writer is not None:
                for name, value in row.items():
                    writer.add_scalar(name, value, self.epoch)
                writer.flush()
            self._print(row)

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

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and saved: the averaged one, if there is one."""
        return self.model if self.average is None else self.average.module

    def _write_weights(self, name: str, row: dict[str, Any]) -> None:
        options = self.options
        if distributed.is_first():
            write_weights(self.evaluated, options.out / name, options.network, self.data, row)

    def _named_failures(self) -> AbstractContextManager[None]:
        return named_failures(self.options, self.data.image_size, self.device, self._saved())

    def _saved(self) -> str:
        return f"{self.epoch} finished epochs are in {self.checkpoint}" if self.epoch else ""

    def _run_epoch(self) -> dict[str, Any]:
        if not distributed.is_first():  # whose generators are in no checkpoint
            seed = self.options.seed * 1_000_003 + self.epoch
            seed_everything(seed + 1_000_000_007 * distributed.rank())
        start = time.perf_counter()
        learning_rate = self.schedule.get_last_lr()[0]
        train_loss, train_accuracy, images = self._train_epoch()
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

    def _train_epoch(self) -> tuple[float, float, int]:
        """Mean loss, accuracy and number of images of one epoch, over all processes. What is shown
        on the way is of this process."""
        from tqdm import tqdm

        options, first = self.options, self.epoch == 0
        batches = self._train_batches(self.epoch)
        train_mode(self.model, options.freeze)
        # Sums stay on the device: reading them at every step would make the host wait.
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        images_seen = 0
        bar = tqdm(
            on_device(batches, self.device, self.memory_format),
            total=len(batches),
            desc=f"epoch {self.epoch + 1}/{options.recipe.epochs}",
            unit="batch",
            leave=False,
            disable=None if self._shows else True,
        )
        start = time.perf_counter()
        wanted = {
            "profile": options.profile and first and distributed.is_first(),
            "memory_snapshot": options.memory_snapshot and first and distributed.is_first(),
        }
        with profiled(options.out, self.device, **wanted) as after_step:
            for step, (images, labels) in enumerate(bar):
                sums += self.steps(images, labels)
                after_step()
                images_seen += len(labels)
                if step % 10 == 9 or step + 1 == len(batches):
                    mean, accuracy = (sums / images_seen).tolist()
                    self._check_finite(mean)
                    rate = images_seen / (time.perf_counter() - start)
                    bar.set_postfix_str(
                        f"loss {mean:.4f}, accuracy {accuracy:.2%}, {rate:.0f} images/s, "
                        f"{peak_bytes(self.device) / 1e6:.0f} MB"
                    )
        all_images = images_seen * distributed.process_count()
        mean, accuracy = (distributed.total(sums) / all_images).tolist()
        return mean, accuracy, all_images

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            advice = self._saved() or "try a smaller learning rate or a warm-up"
            raise TrainingError(
                f"loss: expected a finite number, got {loss} in epoch {self.epoch + 1}; {advice}"
            )

    def evaluate(self) -> tuple[float, float]:
        """Mean cross entropy and accuracy on the held-out images, in eval mode."""
        return evaluate(
            self.evaluated,
            self.data.test,
            batch_size=self.options.recipe.batch_size // distributed.process_count(),
            device=self.device,
            memory_format=self.memory_format,
            amp=self.options.amp,
            workers=self.options.workers,
        )

    def _save(self) -> None:
        """The checkpoint comes last: until it is there, the epoch is trained and logged again."""
        if not distributed.is_first():
            return
        write_log(self.options.out / "log.csv", self.history)
        save_checkpoint(
            self.checkpoint,
            **self._state(),
            description=self.describe(),
            epoch=self.epoch,
            history=self.history,
            arguments=self.options.arguments,
        )

    @property
    def _shows(self) -> bool:
        return self.options.progress and distributed.is_first()

    def _print(self, row: dict[str, Any]) -> None:
        if self._shows:
            print(
                f"epoch {row['epoch']:>3}  loss {row['train_loss']:.4f}  accuracy "
                f"{row['train_accuracy']:.2%}  held out {row['test_accuracy']:.2%}  "
                f"{row['images_per_second']:.0f} images/s  {row['peak_memory_mb']:.0f} MB",
                flush=True,
            )
