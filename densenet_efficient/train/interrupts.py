"""Ctrl-C where it has to wait: a loader of data that is broken off while it starts its workers or
takes a batch from one leaves half of itself, and tracebacks of the other process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["held_back"]


@contextmanager
def held_back() -> Iterator[None]:
    """Holds a ctrl-C back until the end of the block; a second one is raised at once.

    Outside the main thread, which alone gets signals, and where ctrl-C is ignored or not Python's,
    nothing changes. Processes that the block forks ignore a first ctrl-C.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[tuple[int, Any]] = []

    def hold(number: int, frame: Any) -> None:
        came.append((number, frame))
        if len(came) > 1:
            handler(number, frame)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])
