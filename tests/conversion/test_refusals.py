"""What convert() leaves or refuses besides the wrong uses of `support/wrong_calls`, and adapters of
your own."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from densenet_efficient.bench.accuracy import relative_error
from densenet_efficient.conversion import ConversionError, block_adapter, convert, register_adapter
from densenet_efficient.nn.dense_block import (
    DenseBlockExecution,
    EfficientDenseBlock,
    standard_parts,
)
from tests.support.networks import network
from tests.support.peer import DenseBlock, DenseLayer


def with_activation(model: nn.Module) -> nn.Module:
    model.features.denseblock2.denselayer3.relu2 = nn.LeakyReLU()
    return model


def test_scripted_models_are_refused() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.denselayer1 = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.denselayer1(x)

    with pytest.raises(ConversionError, match="script module"):
        convert(torch.jit.script(Plain()))


def test_without_strict_the_rest_is_converted() -> None:
    model = with_activation(network())
    convert(model, strict=False)
    assert isinstance(model.features.denseblock1, EfficientDenseBlock)
    assert type(model.features.denseblock2) is DenseBlock


# Adapters of one's own


class OwnBlock(nn.Module):
    """Layers under a ModuleDict's names, concatenated in the given order."""

    def __init__(self, reverse: bool = False) -> None:
        super().__init__()
        self.reverse = reverse
        for i in range(2):
            self.add_module(f"layer{i}", DenseLayer(6 + 4 * i, 4, 2, 0.0))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            parts = [layer(x), x] if self.reverse else [x, layer(x)]
            x = torch.cat(parts, 1)
        return x


def test_registered_classes_convert_and_the_self_check_finds_a_wrong_adapter() -> None:
    register_adapter(OwnBlock, block_adapter(standard_parts))
    model = nn.Sequential(OrderedDict(body=OwnBlock().double()))
    expected = copy.deepcopy(model)
    convert(model)
    assert isinstance(model.body, DenseBlockExecution)
    x = torch.randn(3, 6, 5, 5, dtype=torch.float64)
    assert relative_error(model(x), expected(x)) < 1e-12
    wrong = nn.Sequential(OrderedDict(body=OwnBlock(reverse=True)))
    with pytest.raises(ConversionError, match="self-check failed: output: largest difference"):
        convert(wrong)
    assert type(wrong.body) is OwnBlock
    with pytest.raises(TypeError, match="source must be"):
        register_adapter("OwnBlock", block_adapter(standard_parts))
    with pytest.raises(TypeError, match="adapter must be"):
        register_adapter(OwnBlock, standard_parts)  # type: ignore[arg-type]
