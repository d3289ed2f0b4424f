"""What a run writes about its own steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from densenet_efficient.models.networks import NetworkSpec
from densenet_efficient.train.data import load_data
from densenet_efficient.train.recipes import recipe_for
from densenet_efficient.train.trainer import Trainer, TrainingOptions

NETWORK = NetworkSpec("densenet_cifar", depth=7, growth_rate=2, bottleneck=False, num_classes=10)
DATA = load_data("synthetic", image_size=8, limit=24)


def options(out: Path, batch_size: int = 4, **changes: Any) -> TrainingOptions:
    recipe = recipe_for("synthetic", epochs=2, batch_size=batch_size)
    return TrainingOptions(NETWORK, recipe, out, progress=False, **changes)


def test_a_trace_of_three_steps(tmp_path: Path) -> None:
    Trainer(options(tmp_path, profile=True), DATA).run()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert sum(name.startswith("Optimizer.step") for name in names) == 3
    assert "[memory]" in names and any("densenet_efficient" in name for name in names)
    assert "Self CPU" in (tmp_path / "profile.txt").read_text()


@pytest.mark.parametrize(
    "batch_size, changes, message",
    [
        (8, {"profile": True}, "profile: expected at least 5 steps an epoch, got 3"),
        (4, {"memory_snapshot": True}, "memory_snapshot: expected a CUDA device, .* got cpu"),
    ],
)
def test_what_cannot_be_recorded(
    tmp_path: Path, batch_size: int, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(options(tmp_path / "run", batch_size, **changes), DATA)
    assert not list(tmp_path.iterdir())
