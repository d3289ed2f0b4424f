"""Several processes: they share a batch, train the same network, and one of them writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from densenet_efficient.cli.main import main
from densenet_efficient.models.networks import NetworkSpec
from densenet_efficient.train import distributed
from densenet_efficient.train.batches import held_out_batches, training_batches
from densenet_efficient.train.data import TensorImages, load_data
from densenet_efficient.train.recipes import recipe_for
from densenet_efficient.train.trainer import CHECKPOINT, Trainer, TrainingOptions
from tests.support.processes import results_of

ROOT = Path(__file__).resolve().parents[2]
NETWORK = NetworkSpec("densenet_cifar", depth=10, growth_rate=4, num_classes=10, in_channels=1)
SMALL = ["--model", "densenet_cifar", "--depth", "10", "--growth-rate", "4", "--image-size", "8"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(folder: str, **changes: Any) -> dict[str, Any]:
    """A run's figures and the state of its network, in this process."""
    torch.set_num_threads(1)
    values: dict[str, Any] = {"epochs": 2, "batch_size": 32, "augment": False, "momentum": 0.5}
    values |= changes.pop("recipe", {})
    recipe = recipe_for("digits", **values)
    options = TrainingOptions(NETWORK, recipe, Path(folder), progress=False, **changes)
    trainer = Trainer(options, load_data("digits", image_size=8, limit=128, augment=False))
    history = trainer.run()
    figures = [[row[name] for name in FIGURES] for row in history]
    return {"figures": figures, "state": trainer.evaluated.state_dict()}


FIGURES = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")


def shared_run(rank: int, folder: str, changes: dict[str, Any]) -> dict[str, Any]:
    found = run(f"{folder}/{rank}", **changes)
    return {**found, "files": sorted(path.name for path in Path(folder, str(rank)).glob("*"))}


CHANGES = {"recipe": {"accumulate": 1, "clip_norm": 1.0, "ema_decay": 0.5}}


def everything(rank: int, folder: str) -> dict[str, Any]:
    """What each test looks at, in processes that start once."""
    folders = {name: str(Path(folder, name)) for name in ("shared", "resumed", "refused")}
    for path in folders.values():
        os.makedirs(path, exist_ok=True)
    return {
        "shared": shared_run(rank, folders["shared"], {**CHANGES, "sync_batch_norm": True}),
        "resumed": resumed_run(rank, folders["resumed"]),
        "drawn": drawn(rank),
        "refused": refusals(rank, folders["refused"]),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def both(folder: Path) -> list[dict[str, Any]]:
    return results_of(everything, 2, str(folder))


@pytest.mark.slow
def test_two_processes_with_shared_statistics_train_as_one(
    tmp_path: Path, both: list[dict[str, Any]]
) -> None:
    """The same batches, so the same steps but for rounding, which 8 steps do not amplify."""
    alone = run(str(tmp_path), **CHANGES)
    first, second = (found["shared"] for found in both)
    assert first["files"] == ["best.safetensors", CHECKPOINT, "log.csv", "model.safetensors"]
    assert not second["files"]
    for found in (first, second):
        torch.testing.assert_close(found["figures"], alone["figures"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["state"], alone["state"], rtol=1e-3, atol=1e-4)
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, second["state"][name]), name


def resumed_run(rank: int, folder: str) -> dict[str, Any]:
    """Dropout and augmentation draw in every process; two epochs, and one and another."""
    network = NetworkSpec(**{**NETWORK.describe(), "drop_rate": 0.3})
    recipe = recipe_for("digits", epochs=2, batch_size=16, accumulate=2)
    data = load_data("digits", image_size=8, limit=40)
    states = {}
    for name, resume in (("whole", None), ("parts", None), ("parts", CHECKPOINT)):
        out = Path(folder, name)
        options = TrainingOptions(
            network, recipe, out, progress=False, resume=None if resume is None else out / resume
        )
        trainer = Trainer(options, data)
        if name == "parts" and resume is None:
            trainer._finish_epoch(trainer._run_epoch())
            torch.rand(5)
        else:
            trainer.run()
            states[name] = {k: v.clone() for k, v in trainer.model.state_dict().items()}
        torch.distributed.barrier()
    return states


@pytest.mark.slow
def test_a_resumed_run_of_two_processes_is_the_uninterrupted_one(
    both: list[dict[str, Any]],
) -> None:
    for found in both:
        whole, parts = found["resumed"]["whole"], found["resumed"]["parts"]
        assert all(torch.equal(whole[name], parts[name]) for name in whole)


def drawn(rank: int) -> tuple[list[float], list[float]]:
    data = TensorImages(torch.arange(11.0).view(11, 1, 1, 1), torch.zeros(11))
    train = training_batches(data, 4, seed=0, epoch=0, workers=0, pin=False)
    test = held_out_batches(data, 4, workers=0, pin=False)
    one, other = ([float(x) for images, _ in batches for x in images] for batches in (train, test))
    return one, other


@pytest.mark.slow
def test_processes_share_the_images(both: list[dict[str, Any]]) -> None:
    (train, test), (other_train, other_test) = (found["drawn"] for found in both)
    assert len(train) == len(other_train) == 6  # twelve, of which one came twice
    assert sorted({*train, *other_train}) == list(range(11))
    assert sorted([*test, *other_test]) == list(range(11))  # each of them once


def refusals(rank: int, folder: str) -> list[str]:
    found = []
    for changes in (
        {"recipe": {"batch_size": 33}},
        {"sync_batch_norm": True, "execution": "reference"},
    ):
        try:
            run(folder + "/run", **changes)
        except ValueError as error:
            found.append(str(error))
    Path(folder, "file").touch()
    try:  # what only the first process tries
        run(folder + "/file")
    except ValueError as error:
        found.append(str(error))
    return found


@pytest.mark.slow
def test_what_cannot_be_shared_is_refused_in_every_process(
    folder: Path, both: list[dict[str, Any]]
) -> None:
    first, second = (found["refused"] for found in both)
    assert first == second
    assert first[0].startswith("batch_size: expected a multiple of the 2 processes")
    assert first[1].startswith("sync_batch_norm: expected our operators or a GPU, got the refer")
    assert first[2].startswith("out: expected a folder that can be written")
    assert [path.name for path in (folder / "refused").iterdir()] == ["file"]


def test_one_process_shares_no_statistics(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sync_batch_norm: expected several processes"):
        run(str(tmp_path / "run"), sync_batch_norm=True)
    assert not list(tmp_path.iterdir())


def test_a_device_with_a_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ValueError, match="device: expected cuda without a number under torchrun"),
        distributed.joined("cuda:1"),
    ):
        pass
    monkeypatch.delenv("WORLD_SIZE")
    with distributed.joined("cuda:1") as device:
        assert device == "cuda:1"


@pytest.mark.slow
def test_torchrun_trains_once_into_one_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line under torchrun: two processes, then the checkpoint in one."""
    out = ["--out", str(tmp_path / "run"), "--device", "cpu"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = ["-m", "densenet_efficient", "train", *SMALL, "--limit", "64", "--batch", "32"]
    done = subprocess.run(
        [*TORCHRUN, *command, *out, "--epochs", "1", "--tensorboard"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch   1  loss") == 1 and done.stdout.count("held-out accuracy") == 1
    assert "in each of 2 processes" in done.stdout
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    state = torch.load(tmp_path / "run" / CHECKPOINT)
    assert state["description"]["recipe"]["batch_size"] == 32
    assert main(["train", *out, "--resume", "--epochs", "2"]) == 0  # in one process
    assert "epoch   2  loss" in capsys.readouterr().out
