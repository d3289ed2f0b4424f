"""The reference is the specification, so it is held against PyTorch itself: every operator against
autograd through PyTorch's modules, the models against torchvision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from densenet_efficient import reference
from densenet_efficient.bench.accuracy import training_step
from tests.support.peer import torchvision

EPS = 1e-3


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def norm_of(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    return reference.norm_fold(reference.channel_stats(x.flatten(0, -2)), gamma, beta, EPS)


def batch_norm_relu(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """[N, H, W, C] -> the same, by PyTorch."""
    return nhwc(torch.relu(F.batch_norm(nchw(x), None, None, gamma, beta, True, 0.1, EPS)))


def test_channel_stats_match_torch_and_survive_a_large_mean() -> None:
    x = torch.randn(50, 3, dtype=torch.float64) + 1e6
    mean, variance = reference.channel_stats(x)
    close(mean, x.mean(0))
    close(variance, x.var(0, unbiased=False))
    assert reference.channel_stats(x.float()).dtype == torch.float32
    assert reference.channel_stats(x[:0]).tolist() == [[0.0] * 3] * 2


def test_norm_fold_is_batch_norm_with_and_without_affine() -> None:
    x, gamma, beta = leaf(40, 5), leaf(5), leaf(5)
    for g, b in ((gamma, beta), (gamma, None), (None, None)):
        scale, shift, mean, _, offset = norm_of(x, g, b)
        expected = F.batch_norm(x, None, None, g, b, True, 0.1, EPS)
        close(scale * x + shift, expected)
        close((x - mean) * scale + offset, expected)


def test_norm_correction_gives_the_gradient_of_batch_norm() -> None:
    x, gamma, beta, dy = leaf(40, 5), leaf(5), leaf(5), leaf(40, 5).detach()
    norm = norm_of(x, gamma, beta).detach()
    y = F.batch_norm(x, None, None, gamma, beta, True, 0.1, EPS)
    dx, dgamma, dbeta = torch.autograd.grad(y, (x, gamma, beta), dy)
    dnorm = torch.stack([dgamma, dbeta])
    correction = reference.norm_correction(dnorm, norm, 40)
    close(reference.norm_correction_apply(dy, x.detach(), correction), dx)
    constant = reference.norm_correction(dnorm, norm, 0)
    close(reference.norm_correction_apply(dy, x.detach(), constant), dy * norm[0])
    added = reference.norm_correction(dnorm, norm, 40, accumulate=True)
    close(added[1:3], correction[1:3])
    assert not added[0].any() and not added[3].any()


def test_norm_relu_conv1x1_both_directions() -> None:
    # y is followed by a second norm and ReLU, whose masked gradient the backward pass starts from.
    x, weight = leaf(60, 7), leaf(6, 7)
    gamma, beta, gamma2, beta2 = leaf(7), leaf(7), leaf(6), leaf(6)
    h = torch.relu(F.batch_norm(x, None, None, gamma, beta, True, 0.1, EPS))
    y = h @ weight.t()
    z2 = F.batch_norm(y, None, None, gamma2, beta2, True, 0.1, EPS)
    dh2 = torch.randn_like(z2)
    expected = torch.autograd.grad(
        torch.relu(z2), (x, weight, gamma, beta, gamma2, beta2), dh2, retain_graph=True
    )
    dx, dweight, dgamma, dbeta, dgamma2, dbeta2 = expected
    norm, norm2 = norm_of(x, gamma, beta).detach(), norm_of(y, gamma2, beta2).detach()
    x, y, weight = x.detach(), y.detach(), weight.detach()

    actual, stats = reference.norm_relu_conv1x1_forward(x, norm, weight)
    close(actual, y)
    close(stats, reference.channel_stats(y))

    dz2 = torch.where(z2.detach() > 0, dh2, 0.0)
    correction2 = reference.norm_correction(torch.stack([dgamma2, dbeta2]), norm2, 60)
    scaled, dw, dnorm = reference.norm_relu_conv1x1_backward(dz2, y, correction2, x, norm, weight)
    close(dw, dweight)
    close(dnorm, torch.stack([dgamma, dbeta]))
    shared = reference.norm_correction(dnorm, norm, 60, accumulate=True)
    shared[0], shared[3] = 1.0, norm[2]
    close(reference.norm_correction_apply(scaled, x, shared), dx)


@pytest.mark.parametrize("size", [(5, 4), (1, 1)])
def test_norm_relu_conv3x3_both_directions(size: tuple[int, int]) -> None:
    # One pixel: the padding is the whole neighbourhood.
    x, weight, gamma, beta = leaf(3, *size, 6), leaf(4, 6, 3, 3), leaf(6), leaf(6)
    y = nhwc(F.conv2d(nchw(batch_norm_relu(x, gamma, beta)), weight, padding=1))
    # The output's own norm, as a norm without ReLU here, supplies the deferred correction.
    gamma2, beta2, dz_y = leaf(4), leaf(4), torch.randn_like(y)
    z2 = nhwc(F.batch_norm(nchw(y), None, None, gamma2, beta2, True, 0.1, EPS))
    dx, dweight, dgamma, dbeta, dgamma2, dbeta2 = torch.autograd.grad(
        z2, (x, weight, gamma, beta, gamma2, beta2), dz_y, retain_graph=True
    )
    (dy,) = torch.autograd.grad(z2, y, dz_y)
    rows = x[..., 0].numel()
    norm, norm2 = norm_of(x, gamma, beta).detach(), norm_of(y, gamma2, beta2).detach()
    x, y, weight = x.detach(), y.detach(), weight.detach()

    actual, stats = reference.norm_relu_conv3x3_forward(x, norm, weight)
    close(actual, y)
    close(stats, reference.channel_stats(y.flatten(0, 2)))

    correction2 = reference.norm_correction(torch.stack([dgamma2, dbeta2]), norm2, rows)
    corrected = reference.norm_relu_conv3x3_backward(dz_y, y, correction2, x, norm, weight)
    plain = reference.norm_relu_conv3x3_backward(dy, None, None, x, norm, weight)
    scaled = reference.norm_relu_conv3x3_backward(dy, None, None, x, norm, weight, True)
    for dz, dw, dnorm in (corrected, plain):
        close(dw, dweight)
        close(dnorm, torch.stack([dgamma, dbeta]))
        correction = reference.norm_correction(dnorm, norm, rows)
        close(reference.norm_correction_apply(dz, x, correction), dx)
    close(scaled[0], plain[0] * norm[0])
    with pytest.raises(ValueError, match="y and correction"):
        reference.norm_relu_conv3x3_backward(dy, y, None, x, norm, weight)


@pytest.mark.parametrize("size", [(6, 4), (5, 3)])
def test_transition_both_directions(size: tuple[int, int]) -> None:
    # Odd sizes: the pooling drops the last row and column, whose gradient is the norm's alone.
    x, weight, gamma, beta = leaf(3, *size, 6), leaf(4, 6), leaf(6), leaf(6)
    h = nchw(batch_norm_relu(x, gamma, beta))
    y = nhwc(F.avg_pool2d(F.conv2d(h, weight[:, :, None, None]), 2))
    dy = torch.randn_like(y)
    dx, dweight, dgamma, dbeta = torch.autograd.grad(y, (x, weight, gamma, beta), dy)
    norm = norm_of(x, gamma, beta).detach()
    x, weight = x.detach(), weight.detach()
    actual, stats = reference.transition_forward(x, norm, weight)
    close(actual, y.detach())
    close(stats, reference.channel_stats(y.detach().flatten(0, 2)))
    rows = x[..., 0].numel()
    got = reference.transition_backward(dy, x, norm, weight, rows)
    for value, expected in zip(got, (dx, dweight, torch.stack([dgamma, dbeta])), strict=True):
        close(value, expected)


@pytest.mark.parametrize("size", [(6, 8), (7, 5), (1, 1)])
def test_stem_both_directions(size: tuple[int, int]) -> None:
    # Whole numbers give windows with ties, and windows that the ReLU cuts altogether.
    x = torch.randint(-3, 4, (3, *size, 5)).double().requires_grad_()
    gamma, beta = leaf(5), leaf(5)
    y = nhwc(F.max_pool2d(nchw(batch_norm_relu(x, gamma, beta)), 3, 2, 1))
    dy = torch.randn_like(y)
    dx, dgamma, dbeta = torch.autograd.grad(y, (x, gamma, beta), dy)
    norm = norm_of(x, gamma, beta).detach()
    x = x.detach()
    actual, stats = reference.stem_forward(x, norm)
    close(actual, y.detach())
    close(stats, reference.channel_stats(y.detach().flatten(0, 2)))
    got, dnorm = reference.stem_backward(dy, x, norm, x[..., 0].numel())
    close(got, dx)
    close(dnorm, torch.stack([dgamma, dbeta]))


@pytest.mark.parametrize("size", [(14, 9), (5, 3), (1, 1)])
def test_the_stems_convolution_both_directions(size: tuple[int, int]) -> None:
    x, weight = torch.randn(2, *size, 3).double(), leaf(5, 3, 7, 7)
    y = nhwc(F.conv2d(nchw(x), weight, stride=2, padding=3))
    dy = torch.randn_like(y)
    (dweight,) = torch.autograd.grad(y, weight, dy)
    close(reference.stem_conv_forward(x, weight.detach()), y.detach())
    close(reference.stem_conv_backward_weight(dy, x), dweight)


def test_low_precision_keeps_wide_statistics_and_weight_gradients() -> None:
    x = torch.randn(2, 4, 4, 8).bfloat16()
    weight, norm = torch.randn(4, 8, 3, 3).bfloat16(), torch.rand(5, 8)
    y, stats = reference.norm_relu_conv3x3_forward(x, norm, weight)
    dx, dweight, dnorm = reference.norm_relu_conv3x3_backward(y, None, None, x, norm, weight)
    assert (y.dtype, dx.dtype) == (torch.bfloat16, torch.bfloat16)
    assert {stats.dtype, dweight.dtype, dnorm.dtype} == {torch.float32}
    # Statistics are taken of the values as stored, after rounding.
    assert torch.equal(stats, reference.channel_stats(y.flatten(0, 2)))


@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
def test_model_is_torchvisions_bit_for_bit(drop_rate: float) -> None:
    options = {"growth_rate": 8, "block_config": (2, 3), "num_init_features": 12}
    torch.manual_seed(3)
    ours = reference.DenseNet(**options, drop_rate=drop_rate, num_classes=7)
    torch.manual_seed(3)
    theirs = torchvision.models.DenseNet(**options, drop_rate=drop_rate, num_classes=7)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    x, target = torch.randn(3, 3, 32, 32), torch.tensor([1, 2, 3])
    torch.manual_seed(4)
    actual = training_step(ours, x, target)
    torch.manual_seed(4)
    expected = training_step(theirs, x, target)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
    for name, value in theirs.named_buffers():
        assert torch.equal(ours.get_buffer(name), value), name


@pytest.mark.parametrize("bottleneck", [True, False])
def test_checkpointed_model_gives_the_same_gradients(bottleneck: bool) -> None:
    options = {"growth_rate": 4, "block_config": (2, 2), "num_init_features": 8, "num_classes": 5}
    stored = reference.DenseNet(**options, bottleneck=bottleneck, small_inputs=True).double()
    checkpointed = reference.DenseNet(
        **options, bottleneck=bottleneck, small_inputs=True, memory_efficient=True
    ).double()
    checkpointed.load_state_dict(stored.state_dict())
    x, target = torch.randn(3, 3, 8, 8).double(), torch.tensor([1, 2, 3])
    expected = training_step(stored, x, target)
    for name, value in training_step(checkpointed, x, target).items():
        close(value, expected[name])
    # The known flaw of per-layer checkpointing, kept here on purpose: norm1 counts two batches.
    counts = {name: int(b) for name, b in checkpointed.named_buffers() if "num_batches" in name}
    assert counts["features.denseblock1.denselayer1.norm1.num_batches_tracked"] == 2
    assert counts["features.transition1.norm.num_batches_tracked"] == 1


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_block_in_one_two_and_three_dimensions(dims: int) -> None:
    block = reference.DenseBlock(3, 6, 2, 4, 0.0, dims=dims, dilation=2)
    assert block(torch.randn(2, 6, *(5,) * dims)).shape == (2, 18, *(5,) * dims)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_layers", 0),
        ("num_input_features", 0),
        ("bn_size", 0),
        ("growth_rate", 0),
        ("drop_rate", 1.5),
        ("drop_rate", float("nan")),
        ("dims", 4),
        ("dilation", 0),
    ],
)
def test_bad_block_options_are_named(option: str, value: float) -> None:
    options = {
        "num_layers": 2, "num_input_features": 4, "bn_size": 4, "growth_rate": 3, "drop_rate": 0.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"^{option} "):
        reference.DenseBlock(**{**options, option: value})
