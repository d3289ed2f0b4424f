"""A block that runs by a program does what it does operator by operator, to the last bit."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from densenet_efficient import EfficientDenseBlock
from densenet_efficient.core import replay
from densenet_efficient.ops import library

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(not library.is_available(), reason="the compiled library is not built"),
]


def block_of(**options: Any) -> EfficientDenseBlock:
    torch.manual_seed(0)
    return EfficientDenseBlock(3, 8, 2, 4, 0.0, **options)


def step(
    block: Any, shape: Sequence[int] = (2, 8, 5, 5), autocast: bool = False, **form: Any
) -> list[Tensor]:
    """The output, all gradients and all buffers of a training step."""
    generator = torch.Generator().manual_seed(1)
    dtype = torch.float32 if autocast else next(block.parameters()).dtype
    x = torch.randn(shape, generator=generator).to(dtype).to(**form).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = block(x)
    inputs = [x, *(p for p in block.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(y.float().square().sum(), inputs)
    return [y.detach(), *grads, *(buffer.clone() for buffer in block.buffers())]


class Counted:
    """Programs as they are recorded and run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recorded: list[bool] = []
        self.runs = 0
        record, run = replay.record, replay.Program.run

        def counted_record(*given: Any) -> Any:
            program = record(*given)
            self.recorded.append(program is not None)
            return program

        def counted_run(program: Any, given: Any) -> Any:
            found = run(program, given)
            self.runs += found is not None
            return found

        monkeypatch.setattr(replay, "record", counted_record)
        monkeypatch.setattr(replay.Program, "run", counted_run)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def frozen(block: Any) -> Any:
    block.denselayer2.conv1.weight.requires_grad_(False)
    block.denselayer3.norm2.requires_grad_(False)
    return block


CASES: dict[str, Any] = {
    "float32": (block_of, {}),
    "float64": (lambda **o: block_of(**o).double(), {}),
    "bfloat16": (lambda **o: block_of(**o).bfloat16(), {}),
    "float16": (lambda **o: block_of(**o).half(), {}),
    "autocast": (block_of, {"autocast": True}),
    "channels last": (
        lambda **o: block_of(**o).to(memory_format=torch.channels_last),
        {"memory_format": torch.channels_last},
    ),
    "plain layers": (lambda **o: block_of(bottleneck=False, **o), {}),
    "one dimension": (lambda **o: block_of(dims=1, **o), {"shape": (2, 8, 5)}),
    "three dimensions": (lambda **o: block_of(dims=3, **o), {"shape": (2, 8, 3, 4, 5)}),
    "new channels": (lambda **o: block_of(with_input=False, **o), {}),
    "frozen": (lambda **o: frozen(block_of(**o)), {}),
}


@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize("case", CASES)
def test_a_program_does_what_was_recorded(
    case: str, memory: str, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, form = CASES[case]
    replayed = make(memory=memory)
    found = [step(replayed, **form) for _ in range(3)]
    assert counted.recorded == [True, True] and counted.runs == 4
    monkeypatch.setattr(replay, "record", lambda *_: None)
    direct = make(memory=memory)
    for tensors in found:
        for one, other in zip(tensors, step(direct, **form), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
            assert one.stride() == other.stride()


def test_shapes_and_layouts_have_programs_of_their_own(counted: Counted) -> None:
    block = block_of()
    step(block)
    small, large = (2, 8, 4, 4), (3, 8, 6, 5)
    running = len(list(block.buffers()))
    expected = {shape: step(block_of(), shape)[:-running] for shape in (small, large)}
    for shape in (small, large, small, large):
        for one, other in zip(
            step(block, shape)[: len(expected[shape])], expected[shape], strict=True
        ):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert len(counted.recorded) == 4 and counted.runs == 4
    weight = block.denselayer1.conv2.weight
    weight.data = weight.data.to(memory_format=torch.channels_last)
    step(block, small)
    step(block, small)
    assert len(counted.recorded) == 6 and counted.runs == 6


def test_shapes_that_do_not_come_again_are_not_recorded(counted: Counted) -> None:
    block = block_of()
    for width in range(2, 2 + replay.MOST_PROGRAMS):
        step(block, (2, 8, 4, width))
    assert not counted.recorded


def test_layouts_that_alternate_are_recorded_once(counted: Counted) -> None:
    block = block_of()
    for memory_format in 3 * (torch.contiguous_format, torch.channels_last):
        step(block, memory_format=memory_format)
    assert counted.recorded == 3 * [True] and counted.runs == 9


@pytest.mark.parametrize(
    "options", [{"dilation": 2}, {"drop_rate": 0.5}], ids=["PyTorch's convolution", "dropout"]
)
def test_what_no_program_holds_runs_as_it_is_written(options: Any, counted: Counted) -> None:
    torch.manual_seed(0)
    rate = options.pop("drop_rate", 0.0)
    block = EfficientDenseBlock(3, 8, 2, 4, rate, **options)
    for _ in range(3):
        step(block)
    assert counted.runs == 0 and not any(counted.recorded) and len(counted.recorded) <= 2


def test_negative_views_run_as_it_is_written() -> None:
    def negative(x: Tensor) -> Tensor:
        view = torch.complex(torch.zeros_like(x), -x).conj().imag
        assert view.is_neg()
        return view

    block, other = block_of(), block_of()
    x = torch.randn(2, 8, 5, 5)
    for _ in range(3):
        torch.testing.assert_close(block(negative(x)), other(x), rtol=0, atol=0)
    weight = block.denselayer2.conv1.weight.detach()
    block.denselayer2.conv1.weight = torch.nn.Parameter(negative(weight))
    for _ in range(3):
        for one, expected in zip(step(block), step(other), strict=True):
            torch.testing.assert_close(one, expected, rtol=0, atol=0)


def test_an_operators_error_says_what_it_said() -> None:
    x = torch.zeros(4, 3)

    def function(x: Tensor, stats: Tensor) -> list[Tensor | None]:
        torch.ops.densenet_efficient.channel_stats(x, stats)
        return [stats.new_empty(1)]

    program = replay.record(function, [x, torch.zeros(3, 3)])
    assert program is not None
    with pytest.raises(RuntimeError, match="channel_stats"):
        program.run([x, torch.zeros(3, 3)])


def test_where_there_is_no_memory_is_said() -> None:
    def function(x: Tensor) -> list[Tensor | None]:
        return [x.new_empty(1 << 60)]

    x = torch.zeros(1)
    program = replay.record(function, [x])
    assert program is not None
    with pytest.raises(torch.OutOfMemoryError, match="cpu"):
        program.run([x])
