"""What memory a step takes: the peak of the process, or of the CUDA allocator, above the
pre-step baseline.

On Linux the kernel keeps the process' high-water mark (VmHWM) and lets it be reset, so the peak of
one step is exact to a page; it sees everything, also what libraries allocate past PyTorch's
allocator. Freed memory must leave the process at once for that, which glibc does for blocks above
`MALLOC_MMAP_THRESHOLD_`; `ALLOCATOR_SETTINGS` belong into the environment of a process that
measures, the same for every peer.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = [
    "ALLOCATOR_SETTINGS",
    "StepMemory",
    "allocator_peak_bytes",
    "measure_step",
    "peak_bytes",
]

# 64 KiB: every activation is a mapping of its own and goes back when it is freed.
ALLOCATOR_SETTINGS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one step. before: live bytes before it. peak: the most live bytes during it, above
    `before`. kept: live bytes between forward and backward, above `before`, without scratch that
    was idle then."""

    before: int
    peak: int
    kept: int


def _status(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS}: expected a line {key}, got none")


def _settled_bytes() -> int:
    """What the process holds once the C library has given back the free pages of its heap, where
    small tensors live, such as the gradients of an earlier step; then the mark is set to it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    try:
        _CLEAR.write_text("5")
    except OSError as error:
        raise RuntimeError(
            f"memory on the CPU: expected a Linux that lets {_CLEAR} be written, got: {error}"
        ) from error
    return _status("VmRSS")


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has held so far: of the CUDA device's allocator, or, on
    the CPU, of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        return _status("VmHWM")
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_step(
    forward: Callable[[], torch.Tensor],
    rest: Callable[[torch.Tensor], None],
    device: torch.device,
    idle: Callable[[], int] = lambda: 0,
) -> StepMemory:
    """Run one step, `rest(forward())`, and measure it.

    Args:
        forward: returns the loss; what is live after it is `kept`.
        rest: backward and the optimiser's step.
        idle: bytes of scratch that nobody uses at the moment.

    Raises:
        RuntimeError: this system does not let the process' high-water mark be reset.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        loss = forward()
        kept = torch.cuda.memory_allocated(device) - before - idle()
        rest(loss)
        return StepMemory(before, torch.cuda.max_memory_allocated(device) - before, kept)
    before = _settled_bytes()
    loss = forward()
    kept = _status("VmRSS") - before - idle()
    rest(loss)
    return StepMemory(before, _status("VmHWM") - before, kept)


def allocator_peak_bytes(step: Callable[[], object]) -> int:
    """The most that torch's CPU allocator held during `step` over what it held before, exact to
    the byte, from the profiler's events. It does not see what other libraries allocate."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    events = [
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        held += size
        peak = max(peak, held)
    return peak
