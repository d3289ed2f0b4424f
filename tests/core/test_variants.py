"""Blocks unlike torchvision's: new channels in front, dropout in two places, the input left out."""

from contextlib import nullcontext

import pytest
import torch

import densenet_efficient as de
from densenet_efficient.core import capture
from densenet_efficient.core.dropout import draw_mask, mask_shape
from densenet_efficient.core.specs import BlockSpec
from densenet_efficient.nn.layers import layer_spec, standard_parts
from densenet_efficient.ops import compiled
from tests.support.block_pair import MEMORY, assert_same, pair, step


def newest_first(block, x):
    """The reference with every layer's new channels in front."""
    for layer in block.values():
        x = torch.cat([layer([x]), x], 1)
    return x


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("options", [{}, {"bottleneck": False}, {"dims": 3}, {"dilation": 2}])
def test_new_channels_in_front(memory, options):
    block, ours = pair(memory, **options)
    ours._efficient.newest_first = True
    x = torch.randn(3, 10, *(4, 5, 3)[: options.get("dims", 2)], dtype=torch.float64)
    assert_same(step(block, x, call=newest_first), step(ours, x))
    assert_same(step(block.eval(), x, call=newest_first), step(ours.eval(), x))


@pytest.mark.parametrize("in_front", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_input_left_out(in_front, channels_last):
    block, ours = pair()
    ours._efficient.newest_first = in_front
    ours._efficient.with_input = lambda block: False
    x = torch.randn(3, 10, 4, 5, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)

    def call(block, x):
        return newest_first(block, x)[:, :-10] if in_front else block(x)[:, 10:]

    assert_same(step(block, x, call=call), step(ours, x))
    y = ours(x)
    assert y.is_contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


def _dropping(layer):
    return de.LayerParts(
        layer.norm1, layer.conv1, layer.norm2, layer.conv2, 0.4, layer.channelwise, 0.3
    )


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("channelwise", [False, True])
@pytest.mark.parametrize("captured", [False, True], ids=["seed", "kept"])
def test_dropout_in_two_places(memory, channelwise, captured):
    """Exact against autograd with the masks of the call, also as a CUDA graph keeps them."""
    block, ours = pair(memory)
    ours._efficient.parts = _dropping
    for layer in ours.values():
        layer.channelwise = channelwise
    x = torch.randn(3, 10, 4, 5, dtype=torch.float64)
    torch.manual_seed(5)
    origin = {"masks": {}} if captured else {"seed": int(torch.randint(1 << 48, ()))}
    spec = _spec(ours, origin)

    def with_masks(block, x):
        for index, layer in enumerate(block.values()):
            b = layer.conv1(layer.norm1(x).relu())
            b = b * _mask(spec, index, b, bottleneck=True)
            new = layer.conv2(layer.norm2(b).relu())
            x = torch.cat([x, new * _mask(spec, index, new, bottleneck=False)], 1)
        return x

    expected = step(block, x, call=with_masks)
    torch.manual_seed(5)
    with capture.rehearsed() if captured else nullcontext():
        assert_same(expected, step(ours, x))
    assert_same(step(block.eval(), x), step(ours.eval(), x))


def _spec(block, origin):
    layers, channels = [], 10
    for name, layer in block.items():
        found, problem = layer_spec(_dropping(layer), name, channels, torch.float64, True)
        assert problem is None
        layers.append(found)
        channels += found.growth
    return BlockSpec(tuple(layers), compiled, 0, **origin)


def _mask(spec, index, values, bottleneck):
    shape = mask_shape(spec, index, values.movedim(1, -1).shape)
    mask = draw_mask(spec, index, torch.empty(shape, dtype=values.dtype), bottleneck)
    return mask.movedim(-1, 1)


def test_dropout_by_a_flag_of_its_own():
    """Monte Carlo dropout: the layer evaluates, its dropout module trains."""
    layer = next(iter(pair()[1].values())).eval()
    for drops, rate in ((None, 0.0), (True, 0.4), (False, 0.0)):
        parts = standard_parts(layer)
        parts = de.LayerParts(parts.norm1, parts.conv1, parts.norm2, parts.conv2, 0.4, drops=drops)
        found, _ = layer_spec(parts, "layer", 10, torch.float64, layer.training)
        assert found.drop_rate == rate
