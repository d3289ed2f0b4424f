"""The step as a queue: the host launches one kernel after the other, the device runs them in order,
and waits where the host is late."""

from __future__ import annotations

from collections.abc import Iterable

from .devices import Gpu
from .model import Efficiencies, Work, seconds

# PyTorch's own kernels, as measured: seconds of a small one.
SMALL = 1.7e-6
# The first convolution of networks for ImageNet in the measured steps was cuDNN's: forward or
# weight gradient, with its padding and casts, took its images' pixels at a share of the bandwidth,
# of three channels of 16 bits.
CONVOLUTION_BYTES, CONVOLUTION_SHARE = 6, 0.0105


def first_convolution(pixels: float, gpu: Gpu) -> float:
    """Seconds of cuDNN's forward, or of its weight gradient, for so many pixels of images."""
    return pixels * CONVOLUTION_BYTES / (CONVOLUTION_SHARE * gpu.bandwidth)


def duration(work: Work, gpu: Gpu, given: Efficiencies) -> float:
    """Seconds of one launch."""
    return SMALL if work.kernel.startswith("pytorch") else seconds(work, gpu, given)


def step_seconds(works: Iterable[Work], gpu: Gpu, given: Efficiencies) -> float:
    """Of the whole step. given.host = 0 is a step that a graph replays."""
    return queued(((work.times, duration(work, gpu, given)) for work in works), given.host)


def queued(launches: Iterable[tuple[int, float]], cost: float) -> float:
    """Seconds until the last kernel is done: launches, each so many times and so long, of which
    every one costs the host `cost` seconds."""
    host = device = 0.0
    for times, each in launches:
        for _ in range(times):
            host += cost
            device = max(device, host) + each
    return device
