"""The published networks and recipes by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from densenet_efficient.cli.main import main
from densenet_efficient.models.catalogue import CATALOGUE, build
from densenet_efficient.train.recipes import PUBLISHED, Recipe, schedule_text

STEPS = ["--depth", "10", "--growth-rate", "4", "--image-size", "8", "--limit", "8", "--batch", "4"]


@pytest.mark.parametrize("name", CATALOGUE)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        model = build(name)
    assert sum(p.numel() for p in model.parameters()) == CATALOGUE[name].parameters


def test_wide_networks_have_the_published_size() -> None:
    """Published to one decimal."""
    sizes = {36: 1.5, 48: 2.7, 60: 4.3}
    for k, millions in sizes.items():
        assert round(CATALOGUE[f"wide_densenet_bc_40_{k}"].parameters / 1e6, 1) == millions


def test_fc_densenets_have_the_published_size() -> None:
    """Published to one decimal, and counted with the norms' running statistics: the paper's 3.5 and
    9.4 millions; for the smallest it says 1.5, and its own code builds 1.4."""
    sizes = {"fc_densenet56": 1.4, "fc_densenet67": 3.5, "fc_densenet103": 9.4}
    for name, millions in sizes.items():
        with torch.device("meta"):
            model = build(name)
        statistics = sum(buffer.numel() for buffer in model.buffers() if buffer.dim())
        assert round((CATALOGUE[name].parameters + statistics) / 1e6, 1) == millions


def test_fc_densenets_are_networks_of_every_command_that_looks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = ["--model", "fc_densenet103"]
    assert main(["summary", *name, "--image-size", "64"]) == 0
    text = capsys.readouterr().out
    assert "fc_densenet103: 9,322,091 parameters, depth 103" in text
    rows = {line.split()[0]: line for line in text.splitlines() if line.split()}
    assert "upsampling" in rows["up5"] and "80" in rows["up5"] and "64 x 64" in rows["up5"]
    assert "256" in rows["denseblock11"] and "convolution" in rows["classifier"]
    assert main(["plan", *name, "--image-size", "64", "--batch", "2", "--budget", "1GB"]) == 0
    assert "predicted peak" in capsys.readouterr().out
    assert main(["explain", "--model", "fc_densenet56", "--image-size", "32"]) == 0
    assert "denseblock11" in capsys.readouterr().out
    assert main(["train", *name, "--data", "synthetic"]) == 2
    assert "invalid choice" in capsys.readouterr().err
    assert main(["plan", *name, "--drop-everywhere"]) == 2
    assert "drop_everywhere: expected only with a classifier" in capsys.readouterr().err


def test_options_replace_published_ones_and_unknown_names_are_refused() -> None:
    model = build("densenet_bc_100_12", num_classes=100, in_channels=1)
    assert model.classifier.out_features == 100
    with pytest.raises(ValueError, match="name: expected one of densenet121, "):
        build("densenet_bc_100_13")


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_recipe_runs_its_first_steps_and_prints_its_schedule(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["train", "--model", "densenet_cifar", *STEPS, "--data", "synthetic", "--recipe", name]
    assert main([*run, "--epochs", "1", "--device", "cpu", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    recipe = PUBLISHED[name].recipe.replaced(epochs=1, batch_size=4)
    assert f"schedule ({schedule_text(recipe)})" in text


def test_schedules_in_words() -> None:
    assert schedule_text(Recipe()) == "0.1 to epoch 150, 0.01 to 225, 0.001 to 300"
    cosine = Recipe(epochs=10, schedule="cosine", warmup_epochs=2)
    assert schedule_text(cosine) == "rising for 2 epochs, 0.1 to 0 at epoch 10, as a cosine"


def test_list_shows_networks_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    assert "wide_densenet_bc_40_48" in text and "3.99" in text and "0.01 to 225" in text
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["networks"]["densenet_bc_190_40"]["errors"] == {"C10+": 3.46, "C100+": 17.18}
    assert found["recipes"]["cifar"]["drop_rate"] == 0.2


def test_a_published_name_is_a_model_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", "--model", "wide_densenet_bc_40_36"]) == 0
    assert "1,542,682 parameters, depth 40" in capsys.readouterr().out
    assert main(["summary", "--model", "densenet_40_12", "--depth", "40"]) == 2
    assert "depth: expected only with model densenet_cifar" in capsys.readouterr().err
