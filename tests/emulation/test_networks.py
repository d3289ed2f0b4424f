"""A whole network, forward and backward, on the emulated CUDA kernels: every launcher called as the
modules call it, on rows that lie as on a GPU."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densenet_efficient import reference
from densenet_efficient.bench.accuracy import (
    error_ratio,
    moved_norms,
    relative_error,
    training_step,
)
from densenet_efficient.core import layout
from densenet_efficient.models.densenet import EfficientDenseNet
from densenet_efficient.ops import compiled
from tests.support.emulators import emulator_of
from tests.support.identifiers import identifier
from tools.op_cases import kernel_file

pytestmark = pytest.mark.slow

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZES = (12, (3, 2), 24)  # growth rate, layers, first features: no row fills whole sectors
DRAWS = 3
KERNELS = sorted({kernel_file(name) for name in compiled.NAMES})


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every operator runs on the emulation; their names as they are called."""
    called: list[str] = []

    def operator(name: str) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            called.append(name)
            emulator_of(*KERNELS).call(name, *arguments, seed=len(called))

        return call

    on_gpu = layout.row_length
    device = torch.device("cuda")
    monkeypatch.setattr(compiled, "_operator", functools.cache(operator))
    monkeypatch.setattr(layout, "row_length", lambda c, dtype, _: on_gpu(c, dtype, device))
    return called


def networks(
    dtype: torch.dtype, memory: str, **options: Any
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Ours and the framework's in `dtype`, with moved norms; the latter in float64."""
    plain = moved_norms(reference.DenseNet(*SIZES, num_classes=3, **options))
    ours = EfficientDenseNet(*SIZES, num_classes=3, memory=memory, **options)
    ours.load_state_dict(plain.state_dict())
    exact = copy.deepcopy(plain).to(dtype).double()
    return ours.to(dtype), plain.to(dtype), exact


@pytest.mark.parametrize("memory", ["recompute", "store"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=identifier)
def test_a_step_errs_no_more_than_the_framework(
    emulated: list[str], dtype: torch.dtype, memory: str
) -> None:
    ours, plain, exact = networks(dtype, memory)
    steps: tuple[list[dict[str, Tensor]], ...] = ([], [], [])
    for _ in range(DRAWS):
        x, target = torch.randn(2, 3, 40, 36).to(dtype), torch.tensor([0, 2])
        steps[0].append(training_step(ours, x, target))
        steps[1].append(training_step(plain, x, target))
        steps[2].append(training_step(exact, x.double(), target))
    assert set(emulated) == set(compiled.NAMES)
    ratio = error_ratio(*steps)
    # On images this small single ReLUs, which rounding turns, decide over single tensors.
    assert ratio.together <= 1.2, ratio


@pytest.mark.parametrize("bottleneck", [True, False], ids=["bottleneck", "plain"])
def test_a_step_in_tf32_is_right(emulated: list[str], bottleneck: bool) -> None:
    """But for what products of ten bits, and the ReLUs that they turn, leave."""
    ours, _, exact = networks(FP32, "recompute", bottleneck=bottleneck)
    x, target = torch.randn(2, 3, 40, 36), torch.tensor([0, 2])
    expected = training_step(exact, x.double(), target)
    for name, value in training_step(ours, x, target).items():
        assert relative_error(value, expected[name]) < 3e-2, name
    assert "norm_relu_conv3x3_backward" in emulated
