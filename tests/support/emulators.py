"""Emulators for the tests of this folder: one worker process for each kernel file."""

from __future__ import annotations

import atexit
import functools

from tools.emulation import Emulator


@functools.cache
def emulator_of(stage: str) -> Emulator:
    """The emulator of a kernel file, built and started with its first use."""
    emulator = Emulator([stage])
    atexit.register(emulator.close)
    return emulator
