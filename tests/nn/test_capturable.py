"""A training step never makes the host wait for the device, and draws nothing on the host: what a
CUDA graph needs, tried without a GPU on a device that has no memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import densenet_efficient as de
from densenet_efficient.core import capture
from densenet_efficient.nn.execution import recording
from tests.support.pretended_device import DEVICE, HostTouched, no_host, pretend


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)


def small(**options: Any) -> nn.Module:
    """A network with the stem of the ImageNet ones."""
    return de.EfficientDenseNet(8, (2, 2), 16, num_classes=5, **options)


def cumulative(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    return model


def frozen(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "recompute": small,
    "store": lambda: small(memory="store"),
    "plain layers": lambda: de.densenet_cifar(10, 8, bottleneck=False),
    "dropout": lambda: small(drop_rate=0.2),
    "dropout everywhere": lambda: de.densenet_cifar(16, 8, drop_rate=0.2, drop_everywhere=True),
    "momentum=None": lambda: cumulative(small()),
    "frozen norms": lambda: frozen(small()),
    "half": lambda: small().bfloat16(),
    "FC-DenseNet": lambda: de.EfficientFCDenseNet(4, (2, 2, 2), 8, num_classes=3),
    "block": lambda: de.EfficientDenseBlock(3, 3, 4, 8, 0.1),
    "residual block": lambda: de.EfficientResidualDenseBlock(3, 4),
}


def step(model: nn.Module, contiguous: bool = False) -> None:
    weight = next(model.parameters())
    images = torch.empty(4, 3, 32, 32, device=DEVICE, dtype=weight.dtype)
    if not contiguous:
        images = images.contiguous(memory_format=torch.channels_last)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, nesterov=True)
    for _ in range(2):
        optimizer.zero_grad()
        y: Tensor = model(images)
        y.float().logsumexp(1).mean().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


@pytest.mark.parametrize("contiguous", [False, True], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_host_never_waits(name: str, contiguous: bool) -> None:
    model = NETWORKS[name]().to(DEVICE)
    with recording() as entries, capture.rehearsed(), no_host():
        step(model, contiguous)
    assert all(chosen.kind != "original" for _, part, chosen in entries if part != "stem")


def test_a_seed_of_the_host_is_found() -> None:
    model = small(drop_rate=0.2).to(DEVICE)
    with pytest.raises(HostTouched, match="randint"), no_host():
        step(model)


def test_a_value_that_is_read_is_found() -> None:
    with pytest.raises((HostTouched, RuntimeError), match=r"item|meta"), no_host():
        torch.ones(3, device=DEVICE).sum().item()
