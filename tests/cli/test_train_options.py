"""Options of train, end to end: what starts from weights, what fits, what is evaluated only."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

from densenet_efficient.cli.main import main
from densenet_efficient.models.networks import NetworkSpec
from densenet_efficient.train.capacity import plan_run
from densenet_efficient.train.checkpoint import read_checkpoint
from densenet_efficient.train.data import load_data
from densenet_efficient.train.recipes import Recipe

SMALL = ["--model", "densenet_cifar", "--depth", "10", "--growth-rate", "4", "--image-size", "8"]
TRAIN = ["train", *SMALL, "--device", "cpu", "--limit", "64"]


def accuracy(text: str) -> str:
    return text.split("held-out accuracy ")[1].split("%")[0]


def test_every_option_of_a_step_and_then_the_weights_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    steps = ["--batch", "16", "--epochs", "2", "--accumulate", "2", "--clip-norm", "1"]
    steps += ["--mixup", "0.2", "--cutmix", "1", "--ema-decay", "0.5", "--label-smoothing", "0.1"]
    assert main([*TRAIN, *steps, "--amp", "bf16", "--deterministic", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    recipe = "label smoothing 0.1, augmentation, MixUp 0.2, CutMix 1, 2 parts a batch, gradients "
    assert recipe + "clipped to 1, averaged by 0.5" in text
    assert not torch.are_deterministic_algorithms_enabled()
    trained = accuracy(text)
    files = sorted(tmp_path.rglob("*"))
    test = ["--amp", "bf16", "--test-only"]
    assert main([*TRAIN, *test, "--weights", str(out / "model.safetensors")]) == 0
    assert accuracy(capsys.readouterr().out) == trained
    assert main(["train", "--test-only", "--resume", str(out / "checkpoint.pt")]) == 0
    assert accuracy(capsys.readouterr().out) == trained  # the averaged weights
    assert sorted(tmp_path.rglob("*")) == files


def test_fine_tuning_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = ["--epochs", "1", "--batch", "32", "--out"]
    assert main([*TRAIN, *first, str(tmp_path / "first")]) == 0
    weights = str(tmp_path / "first" / "best.safetensors")
    second = ["--weights", weights, "--freeze", "features", *first, str(tmp_path / "second")]
    assert main([*TRAIN, *second]) == 0
    assert "frozen: features" in capsys.readouterr().out
    states = [
        read_checkpoint(tmp_path / name / "checkpoint.pt")["model"] for name in ("first", "second")
    ]
    same = {name for name in states[0] if torch.equal(states[0][name], states[1][name])}
    assert same == {name for name in states[0] if not name.startswith("classifier.")}
    assert main(["train", "--resume", "--epochs", "2", "--out", str(tmp_path / "second")]) == 0


def test_the_largest_batch_that_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    auto = ["--batch-size", "auto", "--epochs", "1", "--out"]
    assert main([*TRAIN, *auto, str(tmp_path / "some"), "--budget", "400kB"]) == 0
    recipe = read_checkpoint(tmp_path / "some" / "checkpoint.pt")["description"]["recipe"]
    assert 2 < recipe["batch_size"] < 64
    assert recipe["learning_rate"] == pytest.approx(0.1 * recipe["batch_size"] / 64)
    plan = ["plan", *SMALL, "--batch", "1", "--json", "--include-baseline", "--budget", "400kB"]
    capsys.readouterr()
    assert main(plan) == 0
    # Of an image of three channels instead of one.
    three_channels = json.loads(capsys.readouterr().out)["largest_batch"]
    assert three_channels <= recipe["batch_size"] <= three_channels + 6
    assert main([*TRAIN, *auto, str(tmp_path / "all"), "--lr", "0.05"]) == 0
    recipe = read_checkpoint(tmp_path / "all" / "checkpoint.pt")["description"]["recipe"]
    assert recipe["batch_size"] == 64 and recipe["learning_rate"] == 0.05
    # A run goes on with the batch that was found.
    assert main(["train", "--resume", str(tmp_path / "some" / "checkpoint.pt")]) == 0


def test_a_batch_in_parts_fits_with_the_images_of_all_its_parts(tmp_path: Path) -> None:
    auto = ["--batch-size", "auto", "--accumulate", "8", "--ema-decay", "0.5", "--epochs", "1"]
    budget = ["--budget", "230kB", "--out", str(tmp_path / "run")]
    assert main([*TRAIN, *auto, *budget]) == 0
    description = read_checkpoint(tmp_path / "run" / "checkpoint.pt")["description"]
    recipe = Recipe.from_description(description["recipe"])
    model = NetworkSpec(**description["network"]).build("recompute")
    data = load_data("digits", image_size=8, limit=64)

    def needed(batch_size: int) -> int:
        planned, standing = plan_run(
            model, data, recipe.replaced(batch_size=batch_size), None, torch.device("cpu")
        )
        return (planned or 0) + standing

    assert needed(recipe.batch_size) <= 230e3 < needed(recipe.batch_size + recipe.accumulate)


def test_randaugment_on_images_of_eight_bits(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        images = struct.pack(">iiii", 2051, 40, 28, 28) + bytes(range(250)) * 126
        (folder / f"{part}-images-idx3-ubyte").write_bytes(images[: 16 + 40 * 784])
        labels = struct.pack(">ii", 2049, 40) + bytes(i % 10 for i in range(40))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    data = ["--data", "fashion-mnist", "--data-root", str(tmp_path / "data"), "--epochs", "1"]
    command = [*TRAIN, *data, "--randaugment", "9", "--out", str(tmp_path / "run")]
    assert main(command) == 0


def test_a_classifier_of_another_size_cannot_be_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = NetworkSpec("densenet_cifar", depth=10, growth_rate=4, num_classes=3, in_channels=1)
    torch.save(network.build("reference").state_dict(), tmp_path / "some.pth")
    assert main([*TRAIN, "--test-only", "--weights", str(tmp_path / "some.pth")]) == 2
    message = "weights: expected a classifier of 10 classes, those of digits"
    assert message in capsys.readouterr().err
