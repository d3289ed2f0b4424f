"""Inputs at which a sum, a table or a rounding that is right for ordinary ones goes wrong: means
far larger than the deviation, constant channels, rows that are all alike. Each test names the
rounding that once was worse than PyTorch's."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from densenet_efficient.ops import compiled, fallback
from tools.op_cases import make

OPERATORS = pytest.mark.parametrize("operators", [compiled, fallback], ids=["kernels", "fallback"])


def test_the_shift_belongs_to_the_scale_as_rounded() -> None:
    """One fused multiply-add takes a constant channel of 1e4 to beta, up to half a step of what
    cancels there. A shift made of the unrounded scale is off by x times the scale's rounding as
    well."""
    gamma, beta = torch.rand(1000) + 0.5, torch.randn(1000)
    stats = torch.stack((torch.full((1000,), 1e4), torch.zeros(1000)))
    norm = torch.empty(5, 1000)
    compiled.norm_fold(stats, gamma, beta, 1e-5, norm)
    scale, shift, mean, *_ = norm.double()
    step = torch.finfo(torch.float32).eps * (mean * scale).abs()
    assert ((mean * scale + shift - beta.double()).abs() <= 0.51 * step + 1e-6).all()


@OPERATORS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_constant_channel_is_beta(operators: ModuleType, dtype: torch.dtype) -> None:
    """Whatever its value and its scale: what cancels there is 300 times the value. A product that
    is not rounded, next to a shift that is, would leave beta 0 on either side of the ReLU."""
    C = 200
    x = (torch.rand(C) * 1e4).to(dtype).expand(12, C).contiguous()
    beta = torch.where(torch.arange(C) % 2 == 0, torch.rand(C), 0.0)
    stats, norm, dnorm = torch.empty(2, C), torch.empty(5, C), torch.empty(2, C)
    operators.channel_stats(x, stats)
    operators.norm_fold(stats, torch.rand(C) + 0.5, beta, 1e-5, norm)
    y, weight = torch.empty(12, C, dtype=dtype), torch.eye(C, dtype=dtype)
    operators.norm_relu_conv1x1_forward(x, norm, weight, y, None)
    assert torch.equal(y, beta.to(dtype).expand(12, C))
    plain = torch.zeros(4, C)
    plain[0] = 1
    operators.norm_relu_conv1x1_backward(
        torch.ones_like(y), y, plain, x, norm, weight, torch.zeros_like(x), None, dnorm
    )
    assert torch.equal(dnorm[1], torch.where(beta > 0, 12.0, 0.0))


@OPERATORS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_no_variance_is_negative(operators: ModuleType, dtype: torch.dtype) -> None:
    """The squares of deviations from a mean that was rounded, less what it was rounded by: of a
    constant channel, the difference of two equal numbers."""
    x = torch.rand(2000).to(dtype).expand(15, 2000).contiguous()
    stats = torch.empty(2, 2000, dtype=dtype if dtype == torch.float64 else torch.float32)
    operators.channel_stats(x, stats)
    assert (stats[1] >= 0).all()


def test_long_sums_are_not_rounded_at_every_row() -> None:
    """dbeta of gradients that all have one sign, in float32: a running sum over the rows of a tile
    would lose a digit of every row. With scale 1 and nothing masked, dx holds the terms."""
    case = make("norm_relu_conv1x1_backward", (4000, 64, 16), torch.float32)
    arguments = case.arguments
    for name in ("dz_y", "weight"):
        arguments[name].abs_()
    arguments["dx"].zero_()
    arguments["correction"].zero_()[0] = 1
    arguments["norm"][:] = torch.tensor([[1.0], [9.0], [0.0], [1.0], [9.0]])
    compiled.norm_relu_conv1x1_backward(*arguments.values())
    exact = arguments["dx"].double().sum(0)
    error = (arguments["dnorm"][1].double() - exact).abs() / exact
    assert error.mean() < torch.finfo(torch.float32).eps / 2


@OPERATORS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_of_the_gradient_as_it_is_stored(
    operators: ModuleType, dtype: torch.dtype
) -> None:
    """Rows that are all alike round alike: sums of the unrounded values would miss what is stored
    by the same share at every row, and the correction would not take off its mean."""
    case = make("norm_relu_conv3x3_backward", (2, 1, 1, 16, 8), dtype, y=None, correction=None)
    arguments = case.arguments
    for name in ("dy", "x"):
        arguments[name][1] = arguments[name][0]
    operators.norm_relu_conv3x3_backward(*arguments.values())
    stored = arguments["dx"].double().sum((0, 1, 2))
    torch.testing.assert_close(arguments["dnorm"][1].double(), stored, rtol=1e-6, atol=1e-7)


@OPERATORS
def test_a_small_correction_of_a_bfloat16_gradient_passes_a_convolution(
    operators: ModuleType,
) -> None:
    """dy on the grid of bfloat16, minus less than half a step of it: rounded to nearest as an
    operand it would be unchanged everywhere, and the sum over the image wrong. The convolution is
    the identity, so dbeta is that sum."""
    N, H, W, C = 2, 32, 32, 4
    case = make("norm_relu_conv3x3_backward", (N, H, W, C, C), torch.bfloat16, accumulate=True)
    arguments = case.arguments
    step = torch.finfo(torch.bfloat16).eps
    arguments["dy"].copy_(torch.rand(N, H, W, C) + 1)
    correction = arguments["correction"].zero_()
    correction[0] = 1
    correction[1] = torch.linspace(0.1, 0.4, C) * step
    arguments["weight"].zero_()[:, :, 1, 1].fill_diagonal_(1)
    arguments["norm"].zero_()[[1, 4]] = 1  # relu(0 x + 1): nothing is masked
    count = N * H * W
    exact = arguments["dy"].double().sum((0, 1, 2)) - count * correction[1].double()
    operators.norm_relu_conv3x3_backward(*arguments.values())
    noise = 4 * 0.5 * step * count**0.5  # four standard deviations
    assert noise < count * correction[1].max(), "the correction is too small to be missed"
    assert ((arguments["dnorm"][1].double() - exact).abs() < noise).all()
