"""Under autocast a module of ours answers in the dtype of the original and no further from float64:
what PyTorch concatenates and normalises in float32 is not rounded to 16 bits here either."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn

import densenet_efficient as de
from densenet_efficient import reference
from densenet_efficient.bench.accuracy import error_ratio, moved_norms
from tests.support.libraries import load

DTYPES = [torch.bfloat16, torch.float16]


def step(module: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Output and gradients, under autocast to dtype."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        y = module(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    y.backward(weights)
    named = {name: p.grad for name, p in module.named_parameters()}
    found = {"y": y.detach(), "x": x.grad, **named}
    return {name: value for name, value in found.items() if value is not None}


def dense_block(dims: int) -> tuple[nn.Module, nn.Module]:
    plain = moved_norms(reference.DenseBlock(2, 8, 2, 4, 0.0, dims=dims))
    ours = de.EfficientDenseBlock(2, 8, 2, 4, 0.0, dims=dims)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def transition(dims: int) -> tuple[nn.Module, nn.Module]:
    plain = moved_norms(reference.Transition(8, 6))
    ours = de.EfficientTransition(8, 6)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("make", "dims"),
    [(dense_block, 1), (dense_block, 2), (dense_block, 3), (transition, 2)],
)
def test_a_float32_input_is_not_rounded(
    make: Callable[[int], tuple[nn.Module, nn.Module]], dims: int, dtype: torch.dtype
) -> None:
    """A mean of 50 deviations, of which rounding the input to 16 bits would leave little."""
    plain, ours = make(dims)
    exact_module = copy.deepcopy(plain).double()
    shape = {1: (2, 8, 40), 2: (2, 8, 6, 7), 3: (2, 8, 4, 3, 4)}[dims]
    own, eager, exact = [], [], []
    for seed in range(3):
        x = 5 + 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        own.append(step(ours, x, dtype))
        eager.append(step(plain, x, dtype))
        exact.append(step(exact_module, x.double()))
        assert [v.dtype for v in own[-1].values()] == [v.dtype for v in eager[-1].values()]
    ratio = error_ratio(own, eager, exact)
    assert ratio.accepted, ratio
    with torch.autocast("cpu", dtype):
        assert de.explain(ours, x).kinds == {"kernels"}


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_of_float16_under_autocast(training: bool) -> None:
    """Autocast concatenates no float16 on the CPU; nor does a plain transition."""
    plain, ours = (module.half().train(training) for module in transition(2))
    for module in (plain, ours):
        module.norm.momentum = None  # which no operator updates
    x = torch.randn(2, 8, 6, 7).half()
    for _ in range(3):
        expected, found = step(plain, x, torch.bfloat16), step(ours, x, torch.bfloat16)
        torch.testing.assert_close(found["y"], expected["y"], rtol=0.02, atol=0.02)
        torch.testing.assert_close(dict(ours.named_buffers()), dict(plain.named_buffers()))


def stage_dtypes(features: nn.Module, x: Tensor) -> dict[str, torch.dtype]:
    """Of what blocks, transitions and the last norm answer in one call under autocast."""
    seen = {}
    with ExitStack() as hooks, torch.autocast("cpu", torch.bfloat16):
        for name, child in features.named_children():
            if name.startswith(("denseblock", "transition", "norm5")):
                hook = child.register_forward_hook(
                    lambda module, args, y, name=name: seen.update({name: y.dtype})
                )
                hooks.callback(hook.remove)
        seen["features"] = features(x).dtype
    return seen


@pytest.mark.parametrize("dims", [2, 3])
def test_every_stage_of_a_network_answers_in_its_dtype(dims: int) -> None:
    """On the CPU autocast pools images of three dimensions in float32, so that all stages after
    the stem see float32; those of two dimensions stay in 16 bits, on the kernels for them."""
    plain = load("monai").DenseNet(dims, 1, 2, 8, 4, (2, 2), 2).features
    x = torch.randn(2, 1, *[24] * dims)
    with torch.autocast("cpu", torch.bfloat16):
        expected = stage_dtypes(plain, x)
    ours = de.convert(copy.deepcopy(plain))
    with torch.autocast("cpu", torch.bfloat16):
        explained = de.explain(ours, x)
    assert explained.kinds == {"kernels"}
    assert ("float32" in str(explained)) == (dims == 3)
    assert stage_dtypes(ours, x) == expected and len(expected) > 3
