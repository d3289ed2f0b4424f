"""A ctrl-C while a loader works waits for it, once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from densenet_efficient.train.batches import on_device
from densenet_efficient.train.interrupts import held_back


@pytest.fixture(autouse=True)
def pythons_handler() -> Iterator[None]:
    """Where the tests run in the background, ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_waits_and_the_second_does_not() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), held_back():
        interrupt()
        reached.append("after the first")
        interrupt()
        reached.append("after the second")
    assert reached == ["after the first"]
    with pytest.raises(KeyboardInterrupt), held_back():
        interrupt()
        reached.append("the end")
    assert reached[1:] == ["the end"]
    with held_back():
        pass


def test_what_was_ignored_stays_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with held_back():
        interrupt()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_other_threads_change_nothing() -> None:
    seen: list[Any] = []

    def run() -> None:
        with held_back():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


class Images(Dataset):
    """Each interrupts this process, the one that trains, when it is loaded."""

    def __init__(self) -> None:
        self.trains, self.loaded = os.getpid(), 0

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        os.kill(self.trains, signal.SIGINT)
        self.loaded += 1
        return torch.zeros(3, 2, 2), 0


def test_a_loader_is_not_broken_off() -> None:
    images = Images()
    batches = on_device(DataLoader(images), torch.device("cpu"), torch.contiguous_format)
    with pytest.raises(KeyboardInterrupt):
        next(batches)
    assert images.loaded == 1
