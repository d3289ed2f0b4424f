"""The memory plan's workspace sizes are what the CUDA launchers allocate, byte for byte, and what
their kernels need: the emulation counts the workspaces that are live at a time and finds the bytes
that no kernel stored to; `_module.cuda_workspace_bytes` says how many there would be. A size too
small overflows, which the address sanitizer reports; one too large leaves bytes unused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from densenet_efficient import _module
from tests.support.emulators import emulator
from tests.support.identifiers import identifier
from tools.emulation import Device
from tools.op_cases import CUDA_NAMES, CUDA_OPERATORS, Case, make

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

pytestmark = pytest.mark.slow  # the kernels of every operator are compiled

# Every branch of the tilings: one and many multiprocessors, much and little shared memory.
DEVICES = [Device(1, 227 << 10), Device(3, 99 << 10), Device(132, 227 << 10)]

# (operator, sizes, channels in front of each slice, reason)
SHAPES = [
    ("channel_stats", (700, 24), 0, "several parts"),
    ("channel_stats", (90, 12), 6, "rows aligned to four bytes: more, narrower vectors"),
    ("channel_stats", (3, 1100), 0, "several groups of columns"),
    ("norm_fold", (40,), 0, "no workspace"),
    ("norm_correction", (40,), 0, "no workspace"),
    ("norm_correction_apply", (40, 24), 0, "no workspace"),
    ("norm_relu_conv1x1_forward", (300, 8, 24), 0, "one warp next to another"),
    ("norm_relu_conv1x1_forward", (300, 8, 100), 0, "128 columns"),
    ("norm_relu_conv1x1_forward", (300, 8, 130), 0, "two warps share their rows"),
    ("norm_relu_conv1x1_forward", (5, 3, 200), 1, "several columns of the grid"),
    ("norm_relu_conv1x1_backward", (600, 7, 12), 0, "one warp, several row blocks"),
    ("norm_relu_conv1x1_backward", (300, 70, 65), 0, "two blocks of channels, the pitch padded"),
    ("norm_relu_conv1x1_backward", (40, 8, 200), 0, "two calls: the first one's is the most"),
    ("norm_relu_conv3x3_forward", (2, 9, 9, 5, 12), 0, "16 outputs, channels padded"),
    ("norm_relu_conv3x3_forward", (1, 14, 14, 40, 32), 0, "32 outputs"),
    ("norm_relu_conv3x3_forward", (1, 2, 70, 8, 50), 0, "strips, two columns of the grid"),
    ("norm_relu_conv3x3_backward", (2, 9, 9, 5, 12), 0, "32 channels a block"),
    ("norm_relu_conv3x3_backward", (1, 14, 14, 40, 32), 0, "64 channels a block"),
    ("norm_relu_conv3x3_backward", (1, 2, 70, 70, 50), 0, "strips, blocks of both kinds"),
    ("transition_forward", (2, 9, 12, 8, 12), 0, "64 columns"),
    ("transition_forward", (2, 9, 12, 8, 200), 0, "pairs of warps"),
    ("transition_forward", (1, 1, 6, 8, 12), 0, "no window"),
    ("transition_backward", (2, 16, 20, 9, 12), 0, "an odd number of channels"),
    ("transition_backward", (1, 8, 40, 140, 130), 0, "four tiles of the weight gradient"),
    ("transition_backward", (1, 12, 12, 12, 8), 6, "rows aligned to four bytes"),
    ("transition_backward", (1, 1, 6, 8, 12), 0, "no window"),
    ("stem_forward", (1, 15, 30, 24), 0, "several bands"),
    ("stem_forward", (2, 8, 9, 10), 2, "rows aligned to four bytes"),
    ("stem_backward", (1, 15, 30, 24), 0, "several bands"),
    ("stem_backward", (2, 8, 9, 10), 2, "rows aligned to four bytes"),
    ("stem_conv_forward", (2, 33, 30, 3, 24), 0, "no workspace"),
    ("stem_conv_backward_weight", (2, 33, 30, 3, 24), 0, "several bands"),
    ("stem_conv_backward_weight", (1, 8, 230, 1, 33), 1, "two strips, the pitch padded"),
    ("stem_conv_backward_weight", (1, 8, 9, 4, 130), 0, "several columns of the grid"),
]

# (operator, sizes, changes)
VARIANTS: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("norm_relu_conv1x1_forward", (70, 8, 24), {"stats": None}),
    ("norm_relu_conv3x3_forward", (1, 9, 9, 8, 12), {"stats": None}),
    ("norm_relu_conv3x3_backward", (1, 9, 9, 8, 12), {"dweight": None}),
    ("norm_relu_conv3x3_backward", (3, 30, 20, 8, 12), {"accumulate": True}),
    ("norm_relu_conv1x1_backward", (70, 8, 24), {"dweight": None}),
    ("transition_forward", (1, 8, 8, 8, 12), {"stats": None}),
    ("transition_backward", (1, 8, 8, 8, 12), {"dweight": None}),
    ("stem_forward", (1, 8, 8, 8), {"stats": None}),
    ("channel_stats", (0, 8), {}),
    ("norm_relu_conv1x1_backward", (0, 8, 4), {}),
    ("norm_relu_conv3x3_forward", (0, 4, 4, 8, 4), {}),
    ("norm_relu_conv3x3_backward", (0, 4, 4, 8, 4), {}),
    ("transition_backward", (0, 4, 4, 8, 4), {}),
    ("stem_backward", (0, 4, 4, 8), {}),
    ("stem_conv_backward_weight", (0, 4, 4, 3, 8), {}),
]


def dtypes(op: str) -> list[torch.dtype]:
    if op in CUDA_NAMES:
        return [BF16, FP16]
    small = [BF16, FP32]
    return [*small, FP64] if op in ("channel_stats", "stem_forward", "stem_backward") else small


def planned(case: Case, device: Device, before: int) -> int:
    """What the plan says of this very call."""
    given = case.arguments
    x = given.get("x", given.get("stats", given.get("norm")))
    weight = given.get("weight", given.get("dweight"))
    optional = [given[name] for name in ("stats", "dweight") if name in given]
    return _module.cuda_workspace_bytes(
        case.op,
        list(x.shape),
        0 if weight is None else weight.shape[0],
        x.element_size(),
        device.multiprocessors,
        device.shared_bytes,
        row_alignment=math.gcd(16, before * x.element_size()),
        packed_weight=weight is not None and weight.dim() == 4 and weight.stride(1) == 1,
        accumulate=given.get("accumulate", False),
        optional_output=None not in optional,
    )


def allocated(case: Case, device: Device) -> int:
    emulator().call(case.op, *case.arguments.values(), device=device)
    return emulator().workspace_bytes


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: str(device.multiprocessors))
@pytest.mark.parametrize(("op", "sizes", "before", "reason"), SHAPES, ids=identifier)
def test_the_plan_is_what_is_allocated(
    op: str, sizes: tuple[int, ...], before: int, reason: str, device: Device
) -> None:
    for dtype in dtypes(op):
        case = make(op, sizes, dtype, before=before)
        assert allocated(case, device) == planned(case, device, before), dtype
        assert emulator().unused_workspace_bytes == 0, dtype


@pytest.mark.parametrize(("op", "sizes", "changes"), VARIANTS, ids=identifier)
def test_optional_outputs_modes_and_empty_inputs(
    op: str, sizes: tuple[int, ...], changes: dict[str, Any]
) -> None:
    for device in DEVICES:
        case = make(op, sizes, BF16, **changes)
        assert allocated(case, device) == planned(case, device, 0)


@pytest.mark.parametrize("op", ["norm_relu_conv3x3_forward", "norm_relu_conv3x3_backward"])
def test_a_weight_of_neighbouring_channels_is_not_copied(op: str) -> None:
    contiguous = make(op, (1, 9, 9, 24, 12), BF16)
    weight = contiguous.arguments["weight"].contiguous(memory_format=torch.channels_last)
    packed = make(op, (1, 9, 9, 24, 12), BF16, weight=weight)
    bytes_of = [allocated(case, DEVICES[0]) for case in (contiguous, packed)]
    assert bytes_of == [planned(case, DEVICES[0], 0) for case in (contiguous, packed)]
    assert bytes_of[0] - bytes_of[1] == 12 * 9 * 24 * 2


@pytest.mark.quick
def test_every_operator_is_there() -> None:
    assert {op for op, *_ in SHAPES} == set(CUDA_OPERATORS)
