"""A stand-in for CUDA graphs on the CPU: a recording runs the step and takes its effects back, a
replay runs it again on the tensors that were recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from densenet_efficient.core import capture
from densenet_efficient.nn import graphed_step
from densenet_efficient.nn.graphed_step import GraphedStep


class Recorder:
    """Has the interface of `core.capture.Recorder`. recorded, replayed: how often."""

    current: GraphedStep
    recorded = 0
    replayed = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @contextmanager
    def aside(self) -> Iterator[None]:
        yield

    def random_state(self) -> Tensor:
        return torch.get_rng_state()

    def restore_random_state(self, state: Tensor) -> None:
        torch.set_rng_state(state)

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        cls, state = type(self), type(self).current.state
        cls.recorded += 1
        before, random = state.copies(), self.random_state()
        with capture.rehearsed():
            written = tree_map(Tensor.clone, run())
        recorded = [p.grad for p in state.parameters()]
        state.restore(before)
        self.restore_random_state(random)

        def replay() -> None:
            cls.replayed += 1
            seen = [p.grad for p in state.parameters()]
            with capture.rehearsed():
                results = run()
            for parameter, own, other in zip(state.parameters(), recorded, seen, strict=True):
                if own is not None and parameter.grad is not None:
                    own.copy_(parameter.grad)
                parameter.grad = other
            for old, new in zip(tree_flatten(written)[0], tree_flatten(results)[0], strict=True):
                old.copy_(new)

        return replay, written


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[GraphedStep], type[Recorder]]:
    """Graphs are recorded on the CPU; to be called with the step under test."""
    monkeypatch.setattr(GraphedStep, "_device_problem", lambda *_: None)

    def begin(step: GraphedStep) -> type[Recorder]:
        own = type("OwnRecorder", (Recorder,), {"current": step})
        monkeypatch.setattr(graphed_step, "Recorder", own)
        return own

    return begin
