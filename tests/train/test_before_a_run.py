"""What is refused before anything is trained, and what a run keeps."""

from __future__ import annotations

import json
import math
import os
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from densenet_efficient.memory.planner import plan
from densenet_efficient.models.networks import NetworkSpec
from densenet_efficient.train import outputs
from densenet_efficient.train.capacity import image_bytes, largest_batch, plan_run
from densenet_efficient.train.data import load_data
from densenet_efficient.train.recipes import Recipe, build_optimizer, build_schedule, recipe_for
from densenet_efficient.train.trainer import Trainer, TrainingError, TrainingOptions

NETWORK = NetworkSpec("densenet_cifar", depth=10, growth_rate=4, num_classes=10, in_channels=1)
DATA = load_data("digits", image_size=8, limit=64)


def options(out: Path, **changes: Any) -> TrainingOptions:
    recipe = recipe_for("digits", epochs=2, batch_size=32)
    values: dict[str, Any] = {"execution": "reference", "progress": False, **changes}
    return TrainingOptions(NETWORK, recipe, out, **values)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"out: expected a folder that can be written, got .*/run"):
        Trainer(options(tmp_path / "file" / "run"), DATA)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(total=10, used=10, free=0)
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"out: expected .* MB of free space for a checkpoint"):
        Trainer(options(tmp_path), DATA)


def test_a_disk_that_fills_up_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(options(tmp_path), DATA)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("densenet_efficient.train.trainer.write_weights", full)
    with pytest.raises(TrainingError, match=r"\Aout: could not write into [^\n]*No space left.*\Z"):
        trainer.run()


@pytest.mark.parametrize("package", ["safetensors", "tqdm"])
def test_missing_packages_are_named_with_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"training needs {package}: pip install 'densenet-efficient\[train\]'"
    with pytest.raises(ImportError, match=message):
        Trainer(options(tmp_path), DATA)
    assert not list(tmp_path.iterdir())


def test_one_of_several_processes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"WORLD_SIZE: .* got 4 that have not joined"):
        Trainer(options(tmp_path), DATA)


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    left = tmp_path / f".checkpoint.pt.{2**22 + 1}.0123abcd"
    left.touch()
    Trainer(options(tmp_path), DATA)
    assert not left.exists()


def test_weights_carry_what_they_are_of(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        history = Trainer(options(tmp_path), DATA).run()
    finally:
        os.umask(before)
    best = max(row["test_accuracy"] for row in history)
    for name, accuracy in (("best", best), ("model", history[-1]["test_accuracy"])):
        path = tmp_path / f"{name}.safetensors"
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        assert float(metadata["test_accuracy"]) == accuracy
        assert json.loads(metadata["classes"]) == list("0123456789")
        assert NetworkSpec(**json.loads(metadata["network"])) == NETWORK
        assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("parts", [1, 200])
def test_the_largest_batch_leaves_room_for_the_images_of_every_part(parts: int) -> None:
    model, image, size = NETWORK.build("recompute"), (1, 8, 8), 2e6

    def needed(batch: int) -> int:
        peak = plan(model, (batch, *image), torch.float32).peak_bytes
        return peak + parts * batch * image_bytes(1, 8)

    largest = largest_batch(model, image, torch.float32, size, parts=parts)
    assert largest > 1 and needed(largest) <= size < needed(largest + 1)


def test_the_plan_of_a_run_is_of_the_parts_that_a_step_takes() -> None:
    """Four images in four parts are computed as two and two."""
    model, cpu = NETWORK.build("recompute"), torch.device("cpu")
    four, _ = plan_run(model, DATA, Recipe(batch_size=4, accumulate=4), None, cpu)
    two, _ = plan_run(model, DATA, Recipe(batch_size=2), None, cpu)
    assert four == two


@pytest.mark.parametrize(
    "recipe, steps",
    [
        (recipe_for("digits", epochs=5, warmup_epochs=2), 22),
        (recipe_for("cifar10", epochs=20), 50),
        (recipe_for("cifar10", epochs=10, warmup_epochs=6), 7),
        (recipe_for("imagefolder", epochs=9), 13),
        (Recipe(epochs=3, schedule="constant", warmup_epochs=1), 5),
    ],
)
def test_the_schedules_are_their_formulas(recipe: Recipe, steps: int) -> None:
    """PyTorch's schedulers multiply from step to step: equal to rounding, not to the last bit."""

    def factor(step: int) -> float:
        epoch = step / steps
        if epoch < recipe.warmup_epochs:
            return (step + 1) / (recipe.warmup_epochs * steps + 1)
        if recipe.schedule == "step":
            return 0.1 ** sum(epoch >= milestone * recipe.epochs for milestone in recipe.milestones)
        if recipe.schedule == "cosine":
            share = (epoch - recipe.warmup_epochs) / (recipe.epochs - recipe.warmup_epochs)
            return 0.5 * (1 + math.cos(math.pi * share))
        return 1.0

    optimizer = build_optimizer(torch.nn.Linear(1, 1), recipe)
    schedule = build_schedule(optimizer, recipe, steps)
    for step in range(recipe.epochs * steps):
        expected = recipe.learning_rate * factor(step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-11)
        optimizer.step()
        schedule.step()
