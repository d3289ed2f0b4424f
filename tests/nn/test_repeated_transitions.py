"""A transition that is called again runs by a program, and notices every change: a copy of it,
which has recorded nothing yet, gives the same in every respect."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densenet_efficient import EfficientTransition
from densenet_efficient.core import replay
from densenet_efficient.ops import library

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(not library.is_available(), reason="the compiled library is not built"),
]


def replace_weight(transition: Any) -> None:
    weight = transition.conv.weight
    del transition.conv.weight
    transition.conv.weight = nn.Parameter(weight.detach() * 2)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda t: None,
    "eps": lambda t: setattr(t.norm, "eps", 0.5),
    "momentum": lambda t: setattr(t.norm, "momentum", 0.7),
    "eval": lambda t: t.eval(),
    "no gamma": lambda t: setattr(t.norm, "weight", None),
    "buffer": lambda t: setattr(t.norm, "running_mean", torch.ones(8)),
    "weight": replace_weight,
    "data": lambda t: setattr(t.conv.weight, "data", torch.ones(4, 8, 1, 1)),
    "fewer": lambda t: setattr(t.conv, "weight", nn.Parameter(torch.ones(3, 8, 1, 1))),
    "bias": lambda t: setattr(t.conv, "bias", nn.Parameter(torch.ones(4))),
    "frozen": lambda t: t.conv.requires_grad_(False),
    "frozen norm": lambda t: t.norm.requires_grad_(False),
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "float64": lambda t: t.double(),
    "no pooling": lambda t: setattr(t, "pool", nn.Identity()),
    "maximum": lambda t: setattr(t, "pool", nn.MaxPool2d(2, 2)),
    "hook": lambda t: t.conv.register_forward_hook(lambda *given: None),
}


def step(transition: Any, autocast: bool = False) -> list[Any]:
    """All that a step gives and changes."""
    torch.manual_seed(1)
    x = torch.randn(2, 8, 6, 5, dtype=transition.conv.weight.dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = transition(x)
    inputs = [x, *(p for p in transition.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(y.float().square().sum(), inputs)
    return [transition.path(x), y, *grads, *transition.buffers()]


def assert_same(found: list[Any], expected: list[Any]) -> None:
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, Tensor):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
            assert one.stride() == other.stride()
        else:
            assert one == other


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*original forward")
def test_a_change_between_two_calls_is_noticed(change: str) -> None:
    transition = EfficientTransition(8, 4)
    for _ in range(3):
        step(transition)
    CHANGES[change](transition)
    for _ in range(3):
        fresh = copy.deepcopy(transition)
        assert_same(step(transition), step(fresh))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("options", [{}, {"pool": False}, {"max_pool": True}], ids=str)
def test_a_program_does_what_was_recorded(
    options: Any, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    transition = EfficientTransition(8, 4, **options)
    direct, runs = copy.deepcopy(transition), []
    run = replay.Program.run

    def counted(program: Any, given: Any) -> Any:
        runs.append(run(program, given))
        return runs[-1]

    monkeypatch.setattr(replay.Program, "run", counted)
    found = [step(transition, autocast) for _ in range(3)]
    assert len(runs) == 4 and None not in runs
    monkeypatch.setattr(replay, "record", lambda *_: None)
    for tensors in found:
        assert_same(tensors[1:-3], step(direct, autocast)[1:-3])
    assert_same(list(transition.buffers()), list(direct.buffers()))
