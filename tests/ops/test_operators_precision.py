"""What the operators on the CPU lose to rounding: no more than PyTorch's own layers do."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from densenet_efficient import reference
from densenet_efficient.bench.accuracy import error_ratio, relative_error
from densenet_efficient.ops import compiled, fallback

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def test_statistics_do_not_cancel() -> None:
    """A mean a million times the deviation: E[x^2] - E[x]^2 would lose every digit."""
    x = torch.randn(5000, 3, dtype=torch.float64) + 1e6
    stats = torch.empty(2, 3, dtype=torch.float64)
    compiled.channel_stats(x, stats)
    exact = torch.stack([x.mean(0), x.var(0, unbiased=False)])
    assert relative_error(stats[1], exact[1]) < 1e-9
    x32 = (x - 1e6 + 1e3).float()
    stats32 = torch.empty(2, 3)
    compiled.channel_stats(x32, stats32)
    assert relative_error(stats32[1], x32.double().var(0, unbiased=False)) < 1e-6


def framework_layer(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, dy: Tensor) -> dict:
    """Norm, ReLU, convolution and their gradients by PyTorch, x [N, C, H, W]; the norm in
    float32, as autocast runs it next to bfloat16 activations."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, gamma, beta, weight)]
    x, gamma, beta, weight = leaves
    h = F.relu(F.batch_norm(x, None, None, gamma, beta, training=True))
    y = F.conv2d(h, weight, padding=weight.shape[-1] // 2)
    y.backward(dy)
    names = ("dx", "dgamma", "dbeta", "dweight")
    return {"y": y.detach()} | {n: t.grad for n, t in zip(names, leaves, strict=True)}


def our_layer(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, dy: Tensor) -> dict:
    """The same with our operators; x and the result are views of channels-last rows."""
    rows, dy = x.permute(0, 2, 3, 1).contiguous(), dy.permute(0, 2, 3, 1).contiguous()
    N, H, W, C = rows.shape
    K, M = weight.shape[0], N * H * W
    stats, norm, dnorm = torch.empty(2, C), torch.empty(5, C), torch.empty(2, C)
    compiled.channel_stats(rows.view(M, C), stats)
    compiled.norm_fold(stats, gamma, beta, 1e-5, norm)
    y, dx, dweight = torch.empty_like(dy), torch.zeros_like(rows), torch.empty(weight.shape)
    if weight.shape[-1] == 1:
        plain = torch.zeros(4, K)
        plain[0] = 1
        weight = weight.view(K, C)
        compiled.norm_relu_conv1x1_forward(rows.view(M, C), norm, weight, y.view(M, K), None)
        compiled.norm_relu_conv1x1_backward(
            dy.view(M, K), y.view(M, K), plain, rows.view(M, C), norm, weight, dx.view(M, C),
            dweight.view(K, C), dnorm,
        )  # fmt: skip
    else:
        compiled.norm_relu_conv3x3_forward(rows, norm, weight, y, None)
        compiled.norm_relu_conv3x3_backward(
            dy, None, None, rows, norm, weight, True, dx, dweight, dnorm
        )
    correction = torch.zeros(4, C)
    compiled.norm_correction(dnorm, norm, M, False, correction)
    correction[0] = 1  # dx holds a * dz already
    compiled.norm_correction_apply(dx.view(M, C), rows.view(M, C), correction)
    return dict(
        y=y.permute(0, 3, 1, 2), dx=dx.permute(0, 3, 1, 2), dgamma=dnorm[0], dbeta=dnorm[1],
        dweight=dweight,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [1, 3])
def test_error_against_float64_is_not_larger_than_the_frameworks(
    dtype: torch.dtype, kernel: int
) -> None:
    """Norm, ReLU and convolution with their gradients on the same input, each result's error at
    most 1.2 times PyTorch's own; the dithered second rounding of a 16-bit dx has a bound of
    its own."""
    N, C, K, size = 4, 96, 64, 14
    x = (
        (torch.randn(N, C, size, size) * 2 + 1)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
    )
    gamma, beta = torch.rand(C) + 0.5, torch.randn(C)
    weight = (torch.randn(K, C, kernel, kernel) / math.sqrt(C * kernel**2)).to(dtype)
    dy = torch.randn(N, K, size, size).to(dtype).contiguous(memory_format=torch.channels_last)
    exact = framework_layer(*(t.double() for t in (x, gamma, beta, weight, dy)))
    arguments = (x, gamma, beta, weight, dy)
    ours, peer = our_layer(*arguments), framework_layer(*arguments)
    for name in exact:
        bound = 1.3 if name == "dx" and dtype.itemsize == 2 else 1.2
        error, own = (relative_error(t[name], exact[name]) for t in (ours, peer))
        assert error <= bound * own, f"{name}: error {error:.3g}, PyTorch's {own:.3g}"
    assert error_ratio([ours], [peer], [exact]).together <= 1.2


@pytest.mark.parametrize("operators", [compiled, fallback], ids=["kernels", "fallback"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_correction_below_the_last_digit_is_not_lost(
    operators: ModuleType, dtype: torch.dtype
) -> None:
    """Gradients on the dtype's grid, minus less than half a step of it: rounding to nearest gives
    them back unchanged. Of every channel the sum is right to four standard deviations."""
    M, C = 60_000, 24
    for size in (1.0, 2.0**-20):  # the second in float16: subnormal numbers
        dx = (torch.rand(M, C) + 1).mul_(size).to(dtype)
        step = torch.finfo(dtype).eps * size
        if dtype == torch.float16:
            step = max(step, 2.0**-24)
        correction = torch.zeros(4, C)
        correction[0] = 1
        correction[1] = torch.linspace(0.01, 0.45, C) * step
        before, x = dx.clone(), torch.zeros_like(dx)
        operators.norm_correction_apply(dx, x, correction)
        taken = (before.double() - dx.double()) / step
        assert taken.abs().max() <= 1
        bound = 4 * 0.5 / math.sqrt(M)
        assert (taken.mean(0) - correction[1].double() / step).abs().max() < bound


@pytest.mark.parametrize("operators", [compiled, fallback], ids=["kernels", "fallback"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_correction_of_nothing_changes_nothing(operators: ModuleType, dtype: torch.dtype) -> None:
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 6e-8, -65504.0, 1.0]
    dx = torch.cat([torch.tensor(special).repeat(4, 1), torch.randn(40, 8)]).to(dtype)
    before = dx.clone()
    correction = torch.zeros(4, 8, dtype=reference.wide_dtype(dtype))
    correction[0] = 1
    operators.norm_correction_apply(dx, torch.zeros_like(dx), correction)
    torch.testing.assert_close(dx, before, rtol=0, atol=0, equal_nan=True)
