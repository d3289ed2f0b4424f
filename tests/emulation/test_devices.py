"""Kernels on other devices than the emulation's own: their launchers choose other tiles and grids.
GPUs with 99 KB of shared memory for a block (sm_86, sm_89, sm_120) must be able to run them all."""

from __future__ import annotations

import pytest
import torch

from tests.support.emulators import emulator
from tests.support.identifiers import identifier
from tests.support.kernel_check import compare
from tools.emulation import Device, EmulationError, Launch
from tools.op_cases import make

pytestmark = pytest.mark.slow

BF16, FP32 = torch.bfloat16, torch.float32
SMALL = Device(multiprocessors=2, shared_bytes=99 << 10)
LARGE = Device(multiprocessors=132)

# Shapes of real networks, with as few rows as keep their tiles: (operator, sizes)
SHAPES = [
    ("norm_relu_conv1x1_forward", (600, 40, 128)),
    ("norm_relu_conv1x1_forward", (600, 40, 192)),
    ("norm_relu_conv1x1_backward", (600, 80, 128)),
    ("norm_relu_conv1x1_backward", (600, 40, 192)),
    ("norm_relu_conv3x3_forward", (1, 56, 56, 40, 32)),
    ("norm_relu_conv3x3_forward", (1, 3, 160, 40, 48)),
    ("norm_relu_conv3x3_backward", (1, 56, 56, 40, 32)),
    ("norm_relu_conv3x3_backward", (1, 3, 160, 40, 48)),
    ("transition_forward", (1, 20, 20, 40, 256)),
    ("transition_backward", (1, 20, 20, 140, 130)),
    ("stem_forward", (1, 16, 112, 64)),
    ("stem_backward", (1, 16, 112, 64)),
]


def run(op: str, sizes: tuple[int, ...], dtype: torch.dtype, device: Device) -> list[Launch]:
    case = make(op, sizes, dtype)
    inputs = case.inputs()
    launches = emulator().call(op, *case.arguments.values(), seed=4, device=device)
    compare(op, inputs, case.outputs)
    return launches


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=identifier)
@pytest.mark.parametrize(("op", "sizes"), SHAPES, ids=identifier)
def test_devices_with_little_shared_memory(
    op: str, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    launches = run(op, sizes, dtype, SMALL)
    assert max(launch.shared_bytes for launch in launches) <= SMALL.shared_bytes


@pytest.mark.parametrize(("op", "sizes"), SHAPES[::2], ids=identifier)
def test_devices_with_many_multiprocessors(op: str, sizes: tuple[int, ...]) -> None:
    """More blocks than there is work for several tiles each."""
    run(op, sizes, BF16, LARGE)


def test_a_launch_that_does_not_fit_is_refused() -> None:
    tiny = Device(shared_bytes=16 << 10)
    with pytest.raises(EmulationError, match=r"impossible launch of .* bytes of shared memory"):
        run("norm_relu_conv1x1_forward", (600, 40, 128), BF16, tiny)
    with pytest.raises(EmulationError, match="do not fit a tile in the device's shared memory"):
        run("norm_relu_conv3x3_forward", (1, 56, 56, 40, 32), BF16, tiny)
