"""Where a launch leaves multiprocessors idle, or keeps too few warps on them.

The bar: the busiest multiprocessor takes at most 1.2 times the average's tiles, and holds at least
eight warps. What misses it is listed in docs/predict.md, and must not get worse.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from densenet_efficient.models.networks import NetworkSpec
from tools.emulation import Device

from .calls import Call, Step
from .launches import Launch, emulator_for, listed

WAVE_FACTOR, WARPS = 1.2, 8
# Of A100, H100 and H200, B200.
DEVICES = (Device(108, 163 << 10), Device(132, 227 << 10), Device(148, 227 << 10))
NETWORKS = {
    "densenet121": NetworkSpec("densenet121"),
    "densenet264": NetworkSpec("densenet264"),
    "BC-100-12": NetworkSpec("densenet_cifar"),
    "BC-190-40": NetworkSpec("densenet_cifar", depth=190, growth_rate=40),
}
BATCHES = {"densenet121": (64, 512), "densenet264": (64, 256)}


@dataclass(frozen=True)
class Idle:
    """The worst of a kernel in one block of a network, over batches and devices: its wave factor
    and its warps on a multiprocessor."""

    network: str
    stage: str
    kernel: str
    factor: float
    warps: int

    @property
    def misses(self) -> bool:
        return self.factor > WAVE_FACTOR or self.warps < WARPS


def persistent(network: str, devices: Iterable[Device]) -> Iterator[Launch]:
    """The convolutions' persistent launches in the first, middle and last layer of each block."""
    spec = NETWORKS[network]
    chosen: dict[Call, None] = {}
    for batch in BATCHES.get(network, (64, 256)):
        calls = Step(spec, batch, spec.default_image_size, "store").calls()
        chosen |= dict.fromkeys(_three([c for c in calls if c.op.startswith("norm_relu_conv")]))
    with emulator_for(chosen) as emulator:
        for device in devices:
            for one in listed(chosen, device, torch.bfloat16, emulator):
                if one.ranges:
                    yield one


def _three(calls: list[Call]) -> Iterator[Call]:
    """Of each block and operator the first, middle and last layer's call."""
    by_stage: dict[tuple[str, str], list[Call]] = {}
    for call in calls:
        by_stage.setdefault((call.stage, call.op), []).append(call)
    for alike in by_stage.values():
        yield from (alike[0], alike[len(alike) // 2], alike[-1])


def worst(network: str, devices: Iterable[Device] = DEVICES) -> list[Idle]:
    """Of each block and kernel, whatever its template arguments."""
    found: dict[tuple[str, str], Idle] = {}
    for one in persistent(network, devices):
        key = one.stage, one.kernel.partition("<")[0]
        before = found.get(key, Idle(network, *key, 1.0, one.resident_warps))
        factor = max(before.factor, one.wave_factor)
        found[key] = Idle(network, *key, factor, min(before.warps, one.resident_warps))
    return sorted(found.values(), key=lambda one: (one.stage, one.kernel))
