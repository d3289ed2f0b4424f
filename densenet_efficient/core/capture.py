"""Whether a call becomes part of a CUDA graph, which is captured once and then replayed.

Whatever the host draws or decides while a graph is captured is the same at every replay. So such a
call draws its random numbers on the device, from PyTorch's generator, which a graph moves on at
every replay, and never asks the device for a value.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
