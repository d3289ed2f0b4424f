"""Training that starts from weights, and parts that keep theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from densenet_efficient.models.networks import NetworkSpec
from densenet_efficient.train.data import load_data
from densenet_efficient.train.recipes import recipe_for
from densenet_efficient.train.trainer import Trainer, TrainingOptions

NETWORK = NetworkSpec("densenet_cifar", depth=10, growth_rate=4, num_classes=10, in_channels=1)
DATA = load_data("digits", image_size=8, limit=64)


def options(out: Path, **changes: Any) -> TrainingOptions:
    recipe = recipe_for("digits", epochs=1, batch_size=32)
    values: dict[str, Any] = {"progress": False, **changes}
    return TrainingOptions(NETWORK, recipe, out, **values)


def saved_weights(path: Path, classes: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    network = NetworkSpec(
        "densenet_cifar", depth=10, growth_rate=4, num_classes=classes, in_channels=1
    )
    state = network.build("reference").state_dict()
    save_file(state, path)
    return state


@pytest.mark.parametrize("classes", [10, 3])
def test_a_run_starts_from_weights(
    tmp_path: Path, classes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "some.safetensors"
    state = saved_weights(file, classes)
    trainer = Trainer(options(tmp_path / "run", weights=str(file), progress=True), DATA)
    fresh = Trainer(options(tmp_path / "fresh"), DATA).model.state_dict()
    for name, tensor in trainer.model.state_dict().items():
        new = name.startswith("classifier.") and classes != 10
        assert torch.equal(tensor, fresh[name] if new else state[name])
    trainer.run()
    header = capsys.readouterr().out.splitlines()[4]
    assert header.startswith(f"start   weights of {file}")
    assert ("the classifier is new" in header) == (classes != 10)


@pytest.mark.parametrize("execution", ["recompute", "store", "reference"])
def test_what_is_frozen_stays(tmp_path: Path, execution: str) -> None:
    frozen = ("features.conv0", "features.denseblock1", "features.transition1")
    trainer = Trainer(options(tmp_path, freeze=frozen, execution=execution), DATA)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.run()
    after = trainer.model.state_dict()
    stays = {name for name in before if name.startswith(frozen)}
    assert len(stays) > 15
    assert all(torch.equal(before[name], after[name]) for name in stays)
    trained = [name for name in before if name not in stays]
    assert all(not torch.equal(before[name], after[name]) for name in trained)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"freeze": ("features.denseblock9",)}, "freeze: expected names of modules such as feat"),
        ({"freeze": ("",)}, r"freeze: expected names of modules such as features, .* got ''"),
        ({"freeze": ("features", "classifier")}, "freeze: expected a part that is left to train"),
        ({"weights": "nowhere.safetensors"}, "weights: expected a file, got none at nowhere"),
        ({"weights": "IMAGENET1K_V1"}, "weights: torchvision has none for densenet_cifar"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(options(tmp_path / "run", **changes), DATA)
    assert not list(tmp_path.iterdir())


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    other = NetworkSpec("densenet_cifar", depth=16, growth_rate=4, num_classes=3, in_channels=1)
    save_file(other.build("reference").state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors does not fit DenseNet: .*denselayer2"):
        Trainer(options(tmp_path / "run", weights=str(tmp_path / "other.safetensors")), DATA)
    assert not (tmp_path / "run").exists()
