"""`capture.Recorder` with stand-ins for torch.cuda: what a capture that fails leaves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from densenet_efficient.core.capture import Recorder


class Generator:
    """A CUDA device's: while a capture goes on its state is another, which nothing else may use."""

    state = "before"

    def clone_state(self) -> Any:
        return SimpleNamespace(state=self.state)

    def graphsafe_set_state(self, other: Any) -> None:
        self.state = other.state


class Device:
    """Stands for torch.cuda."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.generator = Generator()
        main = SimpleNamespace(device_index=0)
        monkeypatch.setattr(torch.cuda, "Stream", lambda _: "aside")
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: main)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "default_generators", (self.generator,))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    @contextmanager
    def graph(self, graph: Any, stream: str, capture_error_mode: str) -> Iterator[None]:
        assert (stream, capture_error_mode) == ("aside", "thread_local")
        self.generator.state = "capturing"
        yield  # where the capture fails PyTorch does not come to what follows
        self.generator.state = "after"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_capture_that_fails_gives_the_generator_back(
    device: Device, error: type[BaseException]
) -> None:
    def run() -> None:
        assert device.generator.state == "capturing"
        raise error("in the step")

    with pytest.raises(error, match="in the step"):
        Recorder(torch.device("cuda")).record(run)
    assert device.generator.state == "before"


def test_a_capture_that_does_not_fail_leaves_it(device: Device) -> None:
    replay, found = Recorder(torch.device("cuda")).record(lambda: 3)
    assert found == 3 and device.generator.state == "after"
    replay()
