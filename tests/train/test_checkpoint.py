"""Checkpoints: atomic, whole or not at all; a resumed run is the uninterrupted one bit by bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from densenet_efficient.models.networks import NetworkSpec
from densenet_efficient.train.checkpoint import (
    CheckpointError,
    read_checkpoint,
)
from densenet_efficient.train.data import load_data
from densenet_efficient.train.recipes import recipe_for
from densenet_efficient.train.rng import random_state, restore_random_state
from densenet_efficient.train.trainer import CHECKPOINT, Trainer, TrainingOptions

# Dropout and augmentation draw random numbers in every step; 97 images leave a batch of one over.
NETWORK = NetworkSpec(
    "densenet_cifar", depth=10, growth_rate=4, drop_rate=0.2, num_classes=10, in_channels=1
)
DATA = load_data("digits", image_size=8, limit=97)


def options(out: Path, epochs: int = 3, **changes: Any) -> TrainingOptions:
    recipe = recipe_for("digits", epochs=epochs, batch_size=32)
    base = TrainingOptions(NETWORK, recipe, out, execution="reference", progress=False)
    return dataclasses.replace(base, **changes)


def run_epochs(trainer: Trainer, count: int) -> None:
    """The first epochs of a run, as if it had been killed after them."""
    for _ in range(count):
        trainer.history.append(trainer._run_epoch())
        trainer.epoch += 1
        trainer._save()


def snapshot(trainer: Trainer) -> dict[str, torch.Tensor]:
    state = {f"model.{k}": v.clone() for k, v in trainer.model.state_dict().items()}
    for index, entry in trainer.optimizer.state_dict()["state"].items():
        state[f"momentum.{index}"] = entry["momentum_buffer"].clone()
    if trainer.average is not None:
        state |= {f"average.{k}": v.clone() for k, v in trainer.average.state_dict().items()}
    if trainer.scaler.is_enabled():
        state["scale"] = torch.tensor(trainer.scaler.get_scale())
    return state


# Whatever has a state: an average, a loss scale, what a clipped or mixed step draws and gives.
STATES = {"ema_decay": 0.8, "mixup": 0.5, "cutmix": 1.0, "accumulate": 3, "clip_norm": 0.5}


@pytest.mark.parametrize(
    "execution, recipe, changes",
    [
        ("reference", {}, {}),
        ("recompute", {}, {}),
        ("recompute", STATES, {"amp": "fp16"}),
        ("store", {"ema_decay": 0.5}, {"freeze": ("features.conv0", "features.denseblock1")}),
        ("reference", {"clip_norm": 1.0}, {"amp": "bf16", "deterministic": True}),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, execution: str, recipe: dict[str, Any], changes: dict[str, Any]
) -> None:
    chosen = recipe_for("digits", epochs=3, batch_size=32, **recipe)
    changes = {**changes, "execution": execution, "recipe": chosen}
    whole = Trainer(options(tmp_path / "whole", **changes), DATA)
    history = whole.run()
    first = Trainer(options(tmp_path / "parts", **changes), DATA)
    run_epochs(first, 1)
    torch.rand(7)  # whatever happens between the two
    resume = tmp_path / "parts" / CHECKPOINT
    second = Trainer(options(tmp_path / "parts", resume=resume, **changes), DATA)
    assert second.epoch == 1
    resumed = second.run()
    expected, got = snapshot(whole), snapshot(second)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    for name in ("train_loss", "test_loss", "learning_rate"):
        assert [row[name] for row in resumed] == [row[name] for row in history]
    assert len((tmp_path / "parts" / "log.csv").read_text().splitlines()) == 1 + 3


def test_the_memory_mode_may_change_between_runs(tmp_path: Path) -> None:
    run_epochs(Trainer(options(tmp_path, execution="recompute"), DATA), 1)
    changed = options(tmp_path, execution="store", resume=tmp_path / CHECKPOINT)
    assert Trainer(changed, DATA).epoch == 1


def test_random_state_covers_all_generators() -> None:
    import random

    import numpy

    state = random_state()
    drawn = [torch.rand(3).tolist(), random.random(), numpy.random.rand(3).tolist()]
    restore_random_state(state)
    assert drawn == [torch.rand(3).tolist(), random.random(), numpy.random.rand(3).tolist()]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_epochs(Trainer(options(folder), DATA), 1)
    return folder / CHECKPOINT


def damaged(good: Path, path: Path, how: str) -> None:
    whole = good.read_bytes()
    if how == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "a byte is wrong":  # in the middle of a tensor: the archive's checksum tells
        middle = len(whole) // 3
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("epoch,loss\n1,2.3\n")
    elif how == "code":  # never executed
        torch.save({"format": Path}, path)
    elif how == "bare weights":
        torch.save(torch.load(good)["model"], path)
    elif how == "other version":
        torch.save({**torch.load(good), "version": 99}, path)
    elif how == "entry gone":
        torch.save({k: v for k, v in torch.load(good).items() if k != "random"}, path)


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "a byte is wrong",
        "empty",
        "text",
        "code",
        "bare weights",
        "other version",
        "entry gone",
    ],
)
def test_unreadable_checkpoints_are_refused_by_name(good: Path, tmp_path: Path, how: str) -> None:
    path = tmp_path / "bad.pt"
    damaged(good, path, how)
    with pytest.raises(CheckpointError, match=r"bad\.pt"):
        read_checkpoint(path)
    with pytest.raises(CheckpointError, match="nowhere"):
        read_checkpoint(tmp_path / "nowhere")


def foreign(state: dict[str, Any], how: str) -> None:
    if how == "network":
        state["description"]["network"]["depth"] = 16
    elif how == "recipe":
        state["description"]["recipe"]["learning_rate"] = 0.2
    elif how == "a tensor's shape":
        state["model"]["features.conv0.weight"] = torch.zeros(3, 3)
    elif how == "a tensor is missing":
        del state["model"]["classifier.bias"]
    elif how == "momentum's shape":
        state["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(5)
    elif how == "optimiser of another network":
        state["optimizer"]["param_groups"][0]["params"].pop()
    elif how == "schedule":
        state["schedule"] = {}


@pytest.mark.parametrize(
    "how, message",
    [
        ("network", "depth: expected 10, got 16"),
        ("recipe", "learning_rate: expected 0.1, got 0.2"),
        ("a tensor's shape", r"conv0.weight: expected \(8, 1, 3, 3\), got \(3, 3\)"),
        ("a tensor is missing", "classifier.bias"),
        ("momentum's shape", "momentum_buffer of parameter 0"),
        ("optimiser of another network", "parameters in each group"),
        ("schedule", "schedule's entries"),
    ],
)
def test_foreign_checkpoints_change_nothing(
    good: Path, tmp_path: Path, how: str, message: str
) -> None:
    from densenet_efficient.train.checkpoint import restore_checkpoint

    trainer = Trainer(options(tmp_path), DATA)
    run_epochs(trainer, 1)  # so that there is momentum
    before, generators = snapshot(trainer), torch.get_rng_state()
    rate = trainer.schedule.get_last_lr()
    state = read_checkpoint(good)
    foreign(state, how)
    with pytest.raises(CheckpointError, match=message):
        restore_checkpoint(state, **trainer._state(), description=trainer.describe())
    after = snapshot(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(generators, torch.get_rng_state())
    assert rate == trainer.schedule.get_last_lr()


def test_weights_are_exported_for_every_execution(tmp_path: Path) -> None:
    trainer = Trainer(options(tmp_path, epochs=3, execution="recompute"), DATA)
    trainer.run()
    weights = load_file(tmp_path / "model.safetensors")
    plain = NETWORK.build("reference")
    plain.load_state_dict(weights)
    images = DATA.test[0][0].unsqueeze(0)
    trainer.model.eval(), plain.eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(images), trainer.model(images), rtol=1e-4, atol=1e-5)
