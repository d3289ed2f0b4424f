"""Channels-last memory in other layouts than the densest: rows padded to sectors, as on a GPU, and
saved tensors that come back in another layout than they left in."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import densenet_efficient as de
from densenet_efficient.core import functions, layout
from densenet_efficient.models.densenet import EfficientDenseNet
from tests.support.block_pair import MEMORY, assert_same, pair, step

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows as on a GPU."""
    on_gpu = layout.row_length
    monkeypatch.setattr(layout, "row_length", lambda c, dtype, device: on_gpu(c, dtype, CUDA))


def test_rows_begin_at_sectors_on_a_gpu() -> None:
    for channels, length in ((16, 16), (216, 224), (300, 304), (342, 352)):
        assert layout.row_length(channels, torch.bfloat16, CUDA) == length
        assert layout.row_length(channels, torch.bfloat16, CPU) == channels
    assert layout.row_length(9, torch.float64, CUDA) == 12


def test_new_buffers_are_packed_but_for_their_padding() -> None:
    for image in ((2, 3, 5), (4, 1, 1), (3, 7), (0, 3, 5)):
        assert layout.strides(image, 11) == torch.empty(*image, 11).stride()
    buffer = layout.empty((2, 3), 5, torch.float32, CPU)
    assert buffer.shape == (2, 5, 3) and buffer.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize(
    ("x", "stride"),
    [
        (torch.randn(2, 3, 4, 6), 6),
        (torch.randn(2, 3, 4, 9)[..., 2:8], 9),
        (torch.randn(1, 1, 4, 9)[..., :4], 9),
        (torch.randn(2, 3, 5, 6)[:, :, :4], None),  # the rows of an image's columns are apart
        (torch.randn(2, 6, 3, 4).movedim(1, -1), None),
        (torch.randn(1, 6).expand(5, 6), None),
        (torch.randn(1, 1, 1, 6), 6),
    ],
)
def test_row_stride(x: torch.Tensor, stride: int | None) -> None:
    assert layout.row_stride(x) == stride
    same = layout.channels_last(x.movedim(-1, 1))
    assert torch.equal(same, x)
    assert (same.data_ptr() == x.data_ptr()) == (stride is not None)


@pytest.mark.usefixtures("padded")
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("options", [{}, {"drop_rate": 0.3}, {"bottleneck": False}], ids=str)
def test_a_block_with_padded_rows_is_the_reference(memory: str, options: dict) -> None:
    reference, ours = pair(memory, **options)
    x = torch.randn(2, 10, 5, 7, dtype=torch.float64)
    if (
        "drop_rate" in options
    ):  # other masks than the reference's: compared with itself without padding
        torch.manual_seed(3)
        got = step(copy.deepcopy(ours), x)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layout, "row_length", lambda channels, dtype, device: channels)
            torch.manual_seed(3)
            expected = step(ours, x)
    else:
        got, expected = step(ours, x), step(reference, x)
    assert_same(expected, got)


@pytest.mark.usefixtures("padded")
@pytest.mark.parametrize("memory", MEMORY)
def test_a_network_with_padded_rows_copies_no_gradient_but_the_last(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """45 and 67 channels in front of a transition and of norm5; float64 rows of 48 and 68."""
    model = EfficientDenseNet(15, (2, 3), 15, num_classes=4, memory=memory, small_inputs=True)
    model.double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    owned = []
    take = functions.gradient_buffer

    def watched(held: list[torch.Tensor]) -> torch.Tensor:
        arrived = held[0].data_ptr()
        e = take(held)
        owned.append((layout.row_stride(e), e.data_ptr() == arrived))
        return e

    monkeypatch.setattr(functions, "gradient_buffer", watched)
    got = step(model, x)
    assert owned == [(68, False), (48, True)]
    monkeypatch.setattr(layout, "row_length", lambda channels, dtype, device: channels)
    model.apply(lambda m: m.reset_running_stats() if isinstance(m, nn.BatchNorm2d) else None)
    assert_same(step(model, x), got)
    assert owned[2:] == [(67, True), (45, True)]


@pytest.mark.usefixtures("padded")
def test_the_plan_counts_the_padding() -> None:
    model = EfficientDenseNet(15, (2, 3), 15, num_classes=4, small_inputs=True)
    plan = de.plan(model, (2, 3, 8, 8))
    shapes = {row.name: row.shape for row in plan.rows}
    assert shapes["denseblock1 features"] == (2, 8, 8, 48)
    assert shapes["transition1 output"] == (2, 4, 4, 24)
    assert shapes["gradient before transition1"] == (2, 8, 8, 48)
    assert shapes["gradient buffer of denseblock2"] == (2, 4, 4, 72)
    assert shapes["conv0 output"] == (2, 8, 8, 15)


def dense(x: torch.Tensor) -> torch.Tensor:
    """As torch.autograd.graph.save_on_cpu stores it: channels first."""
    return x.clone(memory_format=torch.contiguous_format)


def turned(x: torch.Tensor) -> torch.Tensor:
    """In memory that has the axes the other way round, or, of a vector, other values between."""
    if x.dim() == 1:
        return torch.stack([x, x], 1)[:, 0]
    axes = tuple(reversed(range(x.dim())))
    return x.permute(axes).clone(memory_format=torch.contiguous_format).permute(axes)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("pack", [dense, turned])
def test_saved_tensors_may_come_back_in_another_layout(
    memory: str, pack: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    model = EfficientDenseNet(8, (2, 2), 16, num_classes=5, memory=memory).double()
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)

    def offloaded(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            return module(x)

    plain = copy.deepcopy(model)
    for _ in range(3):
        assert_same(step(plain, x), step(model, x, call=offloaded))
