"""Every operator on the CPU against its reference.

Activations are channel slices of larger buffers whose other channels hold NaN, so a read outside a
slice shows in the values and a write outside it in the buffer; so are the tables that an operator
fills. The results agree with the reference in float64 to what the dtype leaves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from densenet_efficient import reference
from densenet_efficient.bench.accuracy import relative_error
from densenet_efficient.ops import compiled
from tests.support.bad_calls import BAD_CALLS, assert_refused
from tests.support.identifiers import identifier
from tests.support.operator_shapes import EMPTY
from tools.op_cases import Case, make, reference_outputs

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Relative error against the reference on the same rounded input: what is left is the order of the
# sums and one rounding of what is stored.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 3e-6,
    torch.bfloat16: 6e-3,
    torch.float16: 1e-3,
}
CONSTANT = {"count": 0}  # statistics that do not depend on the input
UNCORRECTED = {"y": None, "correction": None}
ADDING = {"accumulate": True}

# (operator, sizes, changes): each is there for what is written next to it.
CASES: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("channel_stats", (1000, 37), {}),  # several tiles, channels that fill no vector
    ("channel_stats", (1, 5), {}),  # one row: variance zero
    ("norm_fold", (9,), {}),
    ("norm_fold", (9,), {"beta": None, "eps": 1e-3}),
    ("norm_fold", (9,), {"gamma": None, "beta": None}),  # without affine parameters
    ("norm_correction", (9,), {}),
    ("norm_correction", (9,), CONSTANT),
    ("norm_correction_apply", (131, 37), {}),  # a tail of rows
    ("norm_relu_conv1x1_forward", (997, 64, 128), {}),  # several tiles of unequal height
    ("norm_relu_conv1x1_forward", (61, 37, 19), {}),  # nothing fills a unit, a vector or a panel
    ("norm_relu_conv1x1_forward", (1, 1, 1), {}),  # one pixel, one channel
    ("norm_relu_conv1x1_forward", (50, 600, 48), {}),  # long reduction, a panel and a half
    ("norm_relu_conv1x1_backward", (997, 64, 128), {}),
    ("norm_relu_conv1x1_backward", (61, 37, 19), {}),
    ("norm_relu_conv1x1_backward", (1, 1, 1), {}),
    ("norm_relu_conv1x1_backward", (75, 600, 48), {}),  # columns in three blocks
    ("norm_relu_conv3x3_forward", (2, 14, 14, 128, 32), {}),  # DenseNet's bottleneck
    ("norm_relu_conv3x3_forward", (1, 37, 29, 20, 12), {}),  # bands of unequal height
    ("norm_relu_conv3x3_forward", (3, 1, 1, 5, 3), {}),  # only the middle tap meets the image
    ("norm_relu_conv3x3_forward", (1, 1, 9, 7, 1), {}),  # one image row, odd channels
    ("norm_relu_conv3x3_backward", (2, 14, 14, 128, 32), {}),
    ("norm_relu_conv3x3_backward", (1, 37, 29, 20, 12), ADDING),  # a plain layer
    ("norm_relu_conv3x3_backward", (3, 1, 1, 5, 3), UNCORRECTED),
    ("norm_relu_conv3x3_backward", (1, 9, 1, 7, 1), UNCORRECTED | ADDING),  # one image column
    ("norm_relu_conv3x3_backward", (1, 5, 6, 300, 16), ADDING),  # columns in two blocks
    ("transition_forward", (2, 14, 14, 64, 32), {}),
    ("transition_forward", (3, 7, 5, 19, 9), {}),  # the odd edges are dropped
    ("transition_forward", (2, 1, 1, 8, 4), {}),  # nothing is left after the pooling
    ("transition_backward", (2, 14, 14, 64, 32), {}),
    ("transition_backward", (3, 7, 5, 19, 9), {}),  # the odd edges get the correction alone
    ("transition_backward", (3, 7, 5, 19, 9), CONSTANT),
    ("transition_backward", (2, 1, 1, 8, 4), {}),
    ("stem_forward", (2, 16, 16, 64), {}),
    ("stem_forward", (3, 7, 5, 19), {}),  # windows over every edge
    ("stem_forward", (1, 1, 1, 3), {}),
    ("stem_backward", (2, 16, 16, 64), {}),
    ("stem_backward", (3, 7, 5, 19), {}),
    ("stem_backward", (3, 7, 6, 19), CONSTANT),
    ("stem_backward", (1, 1, 1, 3), CONSTANT),
    *(  # one and three dimensions; odd edges in every direction, and images of one pixel
        (op, (n, *spatial, 19, *channels), changes)
        for op, channels, changes in (
            ("norm_relu_conv3x3_forward", (7,), {}),
            ("norm_relu_conv3x3_backward", (7,), {}),
            ("norm_relu_conv3x3_backward", (7,), UNCORRECTED | ADDING),
            ("transition_forward", (9,), {}),
            ("transition_backward", (9,), {}),
            ("stem_forward", (), {}),
            ("stem_backward", (), {}),
        )
        for n, spatial in ((3, (7,)), (1, (400,)), (2, (5, 7, 6)), (3, (1, 1, 1)), (1, (8, 1, 9)))
    ),
]


def make_case(
    op: str, sizes: tuple[int, ...], dtype: torch.dtype, changes: Mapping[str, Any] | None = None
) -> Case:
    """Odd offsets everywhere; the weight of a 3x3 convolution and its gradient in channels-last
    memory, because any dense layout is accepted."""
    case = make(op, sizes, dtype, before=3, table_margin=2, **changes or {})
    if op == "norm_relu_conv3x3_backward":
        for name in ("weight", "dweight"):
            last = case.arguments[name]
            if last is not None:
                case.arguments[name] = last.movedim(1, -1).contiguous().movedim(-1, 1)
    return case


def run(case: Case) -> dict[str, Tensor]:
    getattr(compiled, case.op)(*case.arguments.values())
    case.check_outside()
    return case.outputs


@pytest.mark.parametrize("dtype", DTYPES, ids=identifier)
@pytest.mark.parametrize("op, sizes, changes", CASES, ids=identifier)
def test_agrees_with_the_reference(
    op: str, sizes: tuple[int, ...], changes: dict[str, Any], dtype: torch.dtype
) -> None:
    case = make_case(op, sizes, dtype, changes)
    inputs = case.inputs()
    ours = run(case)
    exact = reference_outputs(op, inputs)
    if "y" in ours:  # the statistics are those of the values as stored
        exact["stats"] = reference.channel_stats(ours["y"].double().flatten(0, -2))
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        assert value.shape == exact[name].shape, name
        assert value.isfinite().all(), f"{name} is not finite"
        error = relative_error(value, exact[name])
        assert error < TOLERANCE[dtype], f"{name}: relative error {error:.3g}"


@pytest.fixture
def thread_counts() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# One shape per operator with several groups of tiles; the sums of each dtype take the same path.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=identifier)
@pytest.mark.parametrize(
    "op, sizes",
    [
        ("channel_stats", (3000, 64)),
        ("norm_relu_conv1x1_forward", (1500, 96, 64)),
        ("norm_relu_conv1x1_backward", (1500, 300, 64)),
        ("norm_relu_conv3x3_forward", (3, 14, 14, 64, 32)),
        ("norm_relu_conv3x3_backward", (3, 14, 14, 64, 32)),
        ("transition_forward", (3, 30, 30, 64, 32)),
        ("transition_backward", (3, 30, 30, 64, 32)),
        ("stem_forward", (3, 30, 30, 32)),
        ("stem_backward", (3, 30, 30, 32)),
    ],
    ids=identifier,
)
@pytest.mark.usefixtures("thread_counts")
def test_independent_of_the_number_of_threads(
    op: str, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(1)  # the inputs' own sums
        torch.manual_seed(1)
        case = make_case(op, sizes, dtype)
        torch.set_num_threads(threads)
        results.append(run(case))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), f"{name} differs"


@pytest.mark.parametrize("dtype", DTYPES, ids=identifier)
@pytest.mark.parametrize("op, sizes", EMPTY, ids=identifier)
def test_empty_input_gives_zero_sums(op: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """No rows: statistics and sums are zero, not left as they were."""
    for name, value in run(make_case(op, sizes, dtype)).items():
        assert not value.numel() or (value == 0).all(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=identifier)
def test_shared_correction_accumulates(dtype: torch.dtype) -> None:
    """The shared correction, whose other columns and rows stay."""
    case = make_case("norm_correction", (9,), dtype, ADDING)
    shared = torch.randn(4, 12, dtype=dtype)
    case.arguments["correction"] = shared
    exact = shared.clone()
    exact[:, :9] += reference.norm_correction(
        case.arguments["dnorm"], case.arguments["norm"], case.arguments["count"], accumulate=True
    )
    compiled.norm_correction(*case.arguments.values())
    assert relative_error(shared, exact) < TOLERANCE[dtype]
    assert torch.equal(shared[:, 9:], exact[:, 9:])


def test_relu_mask_is_the_forwards_and_nan_passes() -> None:
    """Exact zeros are cut in both directions, as in eager PyTorch; a NaN is not hidden."""
    x = torch.tensor([[0.0, -1.0, 2.0, math.nan]], dtype=torch.float64)
    rows = [[1.0] * 4, [0.0] * 4, [0.0] * 4, [1.0] * 4, [0.0] * 4]
    norm = torch.tensor(rows, dtype=torch.float64)
    y = torch.empty(1, 4, dtype=torch.float64)
    compiled.norm_relu_conv1x1_forward(x[:, :3], norm[:, :3], torch.eye(4, 3).double(), y, None)
    assert y.tolist() == [[0.0, 0.0, 2.0, 0.0]]
    compiled.norm_relu_conv1x1_forward(x, norm, torch.eye(4).double(), y, None)
    assert y[0, 3].isnan()
    dx, dnorm = torch.zeros(1, 4, dtype=torch.float64), torch.empty(2, 4, dtype=torch.float64)
    plain = torch.tensor([[1.0] * 4, [0.0] * 4, [0.0] * 4, [0.0] * 4], dtype=torch.float64)
    ones = torch.ones(1, 4, dtype=torch.float64)
    compiled.norm_relu_conv1x1_backward(
        ones, ones, plain, x, norm, torch.eye(4).double(), dx, None, dnorm
    )
    assert dx.tolist() == [[0.0, 0.0, 1.0, 1.0]]
    assert dnorm[1].tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "op, sizes, absent",
    [
        ("norm_relu_conv1x1_forward", (50, 20, 8), "stats"),
        ("norm_relu_conv1x1_backward", (50, 20, 8), "dweight"),
        ("norm_relu_conv3x3_forward", (1, 6, 6, 20, 8), "stats"),
        ("norm_relu_conv3x3_backward", (1, 6, 6, 20, 8), "dweight"),
        ("transition_forward", (1, 6, 6, 20, 8), "stats"),
        ("transition_backward", (1, 6, 6, 20, 8), "dweight"),
        ("stem_forward", (1, 6, 6, 20), "stats"),
    ],
)
def test_results_that_are_not_wanted(op: str, sizes: tuple[int, ...], absent: str) -> None:
    """Without statistics or a weight gradient the other results have the same bits."""
    results = []
    for changes in ({}, {absent: None}):
        torch.manual_seed(1)
        results.append(run(make_case(op, sizes, torch.float32, changes)))
    everything, rest = results
    assert everything.keys() - rest.keys() == {absent}
    for name, value in rest.items():
        assert torch.equal(value, everything[name]), name


@pytest.mark.parametrize("name, arguments, message", BAD_CALLS)
def test_bad_input_is_named_and_nothing_is_written(
    name: str, arguments: tuple, message: str
) -> None:
    assert_refused(lambda op, *a: getattr(compiled, op)(*a), name, arguments, message)


def test_slices_of_one_buffer_may_lie_between_each_other() -> None:
    """As features do: x in front of y or after it, in the same rows or in others, and with a single
    row."""
    norm, weight = torch.rand(5, 6), torch.rand(5, 6)
    for rows in (1, 7):
        for first, second in ((0, 6), (5, 0), (2, 9), (8, 3)):
            for begin in (0, 1, rows):
                whole = torch.rand(2 * rows, 16)
                x = whole[:rows, first : first + 6]
                y = whole[begin : begin + rows, second : second + 5]
                expected = torch.empty(rows, 5)
                compiled.norm_relu_conv1x1_forward(x.clone(), norm, weight, expected, None)
                compiled.norm_relu_conv1x1_forward(x, norm, weight, y, None)
                assert torch.equal(y, expected)


def test_a_copy_on_write_output_has_memory_of_its_own() -> None:
    x = torch.rand(7, 6)
    y = torch._lazy_clone(x)
    before = x.clone()
    correction = torch.rand(4, 6)
    compiled.norm_correction_apply(y, x, correction)
    assert torch.equal(x, before) and not torch.equal(y, before)


def test_negative_views_are_read_and_not_written() -> None:
    case = make_case("norm_relu_conv1x1_forward", (9, 6, 5), torch.float32)
    arguments = {**case.arguments, "x": torch._neg_view(-case.arguments["x"].clone())}
    compiled.norm_relu_conv1x1_forward(*case.arguments.values())
    expected = case.arguments["y"].clone()
    case.arguments["y"].zero_()
    compiled.norm_relu_conv1x1_forward(*arguments.values())
    assert torch.equal(case.arguments["y"], expected)
    values = [v.nan_to_num() if isinstance(v, Tensor) else v for v in arguments.values()]
    values[list(arguments).index("y")] = torch._neg_view(torch.zeros(9, 5))
    message = "y is written and must not be a negative view"
    assert_refused(lambda op, *a: getattr(compiled, op)(*a), case.op, tuple(values), message)


@pytest.mark.parametrize("name", ["x", "y", "stats", "norm", "weight"])
def test_a_meta_tensor_among_real_ones_is_named(name: str) -> None:
    case = make_case("norm_relu_conv1x1_forward", (9, 6, 5), torch.float32)
    case.arguments[name] = case.arguments[name].to("meta")
    with pytest.raises(RuntimeError, match=r"must be on (cpu|meta) as \w+, got (cpu|meta)"):
        compiled.norm_relu_conv1x1_forward(*case.arguments.values())
    case.check_outside()
    for value in case.arguments.values():
        if isinstance(value, Tensor) and not value.is_meta and value.shape in ((9, 5), (2, 5)):
            assert value.isnan().all()
