"""The training loop and its recipes: it learns, logs, stops cleanly, and says what is wrong."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from densenet_efficient.models.networks import EXECUTIONS, NetworkSpec
from densenet_efficient.train.data import Data, TensorImages, load_data
from densenet_efficient.train.recipes import Recipe, build_optimizer, build_schedule, recipe_for
from densenet_efficient.train.trainer import CHECKPOINT, Trainer, TrainingError, TrainingOptions

NETWORK = NetworkSpec("densenet_cifar", depth=10, growth_rate=4, num_classes=10, in_channels=1)


def options(out: Path, epochs: int = 2, **changes: Any) -> TrainingOptions:
    recipe = recipe_for("digits", epochs=epochs, batch_size=32)
    base = TrainingOptions(NETWORK, recipe, out, execution="reference", progress=False)
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize(
    "execution, amp",
    [("recompute", None), ("recompute", "bf16"), ("store", None), ("reference", None)],
)
def test_it_learns_the_digits(tmp_path: Path, execution: str, amp: str | None) -> None:
    data = load_data("digits", image_size=8, augment=False, limit=480)
    recipe = Recipe(epochs=5, batch_size=32, schedule="cosine", warmup_epochs=1)
    network = dataclasses.replace(NETWORK, growth_rate=12)
    run = options(tmp_path, recipe=recipe, network=network, execution=execution, amp=amp)
    history = Trainer(run, data).run()
    assert history[-1]["test_accuracy"] > 0.7
    assert history[-1]["train_loss"] < history[0]["train_loss"] / 2


def test_the_logs_hold_one_row_an_epoch(tmp_path: Path) -> None:
    data = load_data("digits", image_size=8, limit=64)
    history = Trainer(options(tmp_path, tensorboard=True), data).run()
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [int(row["epoch"]) for row in rows] == [1, 2]
    assert float(rows[1]["test_loss"]) == history[1]["test_loss"]
    assert float(rows[0]["images_per_second"]) > 0 and float(rows[0]["peak_memory_mb"]) > 1
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_used_folder_is_not_overwritten_unasked(tmp_path: Path) -> None:
    data = load_data("digits", image_size=8, limit=64)
    Trainer(options(tmp_path), data).run()
    with pytest.raises(ValueError, match="out: expected a folder without a run"):
        Trainer(options(tmp_path), data)
    assert Trainer(options(tmp_path, overwrite=True), data).epoch == 0


class Interrupting(TensorImages):
    """Images of which the hundredth is never delivered."""

    drawn = 0

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.drawn += 1
        if self.drawn == 100:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def test_ctrl_c_keeps_the_epochs_that_are_finished(tmp_path: Path) -> None:
    images, labels = torch.randn(64, 1, 8, 8), torch.arange(64) % 10
    data = Data("synthetic", Interrupting(images, labels), TensorImages(images, labels), 10, 1, 8)
    trainer = Trainer(options(tmp_path), data)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert trainer.epoch == 1
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {CHECKPOINT, "log.csv", "best.safetensors"}
    resumed = Trainer(options(tmp_path, resume=tmp_path / CHECKPOINT), data)
    assert len(resumed.run()) == 2


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    images, labels = torch.full((64, 1, 8, 8), math.nan), torch.arange(64) % 10
    data = Data("synthetic", *[TensorImages(images, labels)] * 2, 10, 1, 8)
    with pytest.raises(TrainingError, match="loss: expected a finite number, got nan in epoch 1"):
        Trainer(options(tmp_path), data).run()
    assert not (tmp_path / CHECKPOINT).exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"amp": "fp8"}, "amp: expected one of bf16, fp16 or None, got 'fp8'"),
        ({"seed": -1}, "seed: expected an integer >= 0, got -1"),
        ({"workers": 1.5}, "workers: expected an integer >= 0, got 1.5"),
        ({"device": "gpu"}, "device: expected such as cpu or cuda:0, got 'gpu'"),
        ({"device": "cuda:99"}, "device: expected one of . CUDA devices"),
    ],
)
def test_options_are_checked(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options(tmp_path, **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"epochs": 0}, "epochs: expected a positive integer, got 0"),
        ({"epochs": 2.5}, "epochs: expected a positive integer, got 2.5"),
        ({"batch_size": -4}, "batch_size: expected a positive integer, got -4"),
        ({"learning_rate": math.nan}, "learning_rate: expected a finite number"),
        ({"learning_rate": 0.0}, "learning_rate: expected a number > 0, got 0.0"),
        ({"momentum": 1.0}, "momentum: expected a number in .0, 1., got 1.0"),
        ({"weight_decay": -1e-4}, "weight_decay: expected a finite number >= 0"),
        ({"schedule": "linear"}, "schedule: expected one of"),
        ({"milestones": (0.75, 0.5)}, "milestones: expected rising fractions"),
        ({"warmup_epochs": 300}, "warmup_epochs: expected less than epochs .300., got 300"),
        ({"label_smoothing": 1.0}, "label_smoothing: expected a number in"),
    ],
)
def test_recipes_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**changes)
    with pytest.raises(ValueError, match="data: expected one of digits"):
        recipe_for("mnist")


def rates(recipe: Recipe, steps_per_epoch: int = 10) -> list[float]:
    """The learning rate of every step."""
    optimizer = build_optimizer(torch.nn.Linear(1, 1), recipe)
    schedule = build_schedule(optimizer, recipe, steps_per_epoch)
    found = []
    for _ in range(recipe.epochs * steps_per_epoch):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def test_the_papers_step_schedule() -> None:
    found = rates(recipe_for("cifar10", epochs=300), 2)
    assert [found[i] for i in (0, 299, 300, 449, 450, 599)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    )


def test_cosine_falls_from_the_end_of_the_warm_up() -> None:
    found = rates(Recipe(epochs=10, schedule="cosine", warmup_epochs=2))
    assert all(a < b for a, b in itertools.pairwise(found[:21]))
    assert all(a > b for a, b in itertools.pairwise(found[20:]))
    assert max(found) == found[20] == pytest.approx(0.1) and found[-1] < 1e-4
    assert set(rates(Recipe(epochs=2, schedule="constant"))) == {0.1}


def test_the_optimizer_is_the_papers() -> None:
    group = build_optimizer(torch.nn.Linear(2, 2), recipe_for("cifar10")).param_groups[0]
    assert group["nesterov"] and group["momentum"] == 0.9 and group["weight_decay"] == 1e-4


def test_every_execution_has_the_same_state_dict() -> None:
    shapes = []
    for execution in EXECUTIONS:
        network = NetworkSpec("densenet121", num_classes=3)
        with torch.device("meta"):
            shapes.append({k: v.shape for k, v in network.build(execution).state_dict().items()})
    assert all(other == shapes[0] for other in shapes)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"name": "resnet50"}, "model: expected one of densenet121"),
        ({"depth": 40}, "depth: expected only with model densenet_cifar, got 40"),
        ({"name": "densenet_cifar", "depth": 41}, "depth must be 6"),
        ({"name": "densenet_cifar", "growth_rate": 0}, "growth_rate must be"),
        ({"drop_rate": 1.5}, "drop_rate must be a probability"),
    ],
)
def test_networks_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NetworkSpec(**fields).build("reference")


def test_an_execution_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="execution: expected one of"):
        NETWORK.build("fast")
    with pytest.raises(ValueError, match="execution: expected 'reference'"):
        NETWORK.build("torchvision")
