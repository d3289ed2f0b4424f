"""`train --cuda-graph` with a stand-in for the capture: what it refuses, and that a run with
accumulation, clipping, an average, mixed images and a schedule is the one without, also resumed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from densenet_efficient.core import capture
from densenet_efficient.models.networks import NetworkSpec
from densenet_efficient.nn.graphed_step import GraphedStep
from densenet_efficient.train import distributed, options, steps
from densenet_efficient.train.averaging import MovingAverage
from densenet_efficient.train.data import load_data
from densenet_efficient.train.recipes import build_optimizer, build_schedule, recipe_for
from densenet_efficient.train.steps import Steps
from densenet_efficient.train.trainer import Trainer, TrainingOptions
from tests.support.graph_stand_in import stand_in
from tests.support.pretended_device import DEVICE, no_host, pretend

NETWORK = NetworkSpec("densenet_cifar", depth=10, growth_rate=4, num_classes=10, in_channels=1)
DATA = load_data("digits", image_size=8, limit=60)
CHANGES = {"accumulate": 2, "clip_norm": 0.5, "ema_decay": 0.9, "mixup": 0.3, "schedule": "cosine"}


def chosen(out: Path, epochs: int = 3, **values: Any) -> TrainingOptions:
    recipe = recipe_for("digits", epochs=epochs, batch_size=16, **CHANGES)
    return TrainingOptions(NETWORK, recipe, out, progress=False, **values)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes trainers whose steps are captured, or with `eager` never are."""
    begin = stand_in(monkeypatch)

    def trainer(out: Path, eager: bool = False, **values: Any) -> Trainer:
        wanted = chosen(out, **values)
        object.__setattr__(wanted, "cuda_graph", True)  # which is refused without a GPU
        warm_up = 10**6 if eager else 2
        monkeypatch.setattr(steps, "GraphedStep", functools.partial(GraphedStep, warm_up=warm_up))
        made = Trainer(wanted, DATA)
        assert isinstance(made.steps.run, GraphedStep)
        begin(made.steps.run)
        return made

    yield trainer


def test_a_run_is_the_eager_one(graphs: Any, tmp_path: Path) -> None:
    """Five steps of sixteen images and one of twelve in every epoch."""
    found = []
    for eager in (True, False):
        trainer = graphs(tmp_path / str(eager), eager=eager)
        history = trainer.run()
        assert trainer.average is not None
        losses = [(row["train_loss"], row["test_loss"], row["learning_rate"]) for row in history]
        found.append((losses, trainer.model.state_dict(), trainer.average.state_dict()))
        run = trainer.steps.run
        assert (run.difference is None) == eager
    assert found[0][0] == found[1][0]
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_resumed_run_is_the_uninterrupted_one(graphs: Any, tmp_path: Path) -> None:
    whole = graphs(tmp_path / "whole", epochs=2)
    whole.run()
    trainer = graphs(tmp_path / "parts", epochs=2)
    trainer._finish_epoch(trainer._run_epoch())
    resumed = graphs(tmp_path / "parts", epochs=2, resume=tmp_path / "parts" / "checkpoint.pt")
    resumed.run()
    assert resumed.steps.run.difference == 0.0
    one, other = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_goes_on_with_and_without_a_graph(graphs: Any, tmp_path: Path) -> None:
    trainer = Trainer(chosen(tmp_path, epochs=2), DATA)
    trainer._finish_epoch(trainer._run_epoch())
    resume = {"resume": tmp_path / "checkpoint.pt"}
    graphed = graphs(tmp_path, epochs=2, **resume)
    assert graphed.optimizer.param_groups[0]["fused"] is True
    eager = Trainer(chosen(tmp_path, epochs=2, **resume), DATA)
    assert not eager.optimizer.param_groups[0]["fused"]


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cuda_graph: expected a CUDA device, got device cpu"):
        chosen(tmp_path, cuda_graph=True)
    monkeypatch.setattr(options, "check_device", lambda _: torch.device("cuda:0"))
    assert chosen(tmp_path, cuda_graph=True, amp="bf16").cuda_graph
    with pytest.raises(ValueError, match="cuda_graph: expected amp bf16 or none, got amp fp16"):
        chosen(tmp_path, cuda_graph=True, amp="fp16")
    monkeypatch.setattr(distributed, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="cuda_graph: expected one process, got 2 processes"):
        chosen(tmp_path, cuda_graph=True)


def test_the_host_never_waits_for_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The very step that a graph holds, on a device that has no memory."""
    recipe = recipe_for("digits", **CHANGES)
    model = NETWORK.build("recompute")
    average = MovingAverage(model, recipe.ema_decay)
    average.update_parameters(model)  # asks whether it is the first
    pretend(monkeypatch)
    model.to(DEVICE)
    average.to(DEVICE)
    optimizer = build_optimizer(model, recipe)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    schedule = build_schedule(optimizer, recipe, 1)
    run = Steps(model, optimizer, schedule, scaler, average, recipe, num_classes=10, amp=None)
    images, shares = torch.empty(8, 1, 8, 8, device=DEVICE), torch.empty(8, 10, device=DEVICE)
    with capture.rehearsed(), no_host():
        for _ in range(2):
            run._step(images, shares)


def test_the_average_is_pytorchs() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=True)
    ours = MovingAverage(model, 0.75)
    for step in range(4):
        model(torch.randn(5, 3))
        nn.init.normal_(model[0].weight)
        theirs.update_parameters(model)
        ours.update_parameters(model)
        if step == 2:
            ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    expected = theirs.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in ours.state_dict().items())
    assert MovingAverage(nn.Linear(1, 1, device=DEVICE), 0.75).n_averaged.device == DEVICE
    fresh = AveragedModel(model, use_buffers=True).state_dict()
    ours.load_state_dict(fresh)  # with no update yet: the next is the first again
    ours.update_parameters(model)
    assert torch.equal(ours.module[0].weight, model[0].weight)
