"""The 3x3 convolution of bottlenecks whose rows are 128 channels apart, as those of growth rate 32
are: their panels are copied with constants for the rows' distances, by warps that share eights of
rows. Devices with few multiprocessors have each warp work on its pixels by itself."""

from __future__ import annotations

import pytest
import torch

from tests.support.emulators import check, emulator
from tests.support.identifiers import identifier
from tools.emulation import Device, Launch
from tools.op_cases import Case, make

pytestmark = pytest.mark.slow

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FORWARD, BACKWARD = "norm_relu_conv3x3_forward", "norm_relu_conv3x3_backward"
ONE, TWO = (Device(multiprocessors=n) for n in (1, 2))
LITTLE = Device(1, 99 << 10)

# (images, height, width, channels, outputs), dtype, device, reason
CASES = [
    ((3, 14, 14, 128, 32), BF16, ONE, "the network's own: nine eights of weight for each warp"),
    ((12, 7, 7, 128, 32), FP16, LITTLE, "tiles whose halo does not end with an eight of rows"),
    ((1, 56, 56, 128, 32), BF16, ONE, "a tile begins in the middle of the images' rows"),
    ((1, 40, 40, 128, 32), BF16, ONE, "one eight more for the first of five warps"),
    ((2, 28, 28, 128, 16), BF16, TWO, "half a panel of outputs"),
    ((2, 28, 28, 128, 48), FP16, TWO, "a whole panel of outputs and half of one"),
    ((2, 28, 28, 128, 20), BF16, TWO, "outputs that are no whole rows of the weight"),
    ((2, 28, 28, 96, 32), BF16, TWO, "fewer channels than a row has, whole panels"),
    ((2, 28, 28, 40, 32), BF16, TWO, "fewer channels than a row has, no whole panels"),
    ((1, 24, 66, 128, 32), FP16, ONE, "strips"),
    ((3, 14, 14, 128, 32), FP32, ONE, "TF32: panels of 16 channels"),
    ((12, 7, 7, 128, 24), FP32, LITTLE, "TF32: half a panel more"),
    ((1, 28, 28, 112, 40), FP32, ONE, "TF32: an uneven number of panels"),
]


def usual(op: str, sizes: tuple[int, ...], dtype: torch.dtype) -> Case:
    case = make(op, sizes, dtype, widths={"x": 128, "dx": 128})
    for name in {"weight", "dweight"} & case.arguments.keys():
        case.arguments[name] = case.arguments[name].contiguous(memory_format=torch.channels_last)
    return case


def launches(case: Case, device: Device) -> list[Launch]:
    return emulator().call(case.op, *case.arguments.values(), device=device)


@pytest.mark.parametrize(("sizes", "dtype", "device", "reason"), CASES, ids=identifier)
@pytest.mark.parametrize("op", [FORWARD, BACKWARD])
def test_usual_rows(
    op: str, sizes: tuple[int, ...], dtype: torch.dtype, device: Device, reason: str
) -> None:
    kernel = launches(usual(op, sizes, dtype), device)[0]
    assert kernel.kernel.endswith("false>"), f"{kernel.kernel}: each warp by itself was expected"
    if all(size % 16 == 0 for size in sizes[3:]):
        assert kernel.conflict_factor == 1.0
    check(emulator(), usual(op, sizes, dtype), device)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=identifier)
@pytest.mark.parametrize("op", [FORWARD, BACKWARD])
def test_the_same_bits_as_of_other_rows(op: str, dtype: torch.dtype) -> None:
    """How rows are copied changes nothing of what is computed from them."""
    results = []
    for width in (128, 144):
        torch.manual_seed(0)
        case = make(op, (3, 14, 14, 128, 32), dtype, widths={"x": width, "dx": width})
        launches(case, ONE)
        results.append({name: value.clone() for name, value in case.outputs.items()})
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
