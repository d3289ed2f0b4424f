"""The emulator for tests: one worker process for each of pytest's, and the check that every kernel
passes on it."""

from __future__ import annotations

import atexit

import torch
from torch import Tensor

from tests.support.kernel_check import compare
from tools.emulation import Device, Emulator, Launch
from tools.emulation.report import Traffic, tensor_traffic
from tools.op_cases import Case

# Seeds 0 and 1 run threads in ascending and descending order, others shuffle them; even ones let
# asynchronous copies arrive as late as they may.
SEEDS = (0, 1, 2, 5)
HOPPER = Device()

_running: list[Emulator] = []


def emulator() -> Emulator:
    """Of every kernel file, built and started with its first use: each start imports torch under
    the address sanitizer, which takes seconds and two thirds of a gigabyte."""
    if not _running:
        _running.append(Emulator())
        atexit.register(_running[0].close)
    return _running[0]


def run(emulator: Emulator, case: Case, seed: int, device: Device = HOPPER) -> dict[str, Tensor]:
    """One call; the case's tensors are put back as they were."""
    saved = [whole.clone() for whole, _ in case.buffers]
    for launch in emulator.call(case.op, *case.arguments.values(), seed=seed, device=device):
        assert launch.kernel.startswith(case.op), f"{case.op} launches {launch.kernel}"
    case.check_outside()
    results = {name: value.clone() for name, value in case.outputs.items()}
    for (whole, _), before in zip(case.buffers, saved, strict=True):
        whole.copy_(before)
    return results


def check(emulator: Emulator, case: Case, device: Device = HOPPER) -> None:
    """Right, and the same bits under every order of threads."""
    inputs = case.inputs()
    results = [run(emulator, case, seed, device) for seed in SEEDS]
    for seed, result in zip(SEEDS, results, strict=True):
        for name, value in result.items():
            assert torch.equal(value, results[0][name]), f"{name} depends on the order, seed {seed}"
    compare(case.op, inputs, results[0])


def total(launches: list[Launch]) -> tuple[Traffic, Traffic]:
    """The traffic of several launches together: loads and stores of all tensors."""
    tensors = tensor_traffic(launches).values()
    loads = sum((tensor.load for tensor in tensors), Traffic())
    return loads, sum((tensor.store for tensor in tensors), Traffic())
