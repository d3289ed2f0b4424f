"""Modules compared with what they were: every difference is seen, and nothing is kept alive."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from densenet_efficient import EfficientDenseBlock
from densenet_efficient.nn import snapshot
from densenet_efficient.nn.snapshot import Snapshot
from densenet_efficient.ops import library

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(not library.is_available(), reason="the compiled library is not built"),
]


class Scaled(nn.Module):
    """Modules with what a library may give them."""

    options: Any = (1, "same")

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.gap = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), None
        self.sizes, self.scale = [3, [4, 5]], 1.0
        self.register_buffer("mask", None)


class Root(nn.Module):
    """What the snapshot is taken of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Scaled(), Scaled()


def taken() -> tuple[Any, Snapshot]:
    root = Root()
    found = Snapshot.take(root, root._modules.values())
    assert found is not None
    return root, found


def test_tensors_come_in_order() -> None:
    root, before = taken()
    root.first.conv.weight = nn.Parameter(torch.ones(3, 2, 1, 1))
    found = before.tensors()
    assert found is not None and found[-1] is None
    held = {id(tensor) for tensor in (*root.parameters(), *root.buffers())}
    assert {id(tensor) for tensor in found[:-1]} == held
    for module in root.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            assert found[before.place(module, name)] is tensor
    assert before.place(None, "weight") == before.place(root.first.norm, "other") == -1


def turn_round(root: Any) -> None:
    parameters = root.first.conv._parameters
    parameters["weight"] = parameters.pop("weight")


CHANGES: dict[str, Callable[[Any], Any]] = {
    "value": lambda root: setattr(root.first.norm, "eps", 0.5),
    "type": lambda root: setattr(root.first, "scale", True),
    "inside a list": lambda root: root.second.sizes[1].append(6),
    "array": lambda root: setattr(root.first, "scale", torch.ones(2)),
    "attribute": lambda root: setattr(root.first, "other", 1),
    "no attribute": lambda root: delattr(root.first, "scale"),
    "forward": lambda root: vars(root.first.conv).update(forward=torch.tanh),
    "flag": lambda root: root.first.norm.eval(),
    "forward hook": lambda root: root.first.register_forward_hook(print),
    "forward pre-hook": lambda root: root.first.conv.register_forward_pre_hook(print),
    "backward hook": lambda root: root.second.norm.register_full_backward_hook(print),
    "backward pre-hook": lambda root: root.second.register_full_backward_pre_hook(print),
    "class": lambda root: setattr(root.first.norm, "__class__", nn.BatchNorm1d),
    "class attribute": lambda root: setattr(Scaled, "options", (2, "same")),
    "child": lambda root: setattr(root.first, "conv", nn.Conv2d(2, 3, 1)),
    "new child": lambda root: root.first.add_module("last", nn.ReLU()),
    "child in a gap": lambda root: setattr(root.first, "gap", nn.ReLU()),
    "no child": lambda root: delattr(root.first, "conv"),
    "exchanged": lambda root: root._modules.update(first=root.second, second=root.first),
    "order": turn_round,
    "no bias": lambda root: setattr(root.first.conv, "bias", None),
    "buffer": lambda root: setattr(root.first, "mask", torch.ones(2)),
    "new buffer": lambda root: root.first.register_buffer("more", torch.ones(2)),
    "subclass": lambda root: root.first.conv._parameters.update(
        weight=torch.ones(3, 2, 1, 1).as_subclass(type("Other", (torch.Tensor,), {}))
    ),
    "dictionary": lambda root: vars(root.first).update(_modules=OrderedDict(root.first._modules)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scaled, "options", Scaled.options)
    root, before = taken()
    assert before.tensors() is not None
    CHANGES[change](root)
    assert before.tensors() is None


def test_what_cannot_be_compared_has_no_snapshot() -> None:
    root = Root()
    root.second.other = object()
    assert Snapshot.take(root, root._modules.values()) is None
    assert Snapshot.take(root, [root.first]) is not None


def test_nothing_is_kept_alive() -> None:
    root, before = taken()
    objects = [*root.parameters(), *root.buffers(), *root.modules(), root.first.sizes, print]
    root.first.sizes = [3, [4, 5]]  # equal, and another
    counts = [sys.getrefcount(one) for one in objects]
    for _ in range(100):
        assert before.tensors() is not None
    root.second.norm.register_forward_hook(print).remove()
    root.second.norm.eps = 0.5
    for _ in range(100):
        assert before.tensors() is None
    assert [sys.getrefcount(one) for one in objects] == counts


def test_without_the_compiled_comparison_every_call_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 8, 5, 5)
    torch.manual_seed(0)
    block = EfficientDenseBlock(3, 8, 2, 4, 0.0)
    expected = [block(x), block(x)]
    assert block._efficient.last_call is not None
    block._efficient.last_call = None
    monkeypatch.setattr(snapshot, "_comparison", lambda: None)
    for y in expected:
        torch.testing.assert_close(block(x), y, rtol=0, atol=0)
    assert block._efficient.last_call is None
