"""Every operator on a GPU, with the cases of the host emulation and with the real shapes of
DenseNet-121 and BC-100-12: right to PyTorch's own error, the same bits twice, nothing written
outside the outputs. Run by `make gpu-check`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from densenet_efficient.ops import compiled
from densenet_efficient.ops.interface import CUDA_NAMES, NAMES
from tests.support.identifiers import identifier
from tests.support.kernel_check import compare
from tools.op_cases import Case, make

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# (operator, sizes, dtype, channels in front of each slice)
SMALL = [
    ("channel_stats", (333, 40), BF16, 48),
    ("norm_fold", (300,), FP32, 0),
    ("norm_correction", (300,), FP32, 0),
    ("norm_correction_apply", (130, 12), FP16, 24),
    ("stem_forward", (1, 15, 70, 96), FP16, 0),
    ("stem_backward", (1, 15, 70, 96), BF16, 0),
    ("transition_forward", (3, 7, 9, 216, 108), BF16, 0),
    ("transition_backward", (3, 7, 9, 216, 108), FP16, 0),
    ("norm_relu_conv1x1_forward", (77, 36, 48), BF16, 0),
    ("norm_relu_conv1x1_forward", (1, 3, 5), FP16, 1),
    ("norm_relu_conv1x1_forward", (77, 36, 44), BF16, 0),
    ("norm_relu_conv1x1_backward", (77, 36, 48), BF16, 0),
    ("norm_relu_conv1x1_backward", (70, 24, 160), FP16, 4),
    ("norm_relu_conv3x3_forward", (1, 9, 7, 48, 12), FP16, 12),
    ("norm_relu_conv3x3_forward", (1, 5, 70, 24, 12), BF16, 0),
    ("norm_relu_conv3x3_backward", (1, 9, 7, 48, 12), BF16, 12),
    ("norm_relu_conv3x3_backward", (2, 6, 5, 20, 48), FP16, 0),
    ("transition_forward", (1, 7, 9, 54, 150), FP32, 2),
    ("transition_forward", (1, 7, 9, 54, 150), FP32, 0),
    ("transition_backward", (3, 7, 9, 216, 108), FP32, 0),
    ("norm_relu_conv1x1_forward", (77, 36, 129), FP32, 2),
    ("norm_relu_conv1x1_forward", (77, 36, 30), FP32, 0),
    ("norm_relu_conv1x1_backward", (77, 36, 129), FP32, 4),
    ("norm_relu_conv3x3_forward", (1, 9, 7, 48, 12), FP32, 12),
    ("norm_relu_conv3x3_forward", (1, 5, 70, 24, 13), FP32, 0),
    ("norm_relu_conv3x3_backward", (2, 6, 5, 22, 48), FP32, 0),
    ("stem_conv_forward", (2, 9, 33, 3, 64), BF16, 0),
    ("stem_conv_forward", (1, 20, 230, 4, 96), FP16, 4),
    ("stem_conv_backward_weight", (2, 9, 33, 3, 64), BF16, 0),
    ("stem_conv_backward_weight", (1, 20, 230, 1, 96), FP16, 4),
]
REAL = [
    ("channel_stats", (16 * 56 * 56, 64), BF16, 0),
    ("stem_forward", (4, 112, 112, 64), BF16, 0),
    ("stem_backward", (4, 112, 112, 64), BF16, 0),
    ("transition_forward", (4, 56, 56, 256, 128), BF16, 0),
    ("transition_backward", (4, 56, 56, 256, 128), BF16, 0),
    ("norm_relu_conv1x1_forward", (4 * 56 * 56, 224, 128), BF16, 0),
    ("norm_relu_conv1x1_backward", (4 * 56 * 56, 224, 128), BF16, 0),
    ("norm_relu_conv1x1_forward", (16 * 7 * 7, 992, 128), BF16, 0),
    ("norm_relu_conv1x1_backward", (16 * 7 * 7, 992, 128), FP16, 0),
    ("norm_relu_conv3x3_forward", (4, 56, 56, 128, 32), BF16, 0),
    ("norm_relu_conv3x3_backward", (4, 56, 56, 128, 32), BF16, 0),
    ("norm_relu_conv1x1_forward", (16 * 32 * 32, 204, 48), BF16, 0),
    ("norm_relu_conv1x1_backward", (16 * 32 * 32, 204, 48), BF16, 0),
    ("norm_relu_conv3x3_forward", (16, 32, 32, 48, 12), BF16, 0),
    ("norm_relu_conv3x3_backward", (16, 32, 32, 48, 12), FP16, 0),
    ("transition_forward", (4, 56, 56, 256, 128), FP32, 0),
    ("transition_backward", (4, 56, 56, 256, 128), FP32, 0),
    ("norm_relu_conv1x1_forward", (4 * 56 * 56, 224, 128), FP32, 0),
    ("norm_relu_conv1x1_backward", (4 * 56 * 56, 224, 128), FP32, 0),
    ("norm_relu_conv3x3_forward", (4, 56, 56, 128, 32), FP32, 0),
    ("norm_relu_conv3x3_backward", (4, 56, 56, 128, 32), FP32, 0),
    ("stem_conv_forward", (16, 224, 224, 3, 64), BF16, 0),
    ("stem_conv_backward_weight", (16, 224, 224, 3, 64), BF16, 0),
    ("stem_conv_forward", (4, 224, 224, 3, 96), FP16, 0),
    ("stem_conv_backward_weight", (4, 224, 224, 3, 96), FP16, 0),
    ("stem_conv_forward", (2, 321, 500, 1, 64), BF16, 0),
    ("stem_conv_backward_weight", (2, 321, 500, 1, 64), BF16, 0),
]


def on_gpu(case: Case) -> tuple[dict[str, object], list[tuple[Tensor, slice]]]:
    """The case's arguments on the GPU, slices of wider buffers as they were; those buffers."""
    wide = {part.data_ptr(): (whole, part) for whole, part in case.buffers if part.numel()}
    arguments: dict[str, object] = {}
    buffers = []
    for name, value in case.arguments.items():
        if isinstance(value, Tensor) and value.numel() and value.data_ptr() in wide:
            whole, part = wide[value.data_ptr()]
            first = (part.data_ptr() - whole.data_ptr()) // whole.element_size()
            columns = slice(first, first + part.shape[-1])
            buffers.append((whole.cuda(), columns))
            arguments[name] = buffers[-1][0][..., columns]
        else:
            arguments[name] = value.cuda() if isinstance(value, Tensor) else value
    return arguments, buffers


def run(case: Case) -> dict[str, Tensor]:
    arguments, buffers = on_gpu(case)
    getattr(compiled, case.op)(*arguments.values())
    for whole, columns in buffers:
        whole = whole.clone()
        whole[..., columns] = math.nan
        assert whole.isnan().all(), f"{case.op} wrote outside a slice"
    return {name: arguments[name].cpu() for name in case.written}


def check(case: Case) -> None:
    inputs = case.inputs()
    first, second = run(case), run(case)
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name} differs between two runs"
    compare(case.op, inputs, first)


@pytest.mark.sanitize
@pytest.mark.parametrize(("op", "sizes", "dtype", "before"), SMALL, ids=identifier)
def test_small(op: str, sizes: tuple[int, ...], dtype: torch.dtype, before: int) -> None:
    check(make(op, sizes, dtype, before=before))


@pytest.mark.parametrize(("op", "sizes", "dtype", "before"), REAL, ids=identifier)
def test_real_shape(op: str, sizes: tuple[int, ...], dtype: torch.dtype, before: int) -> None:
    check(make(op, sizes, dtype, before=before))


def test_an_empty_batch_is_left_alone() -> None:
    check_shapes = [("channel_stats", (0, 12)), ("norm_relu_conv1x1_forward", (0, 24, 48))]
    for op, sizes in check_shapes:
        results = run(make(op, sizes, BF16))
        assert all(value.numel() == 0 or not value.any() for value in results.values())


def test_operators_are_registered_for_cuda() -> None:
    for name in (*NAMES, *CUDA_NAMES):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"densenet_efficient::{name}", "CUDA")
