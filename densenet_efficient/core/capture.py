"""Whether a call becomes part of a CUDA graph, which is captured once and then replayed.

Whatever the host draws or decides while a graph is captured is the same at every replay. So such a
call draws its random numbers on the device, from PyTorch's generator, which a graph moves on at
every replay, and never asks the device for a value.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class _Rehearsal(threading.local):
    active: bool = False


_rehearsal = _Rehearsal()


@contextmanager
def rehearsed() -> Iterator[None]:
    """Calls of this thread run as if they were captured: the same operators, the same random
    numbers from the same state of the generator. For the step that a replay is compared with."""
    before, _rehearsal.active = _rehearsal.active, True
    try:
        yield
    finally:
        _rehearsal.active = before


def is_captured(device: torch.device) -> bool:
    """Whether a call on the device is captured, or rehearsed."""
    if _rehearsal.active:
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Recorder:
    """Records what a function launches on a CUDA device, and launches it again; see
    `nn.graphed_step`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._stream = device, torch.cuda.Stream(device)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """On the stream that is captured, as what comes before a capture must run: the default
        stream never is, and what a library sets up it sets up for a stream."""
        main = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            yield
        main.wait_stream(self._stream)

    def random_state(self) -> Tensor:
        """Of the device's generator."""
        return torch.cuda.get_rng_state(self.device)

    def restore_random_state(self, state: Tensor) -> None:
        """The inverse."""
        torch.cuda.set_rng_state(state, self.device)

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Calls run() while its launches are recorded instead of made. Returns what replays them,
        and what run() returned: tensors that every replay writes."""
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as those that pin memory, may do what they like meanwhile.
        recording = torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local")
        main = torch.cuda.current_stream(self.device)  # stays it, also where the capture fails
        generator = torch.cuda.default_generators[main.device_index]
        random = generator.clone_state()
        try:
            with torch.cuda.stream(main), recording:
                results = run()
        except BaseException:
            # A capture that fails leaves the generator in the midst of it: whatever draws a random
            # number or captures next would be refused.
            generator.graphsafe_set_state(random)
            raise
        return graph.replay, results
