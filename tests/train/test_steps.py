"""What a step does besides the plain one: parts, clipping, averages, mixed images, loss scaling."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from densenet_efficient.models.networks import NetworkSpec
from densenet_efficient.train.augmentation import mixing
from densenet_efficient.train.data import load_data
from densenet_efficient.train.recipes import Recipe, recipe_for
from densenet_efficient.train.steps import Steps
from densenet_efficient.train.trainer import Trainer, TrainingOptions

NETWORK = NetworkSpec("densenet_cifar", depth=10, growth_rate=4, num_classes=10, in_channels=1)
DATA = load_data("digits", image_size=8, limit=64)
IMAGES, LABELS = torch.randn(7, 5, dtype=torch.float64), torch.arange(7) % 3


def steps_of(model: nn.Module, **changes: Any) -> Steps:
    recipe = Recipe(momentum=0.0, weight_decay=0.0, **changes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return Steps(model, optimizer, schedule, scaler, None, recipe, num_classes=3, amp=None)


def step(**changes: Any) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Gradients and parameters of one step without batch norms, and its sums."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    before = copy.deepcopy(list(model.parameters()))
    sums = steps_of(model, **changes)(IMAGES, LABELS)
    moved = [(a - b).detach() for a, b in zip(model.parameters(), before, strict=True)]
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], moved, sums


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_parts_add_up_to_the_batch(parts: int) -> None:
    whole, divided = step(), step(accumulate=parts)
    for one, other in zip([*whole[0], *whole[1]], [*divided[0], *divided[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(whole[2], divided[2])


def test_a_part_has_two_images_where_the_batch_has() -> None:
    sizes: list[int] = []
    model = nn.Linear(5, 3).double()
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    steps = steps_of(model, accumulate=4)
    steps(IMAGES, LABELS)
    assert sizes == [3, 2, 2]
    steps(IMAGES[:1], LABELS[:1])
    assert sizes[3:] == [1]


def test_the_norm_of_all_gradients_is_clipped() -> None:
    plain, _, _ = step()
    norm = float(torch.cat([g.flatten() for g in plain]).norm())
    clipped, moved, _ = step(clip_norm=norm / 4)
    total = float(torch.cat([g.flatten() for g in clipped]).norm())
    assert total == pytest.approx(norm / 4, rel=1e-4)
    torch.testing.assert_close(moved[0], -0.5 * clipped[0])
    untouched, _, _ = step(clip_norm=4 * norm)
    assert all(torch.equal(a, b) for a, b in zip(plain, untouched, strict=True))


@pytest.mark.parametrize(
    "changes", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}]
)
def test_mixed_images_have_shares_of_classes(changes: dict[str, float]) -> None:
    images, labels = torch.rand(6, 1, 8, 8), torch.arange(6) % 3
    mix = mixing(Recipe(**changes), 3)
    assert mix is not None
    mixed, shares = mix(images, labels)
    assert mixed.shape == images.shape and not torch.equal(mixed, images)
    torch.testing.assert_close(shares.sum(1), torch.ones(6))
    assert shares.shape == (6, 3) and not set(shares.flatten().tolist()) <= {0.0, 1.0}
    assert mixing(Recipe(), 3) is None


def trained(out: Path, changes: dict[str, Any], **options: Any) -> Trainer:
    recipe = recipe_for("digits", epochs=1, batch_size=16, **changes)
    values = {"execution": "reference", "progress": False, **options}
    trainer = Trainer(TrainingOptions(NETWORK, recipe, out, **values), DATA)
    trainer.run()
    return trainer


def test_the_average_is_what_is_evaluated_and_saved(tmp_path: Path) -> None:
    trainer = trained(tmp_path, {"ema_decay": 0.75})
    plain = trained(tmp_path / "plain", {})
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name])
    assert trainer.average is not None and int(trainer.average.n_averaged) == 4
    saved = load_file(tmp_path / "model.safetensors")
    averaged, last = trainer.average.module.state_dict(), trainer.model.state_dict()
    assert all(torch.equal(saved[name], averaged[name]) for name in averaged)
    assert not torch.equal(saved["classifier.weight"], last["classifier.weight"])
    row = trainer.history[0]
    assert row["test_loss"] == trainer.evaluate()[0] != plain.history[0]["test_loss"]


def test_the_average_follows_its_formula() -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = nn.Linear(5, 3).double()
    steps = steps_of(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=True)
    steps.average = average
    expected = None
    for _ in range(3):
        steps(IMAGES, LABELS)
        weight = model.weight.detach().clone()
        expected = weight if expected is None else 0.75 * expected + 0.25 * weight
    torch.testing.assert_close(average.module.weight.detach(), expected)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_close_to_single(tmp_path: Path, amp: str) -> None:
    full = trained(tmp_path / "fp32", {}, execution="recompute").history[0]
    low = trained(tmp_path / amp, {}, execution="recompute", amp=amp).history[0]
    assert low["train_loss"] == pytest.approx(full["train_loss"], rel=0.02)
    assert low["train_loss"] != full["train_loss"]


def test_a_step_whose_gradients_overflow_is_left_out_and_scaled_down() -> None:
    model = nn.Linear(5, 3)
    steps = steps_of(model, clip_norm=1.0)
    steps.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        steps(torch.full((4, 5), 1e38), LABELS[:4])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert steps.scaler.get_scale() == 2.0**9
    steps(torch.randn(4, 5), LABELS[:4])
    assert not torch.equal(before["weight"], model.weight)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"accumulate": 0}, "accumulate: expected a positive integer, got 0"),
        ({"accumulate": 65}, r"accumulate: expected at most batch_size \(64\), got 65"),
        ({"clip_norm": -1.0}, "clip_norm: expected a finite number >= 0, got -1.0"),
        ({"ema_decay": 1.0}, r"ema_decay: expected a number in \[0, 1\), got 1.0"),
        ({"mixup": -0.2}, "mixup: expected a finite number >= 0"),
        ({"cutmix": float("inf")}, "cutmix: expected a finite number >= 0"),
        ({"randaugment": 31}, r"randaugment: expected an integer in 0\.\.30, got 31"),
        ({"randaugment": 2.5}, r"randaugment: expected an integer in 0\.\.30, got 2.5"),
    ],
)
def test_values_out_of_their_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**changes)
    assert dataclasses.replace(Recipe(), accumulate=64).accumulate == 64
