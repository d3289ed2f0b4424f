"""Whole training steps in a CUDA graph on a GPU: a replay is the eager step, bit for bit, and draws
new masks every time. Run by `make gpu-check`; every test skips where torch sees no CUDA device."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import densenet_efficient as de
from densenet_efficient.core import capture
from densenet_efficient.models.networks import NetworkSpec
from densenet_efficient.train.data import load_data
from densenet_efficient.train.recipes import recipe_for
from densenet_efficient.train.trainer import Trainer, TrainingOptions
from tests.support.cuda_graphs import captured

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def repeatable_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's convolutions may sum in another order each time."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def batch(size: int = 16, pixels: int = 32) -> tuple[Tensor, Tensor]:
    images = torch.randn(size, 3, pixels, pixels, device="cuda")
    labels = torch.randint(10, (size,), device="cuda")
    return images.contiguous(memory_format=torch.channels_last), labels


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Of images or of every pixel, whose own cross entropy would sum in any order; in float32, in
    which two draws of masks hardly agree."""
    with torch.autocast("cuda", torch.bfloat16):
        logits = model(images).movedim(1, -1).flatten(0, -2)
    return nn.functional.cross_entropy(logits.float(), labels.flatten())


NETWORKS = {
    "dropout everywhere": lambda: de.densenet_cifar(22, 12, drop_rate=0.3, drop_everywhere=True),
    "dropout of new features": lambda: de.densenet_cifar(22, 12, drop_rate=0.3),
    "FC-DenseNet": lambda: de.EfficientFCDenseNet(12, (2, 2, 2), 16, num_classes=10),
}


@pytest.mark.parametrize("memory", ["recompute", "store"])
@pytest.mark.parametrize("name", NETWORKS)
def test_masks_are_new_at_every_replay_and_the_same_in_backward(name: str, memory: str) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]().cuda()
    for module in model.modules():
        if isinstance(module, de.EfficientDenseBlock):
            module.memory = memory
    images, labels = batch()
    if name == "FC-DenseNet":
        labels = torch.randint(10, (16, 32, 32), device="cuda")

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = loss_of(model, images, labels)
        loss.backward()
        return loss.detach()

    graph, loss = captured(step)
    captured_gradients = [p.grad for p in model.parameters()]
    losses = []
    for seed in range(3):
        torch.cuda.manual_seed(seed)
        graph.replay()
        losses.append(loss.item())
        gradients = [g.clone() for g in captured_gradients if g is not None]
        torch.cuda.manual_seed(seed)
        with capture.rehearsed():
            expected = step()
        assert expected.item() == losses[-1]
        theirs = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(torch.equal(a, b) for a, b in zip(gradients, theirs, strict=True))
    torch.cuda.manual_seed(0)
    for _ in range(3):  # one after the other, as in a training
        graph.replay()
        losses.append(loss.item())
    assert losses[3] == losses[0] and len(set(losses)) == 5


@pytest.mark.parametrize("momentum", [0.1, None])
def test_replays_train_as_eager_steps_do(momentum: float | None) -> None:
    """Running statistics, counters, momentum and parameters after five steps, on five batches."""
    torch.manual_seed(0)
    model = de.EfficientDenseNet(16, (2, 3), 32, num_classes=10).cuda()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    models = [model, copy.deepcopy(model)]
    batches = [batch(pixels=64) for _ in range(5)]
    static = batches[0][0].clone(), batches[0][1].clone()
    steps, optimizers = [], []
    for own in models:
        optimizer = torch.optim.SGD(own.parameters(), 0.05, momentum=0.9, fused=True)

        def step(own: nn.Module = own, optimizer: torch.optim.SGD = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(own, *static)
            loss.backward()
            optimizer.step()
            return loss.detach()

        steps.append(step)
        optimizers.append(optimizer)
    graph, loss = captured(steps[0])
    for _ in range(3):
        steps[1]()
    for images, labels in batches:
        static[0].copy_(images)
        static[1].copy_(labels)
        graph.replay()
        assert loss.item() == steps[1]().item()
    mine, theirs = (own.state_dict() for own in models)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert int(mine["features.norm0.num_batches_tracked"]) == 8


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "SGD":
        return torch.optim.SGD(
            model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True
        )
    return torch.optim.AdamW(model.parameters(), 1e-3, capturable=True)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_graphed_step_trains_as_eager_steps_do(name: str, momentum: float | None) -> None:
    """The helper, with a schedule, a short batch in between, clipping and an average."""
    torch.manual_seed(0)
    model = de.EfficientDenseNet(16, (2, 3), 32, num_classes=10).cuda()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    batches = [batch(size, 64) for size in (16, 16, 16, 16, 16, 7, 16, 16)]
    found = []
    for graphed in (False, True):
        own = copy.deepcopy(model)
        optimizer = optimizer_of(name, own)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))

        def step(
            images: Tensor,
            labels: Tensor,
            own: nn.Module = own,
            optimizer: torch.optim.Optimizer = optimizer,
        ) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(own, images, labels)
            loss.backward()
            nn.utils.clip_grad_norm_(own.parameters(), 1.0)
            optimizer.step()
            return loss

        run = de.GraphedStep(step, own, optimizer, warm_up=3 if graphed else len(batches))
        losses, kinds = [], []
        for images, labels in batches:
            losses.append(run(images, labels).item())
            kinds.append(run.path.kind)
            schedule.step()
        found.append((losses, own.state_dict()))
    assert kinds == ["eager"] * 3 + ["graph"] * 2 + ["eager"] + ["graph"] * 2
    assert run.difference == 0.0
    assert {chosen.kind for _, chosen in run.modules} == {"kernels"}
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][key], found[1][1][key]) for key in found[0][1])


def test_a_graphed_step_draws_new_masks() -> None:
    torch.manual_seed(0)
    model = de.densenet_cifar(22, 12, drop_rate=0.3, drop_everywhere=True).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss = loss_of(model, images, labels)
        loss.backward()
        optimizer.step()
        return loss

    run = de.GraphedStep(step, model, optimizer, warm_up=1)
    one = batch()
    losses = [run(*one).item() for _ in range(5)]
    assert run.path.kind == "graph" and run.difference == 0.0 and len(set(losses)) == 5


def test_a_run_of_the_command_is_captured(tmp_path: Path) -> None:
    """With accumulation, clipping, an average and mixed images, and a short batch at the end."""
    network = NetworkSpec("densenet_cifar", depth=22, growth_rate=12, num_classes=10, in_channels=1)
    recipe = recipe_for(
        "digits", epochs=2, batch_size=16, accumulate=2, clip_norm=1.0, ema_decay=0.9, mixup=0.3
    )
    data = load_data("digits", image_size=16, limit=100)
    options = TrainingOptions(
        network, recipe, tmp_path, amp="bf16", device="cuda", cuda_graph=True, progress=False
    )
    trainer = Trainer(options, data)
    history = trainer.run()
    assert isinstance(trainer.steps.run, de.GraphedStep) and trainer.steps.run.difference == 0.0
    assert all(math.isfinite(row["train_loss"]) for row in history)


def test_a_step_that_reads_a_value_is_refused() -> None:
    model = de.densenet_cifar(22, 12).cuda()
    optimizer = optimizer_of("SGD", model)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss = loss_of(model, images, labels)
        loss.backward()
        optimizer.step()
        if loss.item() > 1e6:
            raise ArithmeticError
        return loss

    run = de.GraphedStep(step, model, optimizer, warm_up=1)
    run(*batch())
    with pytest.raises(RuntimeError, match="step cannot be captured"):
        run(*batch())
    # The device goes on, random numbers and captures included.
    assert torch.rand(3, device="cuda").sum().item() > 0
    captured(lambda: nn.functional.dropout(torch.ones(3, device="cuda")).sum())
