"""Every CUDA kernel, run on the host under the address sanitizer: right to PyTorch's own
error, the same bits whatever the order of threads and blocks, no byte written outside its outputs.

Shapes are chosen for a reason each, which is given next to them. Features that are not written yet
hold NaN, and so do fresh outputs, workspaces and shared memory: what is read too early or too far
shows.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from densenet_efficient import reference
from densenet_efficient.bench.accuracy import relative_error
from densenet_efficient.ops import compiled
from tests.support.bad_calls import BAD_CALLS, assert_refused
from tests.support.emulators import check, emulator, run
from tests.support.identifiers import identifier
from tests.support.operator_shapes import EMPTY
from tools.op_cases import eager_outputs, make, reference_outputs

pytestmark = pytest.mark.slow

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# (operator, sizes, dtype, channels in front of each slice, reason)
Shape = tuple[str, tuple[int, ...], torch.dtype, int, str]
SHAPES: list[Shape] = [
    ("channel_stats", (784, 64), BF16, 0, "block 1 of DenseNet-121"),
    (
        "channel_stats",
        (100, 12),
        BF16,
        36,
        "a slice of growth rate 12: 24-byte rows, 8-byte vectors",
    ),
    ("channel_stats", (333, 40), FP16, 48, "growth rate 40, a tail of rows"),
    ("channel_stats", (50, 7), BF16, 3, "odd channels at an odd address: two-byte accesses"),
    ("channel_stats", (1, 3), FP32, 0, "one row: variance zero"),
    ("channel_stats", (70, 600), FP32, 8, "several groups of columns"),
    ("channel_stats", (45, 10), FP64, 0, "float64"),
    ("norm_fold", (1,), FP32, 0, "one channel"),
    ("norm_fold", (300,), FP32, 0, "several blocks, a tail"),
    ("norm_fold", (65,), FP64, 0, "float64"),
    ("norm_correction", (300,), FP32, 0, "several blocks, a tail"),
    ("norm_correction", (65,), FP64, 0, "float64"),
    ("norm_correction_apply", (500, 32), BF16, 64, "the produced slice of DenseNet-121"),
    ("norm_correction_apply", (130, 12), FP16, 24, "growth rate 12"),
    ("norm_correction_apply", (37, 48), BF16, 0, "growth rate 48, a tail of rows"),
    ("norm_correction_apply", (1, 5), FP32, 1, "one pixel, odd channels"),
    ("norm_correction_apply", (33, 520), FP64, 0, "float64, several groups of columns"),
    ("stem_forward", (2, 16, 20, 64), BF16, 0, "DenseNet-121's channels, even sizes"),
    ("stem_forward", (1, 15, 70, 96), FP16, 0, "odd height; wider than one tile"),
    ("stem_forward", (3, 1, 1, 8), BF16, 0, "one pixel: a window with one input"),
    ("stem_forward", (1, 9, 5, 7), BF16, 1, "odd everything: two-byte accesses"),
    ("stem_forward", (1, 2, 3, 24), FP32, 0, "smaller than a window"),
    ("stem_forward", (1, 8, 8, 6), FP64, 0, "float64"),
    ("stem_backward", (2, 16, 20, 64), BF16, 0, "DenseNet-121's channels, even sizes"),
    ("stem_backward", (1, 15, 70, 96), FP16, 0, "odd height; columns shared between tiles"),
    ("stem_backward", (3, 1, 1, 8), BF16, 0, "one pixel"),
    ("stem_backward", (1, 9, 5, 7), BF16, 1, "odd everything"),
    ("stem_backward", (1, 40, 6, 32), FP32, 0, "several bands: rows shared between blocks"),
    ("stem_backward", (1, 8, 9, 6), FP64, 0, "float64"),
    ("transition_forward", (2, 12, 12, 256, 128), BF16, 0, "transition 1 of DenseNet-121"),
    ("transition_forward", (3, 7, 9, 216, 108), BF16, 0, "BC-100-12: tails of channels, odd edges"),
    ("transition_forward", (1, 8, 6, 48, 150), FP16, 12, "two warps side by side; shifted slice"),
    ("transition_forward", (1, 4, 4, 40, 300), BF16, 0, "several columns of the grid"),
    ("transition_forward", (1, 2, 2, 5, 3), FP16, 3, "one window, odd everything"),
    ("transition_forward", (2, 1, 5, 16, 8), BF16, 0, "no window at all"),
    ("transition_forward", (2, 12, 12, 256, 128), FP32, 0, "TF32: transition 1 of DenseNet-121"),
    ("transition_forward", (1, 7, 9, 54, 150), FP32, 2, "TF32: 8-byte copies, pairs of warps"),
    ("transition_forward", (1, 2, 2, 5, 3), FP32, 3, "TF32: one window, channel by channel"),
    ("transition_backward", (2, 12, 12, 256, 128), BF16, 0, "transition 1 of DenseNet-121"),
    ("transition_backward", (3, 7, 9, 216, 108), BF16, 0, "BC-100-12: tails, odd edges"),
    ("transition_backward", (1, 8, 6, 48, 150), FP16, 12, "more than 128 outputs; shifted slice"),
    ("transition_backward", (1, 2, 2, 5, 3), FP16, 3, "one window, odd everything"),
    ("transition_backward", (2, 1, 5, 16, 8), BF16, 0, "no window: dx is zero"),
    ("transition_backward", (2, 12, 12, 256, 128), FP32, 0, "TF32: transition 1 of DenseNet-121"),
    ("transition_backward", (1, 7, 9, 54, 150), FP32, 2, "TF32: 8-byte copies, many outputs"),
    ("transition_backward", (1, 2, 2, 5, 3), FP32, 3, "TF32: one window, channel by channel"),
    ("norm_relu_conv1x1_forward", (200, 96, 128), BF16, 0, "block 1 of DenseNet-121"),
    ("norm_relu_conv1x1_forward", (77, 36, 48), BF16, 0, "BC-100-12: tails of channels and rows"),
    ("norm_relu_conv1x1_forward", (40, 24, 192), FP16, 4, "growth rate 48: two warps side by side"),
    ("norm_relu_conv1x1_forward", (33, 20, 200), BF16, 0, "several columns of the grid"),
    ("norm_relu_conv1x1_forward", (1, 3, 5), FP16, 1, "one pixel, odd everything"),
    ("norm_relu_conv1x1_backward", (200, 96, 128), BF16, 0, "block 1 of DenseNet-121"),
    ("norm_relu_conv1x1_backward", (77, 36, 48), BF16, 0, "BC-100-12: tails of channels and rows"),
    ("norm_relu_conv1x1_backward", (70, 24, 160), FP16, 4, "growth rate 40"),
    ("norm_relu_conv1x1_backward", (40, 24, 192), BF16, 0, "growth rate 48"),
    ("norm_relu_conv1x1_backward", (33, 20, 200), FP16, 0, "more outputs than one call takes"),
    ("norm_relu_conv1x1_backward", (1, 3, 5), BF16, 1, "one pixel, odd everything"),
    ("norm_relu_conv3x3_forward", (2, 8, 8, 128, 32), BF16, 0, "DenseNet-121's bottleneck"),
    ("norm_relu_conv3x3_forward", (1, 9, 7, 48, 12), FP16, 12, "BC-100-12; odd sizes"),
    ("norm_relu_conv3x3_forward", (1, 5, 70, 24, 12), BF16, 0, "wider than a tile: strips"),
    ("norm_relu_conv3x3_forward", (2, 6, 5, 20, 40), BF16, 0, "growth rate 40, a plain layer"),
    ("norm_relu_conv3x3_forward", (1, 1, 1, 3, 5), FP16, 1, "one pixel, odd everything"),
    ("norm_relu_conv3x3_backward", (2, 8, 8, 128, 32), BF16, 0, "DenseNet-121's bottleneck"),
    ("norm_relu_conv3x3_backward", (1, 9, 7, 48, 12), FP16, 12, "BC-100-12; odd sizes"),
    ("norm_relu_conv3x3_backward", (1, 5, 70, 24, 12), BF16, 0, "wider than a tile: strips"),
    ("norm_relu_conv3x3_backward", (2, 6, 5, 20, 48), BF16, 0, "growth rate 48"),
    ("norm_relu_conv3x3_backward", (1, 1, 1, 3, 5), FP16, 1, "one pixel, odd everything"),
]

# Optional arguments and modes: (operator, sizes, dtype, changes)
VARIANTS: list[tuple[str, tuple[int, ...], torch.dtype, dict[str, Any]]] = [
    ("norm_fold", (33,), FP32, {"gamma": None, "beta": None}),
    ("norm_correction", (33,), FP32, {"count": 0}),
    ("stem_forward", (1, 8, 8, 16), BF16, {"stats": None}),
    ("stem_backward", (1, 8, 8, 16), BF16, {"count": 0}),
    ("transition_forward", (1, 6, 6, 32, 16), BF16, {"stats": None}),
    ("transition_backward", (1, 6, 6, 32, 16), BF16, {"count": 0, "dweight": None}),
    ("norm_relu_conv1x1_forward", (40, 32, 16), BF16, {"stats": None}),
    ("norm_relu_conv1x1_backward", (40, 32, 16), BF16, {"dweight": None}),
    ("norm_relu_conv3x3_forward", (1, 6, 6, 32, 16), BF16, {"stats": None}),
    ("norm_relu_conv3x3_backward", (1, 6, 6, 32, 16), BF16, {"y": None, "correction": None}),
    ("norm_relu_conv3x3_backward", (1, 6, 6, 32, 16), FP16, {"accumulate": True, "dweight": None}),
    ("norm_relu_conv3x3_backward", (1, 6, 6, 32, 16), FP32, {"y": None, "correction": None}),
    ("norm_relu_conv3x3_backward", (1, 6, 6, 32, 16), FP32, {"accumulate": True, "dweight": None}),
    ("norm_relu_conv1x1_backward", (40, 32, 16), FP32, {"dweight": None}),
]


@pytest.mark.parametrize(
    ("op", "sizes", "dtype", "before"), [shape[:4] for shape in SHAPES], ids=identifier
)
def test_kernel(
    op: str,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    before: int,
) -> None:
    check(emulator(), make(op, sizes, dtype, before=before))


@pytest.mark.parametrize(("op", "sizes", "dtype", "changes"), VARIANTS, ids=identifier)
def test_variant(
    op: str,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    changes: dict[str, Any],
) -> None:
    check(emulator(), make(op, sizes, dtype, **changes))


@pytest.mark.parametrize(("op", "sizes"), EMPTY, ids=identifier)
def test_empty_input_gives_zero_sums(op: str, sizes: tuple[int, ...]) -> None:
    case = make(op, sizes, BF16)
    emulator().call(op, *case.arguments.values())
    for name, value in case.outputs.items():
        assert not value.numel() or (value == 0).all(), name


def test_shared_correction_accumulates() -> None:
    case = make("norm_correction", (20,), FP32, accumulate=True)
    shared = torch.randn(4, 32)
    case.arguments["correction"] = shared
    before = shared.clone()
    emulator().call(case.op, *case.arguments.values())
    added = reference.norm_correction(case.arguments["dnorm"], case.arguments["norm"], 49, True)
    torch.testing.assert_close(shared[:, :20], before[:, :20] + added)
    assert torch.equal(shared[:, 20:], before[:, 20:])


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=identifier)
def test_dithering_is_the_cpus(dtype: torch.dtype) -> None:
    """The same noise for the same element: the bits differ only where the two compilers fuse other
    multiply-adds."""
    case = make("norm_correction_apply", (300, 40), dtype, before=8)
    expected = {name: value.clone() for name, value in case.inputs().items()}
    compiled.norm_correction_apply(*expected.values())
    result = run(emulator(), case, seed=0)["dx"]
    assert (result == expected["dx"]).double().mean() > 0.999


@pytest.mark.parametrize("name, arguments, message", BAD_CALLS)
def test_bad_input_is_named_and_nothing_is_written(
    name: str, arguments: tuple, message: str
) -> None:
    assert_refused(emulator().call, name, arguments, message)


@pytest.mark.parametrize("op", ["norm_relu_conv3x3", "transition", "stem"])
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_images_have_two_dimensions(op: str, way: str) -> None:
    sizes = (1, 4, 4, 4, 6) if op == "stem" else (1, 4, 4, 4, 6, 5)
    case = make(f"{op}_{way}", sizes, FP32)
    arguments = tuple(case.arguments.values())
    message = "x must have 4 dimensions, got shape"
    with pytest.raises(RuntimeError, match=f"{case.op}: {message}"):
        emulator().call(case.op, *arguments)


def test_the_convolutions_refuse_float64_before_they_write() -> None:
    for op, sizes in (
        ("norm_relu_conv1x1_forward", (9, 6, 5)),
        ("transition_forward", (1, 4, 4, 6, 5)),
    ):
        case = make(op, sizes, FP64)
        message = "x must be bfloat16, float16 or float32, got float64"
        arguments = tuple(case.arguments.values())
        for value in arguments:
            if isinstance(value, Tensor):
                value.nan_to_num_(7.0)
        assert_refused(emulator().call, op, arguments, message)


@pytest.mark.parametrize(("dtype", "bound"), [(BF16, 0.85), (FP32, 0.95)], ids=identifier)
def test_a_pooled_operand_keeps_what_its_rounding_leaves(dtype: torch.dtype, bound: float) -> None:
    """Rounded once and alone, it would err 1.1 times as much as the mean of four rounded pixels."""
    case = make("transition_forward", (2, 12, 12, 256, 128), dtype)
    inputs = case.inputs()
    y = run(emulator(), case, seed=0)["y"]
    truth = reference_outputs(case.op, dict(inputs))["y"]
    framework = relative_error(eager_outputs(case.op, inputs)["y"], truth)
    assert relative_error(y, truth) <= bound * framework


@pytest.mark.parametrize("value", [math.inf, 60000.0], ids=["infinity", "overflow"])
def test_pooling_what_is_not_finite_gives_what_the_framework_gives(value: float) -> None:
    """The rest of a mean that rounds to infinity is nothing, not its opposite."""
    case = make("transition_forward", (1, 4, 4, 8, 4), FP16, stats=None)
    case.arguments["x"][0, :2, :2, 3] = value
    case.arguments["norm"][:, 3] = torch.tensor([2.0, 2.0, 0.0, 1.0, 2.0])
    expected = eager_outputs(case.op, case.inputs())["y"]
    y = run(emulator(), case, seed=0)["y"]
    assert expected.isinf().any() and torch.equal(y.isfinite(), expected.isfinite())
    assert torch.equal(y[~y.isfinite()], expected[~y.isfinite()])
