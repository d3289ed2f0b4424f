"""Valid archives with wrong values in them: a CheckpointError, and nothing has been changed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from densenet_efficient.models.networks import NetworkSpec
from densenet_efficient.train.checkpoint import (
    CheckpointError,
    read_checkpoint,
    restore_checkpoint,
)
from densenet_efficient.train.data import load_data
from densenet_efficient.train.recipes import Recipe, recipe_for
from densenet_efficient.train.trainer import CHECKPOINT, Trainer, TrainingOptions

NETWORK = NetworkSpec("densenet_cifar", depth=7, growth_rate=2, bottleneck=False, num_classes=10)
NETWORK = dataclasses.replace(NETWORK, in_channels=1)
DATA = load_data("digits", image_size=8, limit=64)
WRONG: list[Any] = ["x", None, [None], {"x": 1}, torch.zeros(2, 2), torch.zeros(3, dtype=torch.int)]


def trained(out: Path, recipe: Recipe) -> Trainer:
    trainer = Trainer(
        TrainingOptions(NETWORK, recipe, out, execution="reference", progress=False), DATA
    )
    trainer._finish_epoch(trainer._run_epoch())
    return trainer


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every value of the tree; of long lists the first three and the last."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, (list, tuple)):
        for index in sorted({*range(len(value))[:3], len(value) - 1} - {-1}):
            yield from places(value[index], (*path, index))


def replaced(value: Any, path: tuple[Any, ...], wrong: Any) -> Any:
    """A copy of the tree with another value at the place."""
    if not path:
        return wrong
    if isinstance(value, tuple):
        items = list(value)
        items[path[0]] = replaced(items[path[0]], path[1:], wrong)
        return tuple(items)
    changed = copy.copy(value)
    changed[path[0]] = replaced(value[path[0]], path[1:], wrong)
    return changed


def snapshot(trainer: Trainer) -> list[Any]:
    momentum = trainer.optimizer.state_dict()["state"].values()
    tensors = [
        *trainer.model.state_dict().values(),
        *(entry["momentum_buffer"] for entry in momentum),
        torch.get_rng_state(),
    ]
    return [tensor.clone() for tensor in tensors]


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        recipe_for("digits", epochs=3, batch_size=32),
        recipe_for("cifar10", epochs=3, batch_size=32),
    ],
    ids=["warm-up and cosine", "steps"],
)
def test_every_value_is_checked_before_anything_is_changed(tmp_path: Path, recipe: Recipe) -> None:
    trainer = trained(tmp_path, recipe)
    good = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    before = snapshot(trainer)
    accepted = []
    file = tmp_path / "crafted.pt"
    for path in places(good):
        for wrong in WRONG:
            if len(path) == 1 or path[0] in ("history", "arguments", "description"):
                torch.save(replaced(good, path, wrong), file)
                try:
                    state = read_checkpoint(file)
                except CheckpointError:
                    continue
            else:  # what reading does not look into; the file would be the same
                state = replaced(good, path, wrong)
            try:
                restore_checkpoint(state, **trainer._state(), description=trainer.describe())
            except CheckpointError:
                now = snapshot(trainer)
                assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True)), path
            else:
                accepted.append((path, wrong))
                restore_checkpoint(good, **trainer._state(), description=trainer.describe())
    # Words of the command line, and a parameter without momentum, may be such.
    for path, wrong in accepted:
        momentum = path[0] == "optimizer" and path[-1] == "momentum_buffer" and wrong is None
        unset = _at(good, path) is None and wrong is None
        assert momentum or unset or path[0] == "arguments", (path, wrong)


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


@pytest.mark.parametrize("own", [None, False, True])
@pytest.mark.parametrize("saved", [None, False, True])
def test_whether_steps_are_fused_is_the_runs_own(
    tmp_path: Path, saved: bool | None, own: bool | None
) -> None:
    trainer = trained(tmp_path, recipe_for("digits", epochs=3, batch_size=32))
    state = read_checkpoint(tmp_path / CHECKPOINT)
    state["optimizer"]["param_groups"][0]["fused"] = saved
    trainer.optimizer.param_groups[0]["fused"] = own
    restore_checkpoint(state, **trainer._state(), description=trainer.describe())
    assert trainer.optimizer.param_groups[0]["fused"] is own
    del state["optimizer"]["param_groups"][0]["fused"]
    with pytest.raises(CheckpointError, match="optimizer's entries: expected"):
        restore_checkpoint(state, **trainer._state(), description=trainer.describe())


@pytest.mark.parametrize("generator", ["torch", "python", "numpy"])
def test_states_that_a_generator_refuses(tmp_path: Path, generator: str) -> None:
    trainer = trained(tmp_path, recipe_for("digits", epochs=3, batch_size=32))
    state = read_checkpoint(tmp_path / CHECKPOINT)
    before = snapshot(trainer)
    values = {
        "torch": torch.zeros(7, dtype=torch.uint8),
        "python": (3, (1, 2, 3), None),
        "numpy": ["MT19937", torch.zeros(3, dtype=torch.int64), 0, 0, 0.0],
    }
    state["random"][generator] = values[generator]
    with pytest.raises(CheckpointError, match=f"random generators: {generator}: expected"):
        restore_checkpoint(state, **trainer._state(), description=trainer.describe())
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(trainer), strict=True))
