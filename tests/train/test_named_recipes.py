"""Every named recipe: its first steps, at its own batch size, and its schedule in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from densenet_efficient.cli.main import main
from densenet_efficient.models.networks import NetworkSpec
from densenet_efficient.train.data import load_data
from densenet_efficient.train.header import describe_run
from densenet_efficient.train.recipes import PUBLISHED, RECIPES, recipe_for, schedule_text
from densenet_efficient.train.trainer import Trainer, TrainingOptions

NETWORK = NetworkSpec("densenet_cifar", depth=7, growth_rate=2, bottleneck=False, num_classes=10)
SCHEDULES = {
    "digits": "rising for 2 epochs, 0.1 to 0 at epoch 25, as a cosine",
    "cifar10": "0.1 to epoch 150, 0.01 to 225, 0.001 to 300",
    "cifar100": "0.1 to epoch 150, 0.01 to 225, 0.001 to 300",
    "fashion-mnist": "rising for 1 epochs, 0.1 to 0 at epoch 30, as a cosine",
    "imagefolder": "0.0125 to epoch 30, 0.00125 to 60, 0.000125 to 90",
    "synthetic": "0.1 to epoch 1",
    "cifar+": "0.1 to epoch 150, 0.01 to 225, 0.001 to 300",
    "cifar": "0.1 to epoch 150, 0.01 to 225, 0.001 to 300",
    "imagenet": "0.1 to epoch 30, 0.01 to 60, 0.001 to 90",
    "imagenet-cosine": "0.1 to 0 at epoch 90, as a cosine",
    "pleiss": "0.1 to epoch 150, 0.01 to 225, 0.001 to 300",
    "d2l": "0.1 to epoch 10",
}


@pytest.mark.parametrize("name", [*RECIPES, *PUBLISHED])
def test_a_recipe_runs_its_first_steps_and_prints_its_schedule(tmp_path: Path, name: str) -> None:
    recipe = recipe_for(name)
    data = load_data("synthetic", image_size=8, limit=2 * recipe.batch_size)
    options = TrainingOptions(NETWORK, recipe, tmp_path, execution="reference", progress=False)
    trainer = Trainer(options, data)
    trainer._finish_epoch(trainer._run_epoch())
    assert trainer.steps_per_epoch == 2 and trainer.history[0]["train_loss"] < 4
    assert schedule_text(recipe) == SCHEDULES[name]
    assert f"schedule ({SCHEDULES[name]})" in describe_run(options, data, trainer.model, None, 0)


def test_list_prints_every_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    assert all(schedule in text for schedule in SCHEDULES.values())
    assert set(SCHEDULES) == {*RECIPES, *PUBLISHED}
