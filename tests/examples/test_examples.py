"""The programs of examples/, with tiny settings."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import densenet_efficient
from tests.support.peer import torchvision

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY = ["--images", "12", "--image-size", "32", "--batch-size", "4"]


def example(name: str) -> dict[str, Any]:
    """What a program defines."""
    return runpy.run_path(str(EXAMPLES / name))


def test_the_loop_trains_and_saves_what_torchvision_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    example("plain_loop.py")["main"]([*TINY, "--epochs", "2"])
    text = capsys.readouterr().out
    assert "planned peak of a step" in text and "epoch 2: loss" in text and "nan" not in text
    plain = torchvision.models.densenet121(num_classes=10)
    plain.load_state_dict(torch.load("densenet121.pth"))


def test_the_loop_reads_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    for name in ("train/cat", "train/dog", "val/cat", "val/dog"):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for number in range(2):
            colour = (200 * (folder.name == "cat"), 60 * number, 0)
            Image.new("RGB", (40, 40), colour).save(folder / f"{number}.png")
    accuracy = example("plain_loop.py")["main"]([str(tmp_path / "images"), *TINY, "--epochs", "1"])
    assert accuracy in (0.0, 0.25, 0.5, 0.75, 1.0)


@pytest.mark.slow
def test_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning", reason="lightning is missing", exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    options = [*TINY, "--epochs", "2", "--accumulate", "2"]
    trainer = example("lightning_training.py")["main"](options)
    assert trainer.global_step == 2 and "accuracy" in trainer.callback_metrics
    network = trainer.lightning_module.network
    found = densenet_efficient.explain(network, torch.randn(1, 3, 32, 32))
    assert found.kinds == {"kernels"}
    (file,) = tmp_path.rglob("*.ckpt")
    state = torch.load(file, weights_only=True)["state_dict"]
    plain = torchvision.models.densenet121(num_classes=10)
    plain.load_state_dict({name.removeprefix("network."): t for name, t in state.items()})


def test_segmentation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "fc_densenet56", "--steps", "2", "--batch", "2", "--size", "33"]
    options += ["--held-out", "3"]
    assert example("segmentation.py")["main"]([*options, "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "a step of 2 images of 33 px needs" in text and "of 3 new images right" in text
    found = json.loads((tmp_path / "segmentation.json").read_text())
    assert 0 <= found["accuracy"] <= 1 and len(found["losses"]) == 2
    assert set(found["overlap"]) == {"ground", "circle", "square", "triangle"}
    assert (tmp_path / "segmentation.png").read_bytes().startswith(b"\x89PNG")


def test_shapes_are_what_their_labels_say() -> None:
    """Every image has its own shapes, the same for the same seed, of one colour but for light and
    noise."""
    draw = example("segmentation.py")["draw_shapes"]
    images, labels = draw(6, 40, torch.Generator().manual_seed(1))
    again, _ = draw(6, 40, torch.Generator().manual_seed(1))
    assert torch.equal(images, again) and not torch.equal(images[0], images[1])
    assert images.shape == (6, 3, 40, 40) and set(labels.unique().tolist()) == {0, 1, 2, 3}
    assert 0.05 < (labels > 0).float().mean() < 0.6
    brightness = images.mean(1)
    assert brightness[labels > 0].mean() > brightness[labels == 0].mean() + 0.5
