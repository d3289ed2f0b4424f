"""What a few steps of a run do: torch's profiler and, on a GPU, the allocator's history.

trace.json     steps 3 to 5, for chrome://tracing or ui.perfetto.dev; memory events included
profile.txt    their operators, by the time each takes
memory.pickle  the first five steps, for pytorch.org/memory_viz
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from ..files import write_atomically

__all__ = ["STEPS", "check_profiling", "profiled"]

SKIPPED, WARM_UP, RECORDED = 1, 1, 3
STEPS = SKIPPED + WARM_UP + RECORDED


def check_profiling(
    device: torch.device, steps: int, *, profile: bool, memory_snapshot: bool
) -> None:
    """ValueError where an epoch has too few steps, or where there is no allocator to ask."""
    for name, wanted in (("profile", profile), ("memory_snapshot", memory_snapshot)):
        if wanted and steps < STEPS:
            raise ValueError(f"{name}: expected at least {STEPS} steps an epoch, got {steps}")
    if memory_snapshot and device.type != "cuda":
        raise ValueError(
            f"memory_snapshot: expected a CUDA device, whose allocator keeps a history, got "
            f"{device}; profile records the memory events of every device"
        )


@contextmanager
def profiled(
    folder: Path, device: torch.device, *, profile: bool, memory_snapshot: bool
) -> Iterator[Callable[[], None]]:
    """Gives a function to be called after every step of the context."""
    calls: list[Callable[[], None]] = []
    with ExitStack() as stack:
        if memory_snapshot:
            stack.enter_context(_history())
            calls.append(_Snapshot(folder / "memory.pickle"))
        if profile:
            calls.append(stack.enter_context(_profiler(folder, device)).step)

        def after_step() -> None:
            for call in calls:
                call()

        yield after_step


def _profiler(folder: Path, device: torch.device) -> torch.profiler.profile:
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]

    def write(found: Any) -> None:
        write_atomically(folder / "trace.json", found.export_chrome_trace)
        order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        text = found.key_averages().table(sort_by=order, row_limit=50)
        write_atomically(folder / "profile.txt", lambda name: Path(name).write_text(text + "\n"))

    return torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=SKIPPED, warmup=WARM_UP, active=RECORDED, repeat=1),
        on_trace_ready=write,
        profile_memory=True,
        record_shapes=True,
    )


@contextmanager
def _history() -> Iterator[None]:
    torch.cuda.memory._record_memory_history()
    try:
        yield
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


class _Snapshot:
    """Writes the allocator's history once, after `STEPS` calls."""

    def __init__(self, path: Path) -> None:
        self.path, self.steps = path, 0

    def __call__(self) -> None:
        self.steps += 1
        if self.steps == STEPS:
            write_atomically(self.path, torch.cuda.memory._dump_snapshot)
