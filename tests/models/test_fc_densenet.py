"""FC-DenseNets against the plain ones, their published sizes, and the memory they keep."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densenet_efficient import EfficientDenseBlock, EfficientTransition, explain, reference
from densenet_efficient.bench.accuracy import moved_norms
from densenet_efficient.core import dropout, max_pool
from densenet_efficient.core.functions import MaxPoolFunction
from densenet_efficient.models import keras
from densenet_efficient.models.fc_densenet import EfficientFCDenseNet, fc_densenet56
from tests.support.conversion_comparison import Replay, largest_error, step
from tests.support.kept_memory import kept_bytes

SMALL: tuple[Any, ...] = (4, (2, 1, 3, 2, 2), 8)
VARIANTS: dict[str, dict[str, Any]] = {
    "the paper's": {},
    "Keras'": {
        "bias": False, "norm_first": True, "relu_up": True, "compression": 0.5,
        "drop_transitions": False, "early_transition": True,
    },
    "with bottlenecks": {"bottleneck": True, "pooling": "average", "bias": False},
    "sub-pixel": {"upsampling": "subpixel", "bias_up": False},
    "nearest pixel": {"upsampling": "upsampling", "early_transition": True},
}  # fmt: skip


def pair(drop_rate: float = 0.0, **options: Any) -> tuple[nn.Module, EfficientFCDenseNet]:
    """The plain network in float64, its norms moved away from 1 and 0, and ours."""
    torch.manual_seed(0)
    plain = reference.FCDenseNet(*SMALL, drop_rate, 5, **options).double()
    moved_norms(plain)
    ours = EfficientFCDenseNet(*SMALL, drop_rate, 5, **options).double()
    ours.load_state_dict(plain.state_dict())
    return plain, ours


@contextmanager
def masks_of_the_forward_pass() -> Iterator[list[Tensor]]:
    """The dropout masks that ours draws in a forward pass, [N, C, ...], in order."""
    masks: list[Tensor] = []
    draw_in_block, draw_in_transition = dropout.draw_mask, max_pool.draw_mask

    def in_block(*args: Any) -> Tensor:
        mask = draw_in_block(*args)
        masks.append(mask.clone().movedim(-1, 1))
        return mask

    def in_transition(*args: Any) -> Tensor:
        masks.append(draw_in_transition(*args))
        return masks[-1]

    dropout.draw_mask, max_pool.draw_mask = in_block, in_transition
    try:
        yield masks
    finally:
        dropout.draw_mask, max_pool.draw_mask = draw_in_block, draw_in_transition


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_gradients_and_statistics_are_the_plain_ones(variant: str, training: bool) -> None:
    plain, ours = pair(**VARIANTS[variant])
    size = (19, 22) if "upsampling" not in VARIANTS[variant] else (16, 24)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected, actual = step(plain.train(training), x), step(ours.train(training), x)
    assert expected["output 0"].shape == (2, 5, *size)
    assert largest_error(expected, actual) < 1e-9
    assert ours(x).is_contiguous()
    assert explain(ours, x).kinds == {"kernels"}


def test_dropout_follows_every_convolution_of_layers_and_transitions() -> None:
    plain, ours = pair(drop_rate=0.3)
    x = torch.randn(2, 3, 19, 22, dtype=torch.float64)
    with masks_of_the_forward_pass() as masks:
        torch.manual_seed(1)
        ours(x)
    assert len(masks) == 10 + 2
    ours.load_state_dict(plain.state_dict())
    with Replay(masks):
        expected = step(plain, x)
    torch.manual_seed(1)
    assert largest_error(expected, step(ours, x)) < 1e-9


@pytest.mark.parametrize("drop_rate", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("spatial", [(5,), (4, 5), (3, 4, 2)])
def test_max_pooling_with_dropout_has_derivatives_of_any_order(
    spatial: tuple[int, ...], drop_rate: float
) -> None:
    x = torch.randn(2, 3, *spatial, dtype=torch.float64, requires_grad=True)

    def pool(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return MaxPoolFunction.apply(x, drop_rate)

    if drop_rate == 0:
        plain = getattr(nn, f"MaxPool{len(spatial)}d")(2)(x)
        assert torch.equal(pool(x), plain)
    assert torch.autograd.gradcheck(pool, x)
    assert torch.autograd.gradgradcheck(pool, x, fast_mode=True)


def test_a_max_pooling_transition_keeps_its_input_and_a_byte_for_each_output() -> None:
    transition = EfficientTransition(8, 8, drop_rate=0.2, max_pool=True)
    x = torch.randn(2, 8, 32, 32).to(memory_format=torch.channels_last).requires_grad_()
    given, statistics = 4 * x.numel(), 4 * 2 * 8
    assert kept_bytes(transition, x) == given + x.numel() // 4 + statistics
    assert explain(transition, x).kinds == {"kernels"}


def test_gradients_of_gradients_and_batched_ones_are_the_plain_ones() -> None:
    plain, ours = pair()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    found = []
    for model in (plain, ours):
        y = model(x)[:, :2].flatten(1)
        weights = [model.classifier.weight, model.denseblock3.denselayer1.conv1.weight]
        batched = torch.autograd.grad(
            y, weights, torch.eye(4, dtype=y.dtype)[:, :2, None].expand(4, 2, y.shape[1]),
            retain_graph=True, is_grads_batched=True,
        )  # fmt: skip
        (first,) = torch.autograd.grad(y.square().mean(), x, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), weights)
        found.append([*batched, first, *second])
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_it_exports() -> None:
    _, ours = pair()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    program = torch.export.export(ours.eval(), (x,))
    torch.testing.assert_close(program.module()(x), ours(x), rtol=1e-12, atol=1e-12)


def test_a_hook_on_the_classifier_runs() -> None:
    _, ours = pair()
    seen = []
    ours.classifier.register_forward_hook(lambda module, inputs, output: seen.append(output))
    y = ours(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert len(seen) == 1 and torch.equal(seen[0], y)


def test_a_block_may_keep_its_input_for_itself() -> None:
    block = EfficientDenseBlock(3, 5, 4, 2, 0.0, with_input=False)
    plain = reference.DenseBlock(3, 5, 4, 2, 0.0, with_input=False)
    plain.load_state_dict(block.state_dict())
    x = torch.randn(2, 5, 6, 7, dtype=torch.float64)
    expected, actual = step(plain.double(), x), step(block.double(), x)
    assert expected["output 0"].shape == (2, 6, 6, 7)
    assert largest_error(expected, actual) < 1e-9
    again = pickle.loads(pickle.dumps(block))
    assert again(x).shape == (2, 6, 6, 7)


def test_keys_copies_and_pickles() -> None:
    _, ours = pair()
    names = {name.split(".")[0] for name in ours.state_dict()}
    assert names == {
        "conv0", *(f"denseblock{i}" for i in range(1, 6)), "transition1", "transition2", "up1",
        "up2", "classifier",
    }  # fmt: skip
    assert "denseblock3.denselayer2.conv1.bias" in ours.state_dict()
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    expected = ours.eval()(x)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(again(x), expected)


def test_a_step_keeps_a_fraction_of_the_plain_network() -> None:
    torch.manual_seed(0)
    plain, ours = reference.FCDenseNet(), EfficientFCDenseNet()
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert kept_bytes(ours, x) < 0.11 * kept_bytes(plain, x)


def test_autocast_and_channels_last() -> None:
    model = fc_densenet56(drop_rate=0.0)
    x = torch.randn(2, 3, 33, 40).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16 and y.shape == (2, 11, 33, 40)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.float().square().mean().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_config": (2, 2)}, r"block_config must list the blocks .* odd number .* got 2"),
        ({"pooling": "sum"}, "pooling must be one of 'max', 'average', got 'sum'"),
        ({"upsampling": "bilinear"}, "upsampling must be one of 'deconv', 'upsampling', 'subpixel"),
        ({"upsampling": "subpixel", "growth_rate": 3}, "no multiple of 4, got .* 9"),
        ({"compression": 0.0}, "compression must be above 0"),
        ({"memory": "none"}, "memory must be"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EfficientFCDenseNet(**{"block_config": (2, 3, 2), **options})


def test_images_that_the_network_cannot_take_are_refused() -> None:
    _, ours = pair()
    with pytest.raises(ValueError, match=r"at least 4 pixels high and wide .* got 3 x 9"):
        ours(torch.randn(1, 3, 3, 9, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"a batch of images \[N, C, H, W\]"):
        ours(torch.randn(3, 8, 8, dtype=torch.float64))
    _, ours = pair(upsampling="upsampling")
    message = "a multiple of 4 pixels .* upsampling='upsampling', got 8 x 10"
    with pytest.raises(ValueError, match=message):
        ours(torch.randn(1, 3, 8, 10, dtype=torch.float64))


def test_keras_network_mirrors_its_blocks_and_decays_its_kernels() -> None:
    model = keras.DenseNetFCN(
        nb_dense_block=2, growth_rate=4, nb_layers_per_block=[1, 2, 3], reduction=0.5,
        weight_decay=1e-3, init_conv_filters=8, classes=3, early_transition=True,
    )  # fmt: skip
    blocks = [len(model.child(f"denseblock{i}").parts()) for i in range(1, 6)]
    assert blocks == [1, 2, 3, 2, 1]
    assert model.conv0.bias is None and model.up1.conv.bias is not None
    assert model.norm0.eps == keras.CONTRIB_EPSILON
    assert model.transition0.conv.out_channels == 4 and model.up3.conv.out_channels == 4
    kernels, others = model.parameter_groups()
    assert kernels["weight_decay"] == 2e-3 and others["weight_decay"] == 0.0
    assert model(torch.randn(1, 3, 17, 24)).shape == (1, 3, 17, 24)
    assert keras.DenseNetFCN(2, 4, 2, include_top=False, upsampling_type="subpixel")(
        torch.randn(1, 3, 16, 16)
    ).shape == (1, 48 + 8 + 8 + 8, 16, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nb_layers_per_block": [1, 2]}, "must list nb_dense_block . 1 = 6 blocks, got 2"),
        ({"reduction": 1.0}, "reduction must be at least 0 and below 1"),
        ({"transition_pooling": "min"}, "transition_pooling must be one of 'max', 'avg'"),
        ({"upsampling_type": "bicubic"}, "upsampling_type must be one of 'deconv'"),
        ({"dropout_rate": 2}, "dropout_rate must be a probability between 0 and 1, got 2"),
        ({"init_conv_filters": 0}, "init_conv_filters must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_options_of_the_keras_network_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        keras.DenseNetFCN(**options)
