"""Where a launch leaves multiprocessors idle, or keeps too few warps on them.

The limits: the busiest multiprocessor takes at most 1.2 times the average's tiles, and holds at
least eight warps. A launch that is predicted to execute for less than three microseconds on the
device, without the fixed cost of a launch, is exempt. What misses a limit is listed in
docs/predict.md, and must not get worse.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from densenet_efficient.models.networks import NetworkSpec

from . import counts, fit
from .calls import Call, Step
from .devices import B200, GPUS, Gpu
from .launches import Launch, emulator_for, listed
from .model import seconds, work_of

WAVE_FACTOR, WARPS, EXEMPT = 1.2, 8, 3e-6
DEVICES = (GPUS["a100"], GPUS["h200"], B200)
NETWORKS = {
    "densenet121": NetworkSpec("densenet121"),
    "densenet264": NetworkSpec("densenet264"),
    "BC-100-12": NetworkSpec("densenet_cifar"),
    "BC-190-40": NetworkSpec("densenet_cifar", depth=190, growth_rate=40),
}
BATCHES = {"densenet121": (8, 64, 512)}
OTHER_BATCHES = (8, 64, 256)


@dataclass(frozen=True)
class Placed:
    """A persistent launch of a convolution, of which network, batch and device, and the seconds
    that its own execution is predicted to take there."""

    network: str
    batch: int
    gpu: Gpu
    launch: Launch
    seconds: float = 0.0

    @property
    def where(self) -> str:
        return f"batch {self.batch}, {self.gpu.title}, {self.seconds * 1e6:.1f} us"

    @property
    def exempt(self) -> bool:
        return self.seconds < EXEMPT


@dataclass(frozen=True)
class Idle:
    """Of a kernel in one block of a network the launches with the greatest wave factor and with the
    fewest warps on a multiprocessor, over batches and devices; of those alike the longest."""

    network: str
    stage: str
    kernel: str
    idlest: Placed
    loneliest: Placed

    @property
    def factor(self) -> float:
        return self.idlest.launch.wave_factor

    @property
    def warps(self) -> int:
        return self.loneliest.launch.resident_warps

    @property
    def misses(self) -> bool:
        return self.factor > WAVE_FACTOR or self.warps < WARPS


def persistent(network: str, devices: Iterable[Gpu] = DEVICES) -> Iterator[Placed]:
    """The convolutions' persistent launches in the first, middle and last layer of each block."""
    spec = NETWORKS[network]
    steps = {
        batch: list(_three(Step(spec, batch, spec.default_image_size, "store").calls()))
        for batch in BATCHES.get(network, OTHER_BATCHES)
    }
    with emulator_for(call for calls in steps.values() for call in calls) as emulator:
        for gpu in devices:
            for batch, calls in steps.items():
                for one in listed(calls, gpu.device, torch.bfloat16, emulator):
                    if one.ranges:
                        yield Placed(network, batch, gpu, one)


def _three(calls: Iterable[Call]) -> Iterator[Call]:
    """Of each block and fused convolution the first, middle and last layer's call."""
    by_stage: dict[tuple[str, str], list[Call]] = {}
    for call in calls:
        if call.op.startswith("norm_relu_conv"):
            by_stage.setdefault((call.stage, call.op), []).append(call)
    for alike in by_stage.values():
        yield from (alike[0], alike[len(alike) // 2], alike[-1])


def worst(network: str, devices: Iterable[Gpu] = DEVICES) -> list[Idle]:
    """Of each block and kernel, whatever its template arguments, the launches that are not exempt.

    Raises MissingCountError where a kernel's instructions were never counted.
    """
    known, given = counts.stored(), replace(fit.stored(), launch=0.0)
    found: dict[tuple[str, str], list[Placed]] = {}
    for one in persistent(network, devices):
        placed = replace(one, seconds=seconds(work_of(one.launch, known), one.gpu, given))
        if not placed.exempt:
            key = one.launch.stage, one.launch.kernel.partition("<")[0]
            found.setdefault(key, []).append(placed)
    return [
        Idle(
            network,
            *key,
            max(some, key=lambda one: (one.launch.wave_factor, one.seconds)),
            min(some, key=lambda one: (one.launch.resident_warps, -one.seconds)),
        )
        for key, some in sorted(found.items())
    ]
