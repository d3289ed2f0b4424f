"""The CUDA kernels of the stem's convolution on the host: sizes, layouts and dtypes of images, what
is refused, and what is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from densenet_efficient.ops import fallback
from tests.support.bad_calls import assert_refused
from tests.support.emulators import check, emulator, run
from tests.support.identifiers import identifier
from tests.support.kernel_check import compare
from tools.emulation import Device
from tools.op_cases import Case, make, reference_outputs

pytestmark = pytest.mark.slow

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OPERATORS = ("stem_conv_forward", "stem_conv_backward_weight")

# (sizes, dtype, channels in front of each slice, reason)
SHAPES = [
    ((2, 32, 40, 3, 64), BF16, 0, "DenseNet-121's channels, several tiles"),
    ((1, 20, 230, 3, 96), FP16, 0, "DenseNet-161's; wider than a tile: strips"),
    ((2, 9, 33, 3, 64), BF16, 0, "odd sizes: a group of pixels is cut"),
    ((1, 5, 3, 3, 16), FP16, 0, "smaller than a window"),
    ((3, 1, 1, 3, 64), BF16, 0, "one pixel"),
    ((1, 22, 24, 1, 64), BF16, 0, "grey images"),
    ((2, 15, 16, 2, 48), FP16, 0, "two channels"),
    ((1, 17, 19, 4, 96), BF16, 0, "four channels: a window's row ends in the middle of eight"),
    ((1, 12, 12, 3, 200), BF16, 0, "several columns of the grid"),
    ((1, 8, 10, 3, 5), FP16, 1, "odd outputs at an odd address: two-byte stores"),
    ((1, 8, 10, 3, 44), BF16, 4, "eight-byte rows"),
]


@pytest.mark.parametrize(
    ("sizes", "dtype", "before"), [shape[:3] for shape in SHAPES], ids=identifier
)
@pytest.mark.parametrize("op", OPERATORS)
def test_kernel(op: str, sizes: tuple[int, ...], dtype: torch.dtype, before: int) -> None:
    check(emulator(), make(op, sizes, dtype, before=before))


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize(
    "device", [Device(2, 99 << 10), Device(132)], ids=["little shared memory", "many processors"]
)
@pytest.mark.parametrize("sizes", [(2, 34, 226, 3, 64), (1, 20, 20, 4, 96)], ids=identifier)
def test_other_devices(op: str, device: Device, sizes: tuple[int, ...]) -> None:
    case = make(op, sizes, BF16)
    inputs = case.inputs()
    launches = emulator().call(op, *case.arguments.values(), seed=4, device=device)
    assert max(launch.shared_bytes for launch in launches) <= device.shared_bytes
    compare(op, inputs, case.outputs)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels first": lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1),
    "channels last": lambda x: x.contiguous(),
    "columns first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "float32, channels first": lambda x: x.float().movedim(-1, 1).contiguous().movedim(1, -1),
    "float32, channels last": lambda x: x.float().contiguous(),
    "one image, several times": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("C", [1, 3])
def test_images_of_any_layout(op: str, layout: str, C: int) -> None:
    case = make(op, (2, 11, 14, C, 24), BF16)
    x = case.arguments["x"].contiguous()
    expected = run(
        emulator(), make_with(case, x=x[:1].expand(x.shape) if "one" in layout else x), 0
    )
    got = run(emulator(), make_with(case, x=LAYOUTS[layout](x)), seed=5)
    assert_same(got, expected)


def test_a_weight_of_any_layout_or_in_float32() -> None:
    case = make("stem_conv_forward", (1, 9, 12, 3, 24), FP16)
    weight = case.arguments["weight"]
    expected = run(emulator(), case, seed=0)
    for other in (
        weight.contiguous(memory_format=torch.channels_last),
        weight.float(),
        weight.flip(0).flip(0).transpose(2, 3).contiguous().transpose(2, 3),
    ):
        assert_same(run(emulator(), make_with(case, weight=other), seed=1), expected)


def test_a_float32_operand_is_rounded_once() -> None:
    for op in OPERATORS:
        case = make(op, (1, 11, 14, 3, 24), BF16)
        x = torch.randn(case.arguments["x"].shape)
        given = make_with(case, x=x)
        rounded = {**given.inputs(), "x": x.bfloat16()}
        compare(op, rounded, run(emulator(), given, seed=2))


@pytest.mark.parametrize("C", [1, 3])
def test_a_channels_last_gradient(C: int) -> None:
    case = make("stem_conv_backward_weight", (1, 9, 12, C, 24), BF16)
    expected = run(emulator(), case, seed=0)["dweight"]
    last = torch.full_like(expected, math.nan, memory_format=torch.channels_last)
    assert torch.equal(run(emulator(), make_with(case, dweight=last), seed=1)["dweight"], expected)


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("size", [(0, 4, 4), (2, 0, 4), (1, 4, 0)], ids=identifier)
def test_no_pixels(op: str, size: tuple[int, ...]) -> None:
    case = make(op, (*size, 3, 8), BF16)
    emulator().call(op, *case.arguments.values())
    for value in case.outputs.values():
        assert (value == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("C", [1, 2, 3, 4])
def test_what_is_not_finite_stays_in_its_windows(value: float, C: int) -> None:
    """The padding of a window's rows meets the next pixels, and weights of zero."""
    case = make("stem_conv_forward", (1, 15, 40, C, 8), BF16)
    for channel in range(C):
        case.arguments["x"][0, 6, 19 + channel, channel] = value
    expected = reference_outputs(case.op, case.inputs())["y"]
    y = run(emulator(), case, seed=0)["y"]
    assert torch.equal(y.isfinite(), expected.isfinite()) and not y.isfinite().all()


@pytest.mark.parametrize("C", [1, 3])
def test_pixels_past_the_end_of_a_row_are_in_no_gradient(C: int) -> None:
    """A row's last pixel is in fewer windows than it would be, were the row longer."""
    case = make("stem_conv_backward_weight", (1, 9, 12, C, 8), BF16)
    case.arguments["x"][0, 4, 11] = math.inf
    case.arguments["dy"].abs_().add_(1)
    expected = reference_outputs(case.op, case.inputs())["dweight"]
    got = run(emulator(), case, seed=0)["dweight"]
    assert torch.equal(got.isfinite(), expected.isfinite()) and got.isfinite().any()


def images(C: int = 3, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(2, 8, 8, C, dtype=dtype)


WEIGHT, Y = torch.zeros(5, 3, 7, 7, dtype=BF16), torch.zeros(2, 4, 4, 5, dtype=BF16)
BAD_CALLS: list[tuple[str, tuple, str]] = [
    ("stem_conv_forward", (images()[0], WEIGHT, Y), "x must have 4 dimensions, got shape"),
    ("stem_conv_forward", (images(5), WEIGHT, Y), "x must have at most 4 channels, got shape"),
    ("stem_conv_forward", (images(), WEIGHT[..., :3, :3], Y), r"weight must have shape \[5, 3, 7"),
    ("stem_conv_forward", (images(), WEIGHT, Y[:, :3]), r"y must have shape \[2, 4, 4, 5\]"),
    (
        "stem_conv_forward",
        (images(), WEIGHT, Y.float()),
        "y must be bfloat16 or float16, got float",
    ),
    ("stem_conv_forward", (images(dtype=FP16), WEIGHT, Y), "x must be bfloat16 as y or float32"),
    ("stem_conv_forward", (images(), WEIGHT.half(), Y), "weight must be bfloat16 as y or float32"),
    (
        "stem_conv_forward",
        (images(), WEIGHT, Y.movedim(-1, 1).contiguous().movedim(1, -1)),
        "y must be channels last",
    ),
    ("stem_conv_backward_weight", (Y, images(), WEIGHT), "dweight must be float32, got bfloat16"),
    (
        "stem_conv_backward_weight",
        (Y, images(), WEIGHT.float().transpose(2, 3)),
        "dweight must be contiguous or channels last",
    ),
    (
        "stem_conv_backward_weight",
        (Y[:, 1:], images(), WEIGHT.float()),
        r"dy must have shape \[2, 4, 4, 5\]",
    ),
    (
        "stem_conv_backward_weight",
        (Y.float(), images(), WEIGHT.float()),
        "dy must be bfloat16 or float16, got float32",
    ),
]


@pytest.mark.parametrize("name, arguments, message", BAD_CALLS)
def test_bad_input_is_named_and_nothing_is_written(
    name: str, arguments: tuple, message: str
) -> None:
    assert_refused(emulator().call, name, arguments, message)


def test_what_is_written_is_apart() -> None:
    shared = torch.zeros(640, dtype=BF16)
    x, y = shared[-384:].view(2, 8, 8, 3), shared[:256].view(2, 4, 4, 8)
    weight = torch.zeros(8, 3, 7, 7, dtype=BF16)
    emulator().call("stem_conv_forward", x, weight, y)
    with pytest.raises(RuntimeError, match="y is written and must not share memory with x"):
        emulator().call("stem_conv_forward", shared[-385:-1].view(2, 8, 8, 3), weight, y)


@pytest.mark.quick
@pytest.mark.parametrize("op", OPERATORS)
def test_the_fallback_is_the_frameworks(op: str) -> None:
    for dtype in (BF16, FP16, FP32, torch.float64):
        case = make(op, (2, 11, 14, 3, 24), dtype)
        inputs = case.inputs()
        getattr(fallback, op)(*case.arguments.values())
        compare(op, inputs, case.outputs)


def make_with(case: Case, **changes: Tensor) -> Case:
    """The case with some arguments changed, of which slices of buffers are its own."""
    return Case(case.op, case.arguments | changes, case.written, case.buffers)


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
