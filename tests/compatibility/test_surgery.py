"""Tensors that are not what the attributes of their modules say, and images in other memory than
contiguous: torchvision's model reads the tensors alone, and answers in the images' format."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densenet_efficient import convert
from tests.support.converted_pair import (
    assert_close,
    assert_same_step,
    converted_pair,
    images,
    training_step,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*runs its original forward")

# Surgery on tensors that leaves the attributes of modules behind, which no forward reads


def of_one_channel(model: nn.Module, x: Tensor) -> Tensor:
    """The weights for grey images, in_channels as it was."""
    conv: Any = model.get_submodule("features.conv0")
    conv.weight = nn.Parameter(conv.weight.detach().sum(1, keepdim=True))
    return x[:, :1]


def with_half_a_bottleneck(model: nn.Module, x: Tensor) -> Tensor:
    """Pruned: every second channel, through `.data`; out_channels and num_features as they were."""
    layer: Any = model.get_submodule("features.denseblock1.denselayer2")
    for tensor in (layer.conv1.weight, *layer.norm2.parameters(), *layer.norm2.buffers()):
        tensor.data = tensor.data[::2] if tensor.dim() else tensor.data
    layer.conv2.weight.data = layer.conv2.weight.data[:, ::2]
    return x


def with_a_narrow_last_layer(model: nn.Module, x: Tensor) -> Tensor:
    """Pruned: half of the growth of a layer, and what reads it."""
    *_, layer = model.get_submodule("features.denseblock2").children()
    last: Any = layer.conv2
    half = len(last.weight) // 2
    last.weight = nn.Parameter(last.weight.detach()[:-half])
    norm: Any = model.get_submodule("features.norm5")
    for tensor in (*norm.parameters(), *norm.buffers()):
        tensor.data = tensor.data[:-half] if tensor.dim() else tensor.data
    model.classifier.weight.data = model.classifier.weight.data[:, :-half]
    return x


def with_a_narrow_stem(model: nn.Module, x: Tensor) -> Tensor:
    """Pruned: what the first convolution gives, and what reads it."""
    features: Any = model.features
    features.conv0.weight.data = features.conv0.weight.data[8:]
    block, transition = features.denseblock1, features.transition1
    for norm in (features.norm0, *(layer.norm1 for layer in block.values()), transition.norm):
        for tensor in (*norm.parameters(), *norm.buffers()):
            tensor.data = tensor.data[8:] if tensor.dim() else tensor.data
    for conv in (*(layer.conv1 for layer in block.values()), transition.conv):
        conv.weight.data = conv.weight.data[:, 8:]
    return x


def with_a_larger_kernel(model: nn.Module, x: Tensor) -> Tensor:
    conv: Any = model.get_submodule("features.denseblock1.denselayer1.conv2")
    conv.weight = nn.Parameter(nn.functional.pad(conv.weight.detach(), (1, 1, 1, 1), value=0.1))
    conv.padding = (2, 2)
    return x


def with_numbers_for_pairs(model: nn.Module, x: Tensor) -> Tensor:
    """Convolutions take options as one number as well."""
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d):
            conv.stride, conv.padding = conv.stride[0], conv.padding[0]
            conv.dilation = conv.dilation[0]
    dilated: Any = model.get_submodule("features.denseblock1.denselayer1.conv2")
    dilated.padding = dilated.dilation = 2
    return x


@pytest.mark.parametrize(
    "change",
    [
        of_one_channel,
        with_half_a_bottleneck,
        with_a_narrow_last_layer,
        with_a_narrow_stem,
        with_a_larger_kernel,
        with_numbers_for_pairs,
    ],
)
@pytest.mark.parametrize("warm", [False, True])
def test_tensors_say_how_large_they_are(
    change: Callable[[nn.Module, Tensor], Tensor], warm: bool
) -> None:
    plain, ours = converted_pair()
    x = images()
    for model in (plain, ours):
        if warm:
            training_step(model, x)
            training_step(model, x)
        given = change(model, x)
    assert_same_step(plain, ours, given)


@pytest.mark.parametrize("change", [of_one_channel, with_half_a_bottleneck, with_numbers_for_pairs])
def test_networks_convert_after_surgery(change: Callable[[nn.Module, Tensor], Tensor]) -> None:
    plain, _ = converted_pair()
    x = change(plain, images())
    assert_same_step(plain, convert(copy.deepcopy(plain)), x)


def test_a_lazy_first_convolution() -> None:
    plain, ours = converted_pair()
    for model in (plain, ours):
        torch.manual_seed(1)
        model.features.conv0 = nn.LazyConv2d(16, 7, stride=2, padding=3, dtype=torch.float64)
        model(images(1))  # which makes its weight
    assert_same_step(plain, ours, images())


def test_norms_in_float32_among_convolutions_in_16_bits() -> None:
    plain = converted_pair()[0].bfloat16()
    for norm in plain.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.float()
    ours = convert(copy.deepcopy(plain)).eval()
    x = images().bfloat16()
    torch.testing.assert_close(ours(x), plain.eval()(x), rtol=0.05, atol=0.05)


# Memory formats


@pytest.mark.parametrize(
    ("part", "channels"), [("", 3), ("", 1), ("denseblock1", 16), ("transition1", 32)]
)
@pytest.mark.parametrize(
    "given",
    [
        lambda x: x[:, 2:, 2:-2, :-4],  # a crop
        lambda x: x[:, 1:-1].contiguous(),
        lambda x: x[:, 1:-1].transpose(2, 3),
        lambda x: x[:, :1].expand(-1, x.shape[1] - 2, -1, -1),  # a grey image as a coloured one
        lambda x: x[:, 1:-1].contiguous(memory_format=torch.channels_last),
        lambda x: x.contiguous(memory_format=torch.channels_last)[:, 2:],
        lambda x: x.contiguous(memory_format=torch.channels_last)[:, 2:, :, 4:],
        lambda x: x[:1, 2:].contiguous(memory_format=torch.channels_last),  # pixels of a file
    ],
)
def test_results_have_the_memory_format_of_the_original(
    part: str, channels: int, given: Callable[[Tensor], Tensor]
) -> None:
    """By the strides of what is given, not by whether it is dense."""
    plain, ours = converted_pair()
    if not part:
        conv = nn.Conv2d(channels, 16, 7, stride=2, padding=3, bias=False).double()
        for model in (plain, ours):
            model.features.conv0 = copy.deepcopy(conv)
    x = given(torch.randn(3, channels + 2, 32, 32).double())
    expected, got = (m.features.get_submodule(part)(x) for m in (plain, ours))
    for layout in (torch.contiguous_format, torch.channels_last):
        assert got.is_contiguous(memory_format=layout) == expected.is_contiguous(
            memory_format=layout
        )
    assert_close(expected, got)


SEEN = [
    "pool0",
    "denseblock1",
    "denseblock1.denselayer1",
    "denseblock1.denselayer2.norm1",
    "denseblock1.denselayer2.conv2",
    "transition1",
    "transition1.conv",
    "denseblock2.denselayer2",
    "norm5",
]


@pytest.mark.parametrize("name", SEEN)
def test_hooks_find_tensors_and_gradients_in_the_memory_of_the_original(name: str) -> None:
    """Distillation flattens them by `.view`."""
    found: list[dict[str, bool]] = []
    plain, ours = converted_pair()
    for model in (plain, ours):
        seen: dict[str, bool] = {}

        def note(module: nn.Module, given: Any, y: Tensor, seen: dict[str, bool] = seen) -> None:
            x = given[0][0] if isinstance(given[0], list) else given[0]
            seen["x"], seen["y"] = x.is_contiguous(), y.is_contiguous()
            y.register_hook(lambda dy: seen.update(dy=dy.is_contiguous()))

        model.get_submodule(f"features.{name}").register_forward_hook(note)
        found.append(seen)
    assert_same_step(plain, ours, images())
    assert found[0] == found[1]


class Flattened(nn.Module):
    """A module that takes contiguous input and output for granted."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x.view(-1).view(x.shape))
        return y.view(-1).view(y.shape)


@pytest.mark.parametrize("name", ["denseblock1.denselayer2.conv2", "transition1.conv"])
def test_modules_put_inside_find_contiguous_memory(name: str) -> None:
    plain, ours = converted_pair()
    for model in (plain, ours):
        model.set_submodule(f"features.{name}", Flattened(model.get_submodule(f"features.{name}")))
    assert_same_step(plain, ours, images())
