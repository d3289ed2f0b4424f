"""Registered blocks whose layers lie in a container inside: what hangs deep in them, and adapters
that say something wrong of their dropout."""

import copy
import dataclasses
import io
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densenet_efficient import ConversionError, LayerParts, block_adapter, convert, register_adapter
from densenet_efficient.nn.dense_block import DenseBlockExecution
from tests.support.converted_pair import (
    assert_close,
    assert_same_step,
    converted_pair,
    images,
    training_step,
)

ROOT = Path(__file__).resolve().parents[2]


class Body(nn.Module):
    """A layer's modules, two levels below the block's layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 8, 1, bias=False)
        )
        self.second = nn.Sequential(
            nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Layer(nn.Module):
    def __init__(self, channels: int, p: float, channelwise: bool) -> None:
        super().__init__()
        self.body = Body(channels)
        self.p = p
        self.channelwise = channelwise

    def forward(self, x: Tensor) -> Tensor:
        drop = F.dropout2d if self.channelwise else F.dropout
        y = self.body(x)
        return drop(y, self.p, self.training) if self.p else y


class Nested(nn.Module):
    """Layers in a ModuleList in a container, and a name of its own for it."""

    def __init__(self, p: float = 0.0, channelwise: bool = False) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.steps = nn.ModuleList(Layer(6 + 4 * i, p, channelwise) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.inner.steps:
            x = torch.cat([x, layer(x)], 1)
        return x


def layers_of(block: Any) -> Mapping[str, nn.Module]:
    return dict(block.inner.steps.named_children())


def parts_of(layer: Any) -> LayerParts:
    first, second = layer.body.first, layer.body.second
    return LayerParts(first[0], first[2], second[0], second[2], layer.p, layer.channelwise)


def parts_without_dropout(layer: Any) -> LayerParts:
    return dataclasses.replace(parts_of(layer), drop_rate=0.0)


def parts_with_the_other_dropout(layer: Any) -> LayerParts:
    return dataclasses.replace(parts_of(layer), channelwise_dropout=not layer.channelwise)


def parts_with_another_rate(layer: Any) -> LayerParts:
    return dataclasses.replace(parts_of(layer), drop_rate=layer.p / 2)


def nested_pair(**options: Any) -> tuple[nn.Module, Any]:
    register_adapter(Nested, block_adapter(parts_of, layers=layers_of))
    plain = nn.Sequential(Nested(**options)).double()
    return plain, convert(copy.deepcopy(plain))


def features() -> Tensor:
    return torch.randn(3, 6, 6, 5, dtype=torch.float64)


def test_a_nested_block_runs_on_the_operators() -> None:
    plain, ours = nested_pair()
    assert isinstance(ours[0], DenseBlockExecution)
    x = features()
    assert ours[0].path(x).kind != "original"
    assert_same_step(plain, ours, x)


DEEP = ["inner.steps.1", "inner.steps.1.body", "inner.steps.2.body.second",
        "inner.steps.0.body.first.1"]  # fmt: skip


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.filterwarnings("ignore:.*runs its original forward")
def test_hooks_deep_inside_are_called(name: str) -> None:
    plain, ours = nested_pair()
    x, seen = features(), []
    handle = ours[0].get_submodule(name).register_forward_hook(lambda *args: seen.append(1))
    assert_same_step(plain, ours, x)
    assert seen == [1] and f"{name} carries a hook" in ours[0].path(x).reason
    handle.remove()
    assert ours[0].path(x).kind != "original"


@pytest.mark.parametrize("name", ["inner.steps.0.body.first.1", "inner.steps.2.body.second.1"])
@pytest.mark.filterwarnings("ignore:.*runs its original forward")
def test_modules_replaced_deep_inside_are_called(name: str) -> None:
    plain, ours = nested_pair()
    for model in (plain, ours):
        model[0].set_submodule(name, nn.ELU())
    assert f"{name} was replaced by a ELU" in ours[0].path(features()).reason
    assert_same_step(plain, ours, features())


@pytest.mark.filterwarnings("ignore:.*runs its original forward")
def test_a_layer_appended_to_the_container() -> None:
    plain, ours = nested_pair()
    new = Layer(18, 0.0, False).double()
    for model in (plain, ours):
        model[0].inner.steps.append(copy.deepcopy(new))
    assert_same_step(plain, ours, features())


@pytest.mark.parametrize("channelwise", [False, True])
@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (parts_without_dropout, "the adapter says nothing"),  # a dropout would be lost
        (parts_with_the_other_dropout, "drops out 3 times .*0.5 of"),  # channels for values
        (parts_with_another_rate, "0.25 of"),
    ],
)
def test_adapters_wrong_about_dropout_are_refused(
    parts: Callable[[Any], LayerParts], reason: str, channelwise: bool
) -> None:
    register_adapter(Nested, block_adapter(parts, layers=layers_of))
    model = nn.Sequential(Nested(0.5, channelwise))
    with pytest.raises(ConversionError, match=f"(?s){reason}"):
        convert(model)
    assert type(model[0]) is Nested


@pytest.mark.parametrize("channelwise", [False, True])
def test_adapters_right_about_dropout_are_taken(channelwise: bool) -> None:
    """With the kind declared: whole channels are zero, or single values."""
    _, ours = nested_pair(p=0.5, channelwise=channelwise)
    new = ours(torch.randn(8, 6, 6, 5).double())[:, 6:] == 0
    whole = new.all(-1).all(-1)
    assert 0.2 < new.double().mean() < 0.8
    assert bool((new.any(-1).any(-1) == whole).all()) == channelwise
    _, deep = nested_pair(p=0.5, channelwise=channelwise)
    assert deep.eval()(features()).isfinite().all()


# Copies


@pytest.mark.parametrize("make", [nested_pair, converted_pair])
@pytest.mark.parametrize("whole", [True, False])
def test_copies_and_pickles_run_like_the_original(make: Callable[..., Any], whole: bool) -> None:
    plain, ours = make()
    x = features() if make is nested_pair else images()
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False) if whole else copy.deepcopy(copy.deepcopy(ours))
    expected = training_step(plain, x)
    assert_close(expected, training_step(loaded, x))
    assert_close(expected, training_step(ours, x))


LOADED_ELSEWHERE = """
import sys
from tests.support.peer import DenseLayer
import torch
ours, x, expected = torch.load(sys.argv[1], weights_only=False)
torch.testing.assert_close(ours(x), expected)
assert ours.features.denseblock1.path(torch.randn(2, 16, 4, 4).double()).kind != "original"
forward = DenseLayer.forward
DenseLayer.forward = lambda self, x: forward(self, x) * 0.5
assert not torch.allclose(ours(x), expected), "a patched forward was not called"
"""


@pytest.mark.slow
def test_a_pickle_in_another_process_sees_patches_as_here(tmp_path: Path) -> None:
    """Where no conversion has looked at the classes yet."""
    _, ours = converted_pair()
    x = images()
    with torch.no_grad():
        torch.save((ours.eval(), x, ours(x)), tmp_path / "model.pt")
    command = [sys.executable, "-W", "ignore", "-c", LOADED_ELSEWHERE, str(tmp_path / "model.pt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
