"""What convert() refuses, by name and with nothing changed, and adapters of one's own."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable

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
from tests.support.networks import network, snapshot
from tests.support.peer import DenseBlock, DenseLayer


def with_activation(model: nn.Module) -> nn.Module:
    model.features.denseblock2.denselayer3.relu2 = nn.LeakyReLU()
    return model


def with_group_norm(model: nn.Module) -> nn.Module:
    model.features.denseblock1.denselayer2.norm2 = nn.GroupNorm(4, 16)
    return model


def with_lazy_norm(model: nn.Module) -> nn.Module:
    model.features.denseblock1.denselayer2.norm1 = nn.LazyBatchNorm2d()
    return model


def with_strided_convolution(model: nn.Module) -> nn.Module:
    model.features.denseblock1.denselayer1.conv2 = nn.Conv2d(16, 4, 3, stride=2)
    return model


def with_extra_child(model: nn.Module) -> nn.Module:
    model.features.denseblock1.denselayer1.attention = nn.Identity()
    return model


def with_foreign_layer(model: nn.Module) -> nn.Module:
    model.features.denseblock1.denselayer1 = nn.Conv2d(8, 4, 3, padding=1)
    return model


def with_forward(model: nn.Module) -> nn.Module:
    block = model.features.denseblock1
    block.forward = lambda x: x
    return model


def with_nan(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.features.denseblock1.denselayer1.conv1.weight.fill_(float("nan"))
    return model


def prepared_for_quantisation(model: nn.Module) -> nn.Module:
    model.features.denseblock1.denselayer1.conv1.qconfig = object()
    return model


def traced(model: nn.Module) -> nn.Module:
    return torch.fx.symbolic_trace(model)


class ReversedBlock(DenseBlock):
    """A subclass that concatenates the new channels first."""

    def forward(self, init_features: Tensor) -> Tensor:
        features = [init_features]
        for layer in self.values():
            features.insert(0, layer(features))
        return torch.cat(features, 1)


def with_subclass(model: nn.Module) -> nn.Module:
    model.features.denseblock1 = ReversedBlock(2, 8, 4, 4, 0.0)
    return model


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (with_activation, "denseblock2.*denselayer3: relu2 is LeakyReLU"),
        (with_group_norm, "denseblock1.*denselayer2: norm2 is GroupNorm"),
        (with_lazy_norm, "denseblock1.*denselayer2.norm1 is lazy"),
        (with_strided_convolution, "denselayer1: conv2 has groups 1, stride"),
        (with_extra_child, "denselayer1 has children .*attention|denselayer1 is"),
        (with_foreign_layer, "denselayer1 is Conv2d"),
        (with_forward, "denseblock1.*forward was replaced"),
        (with_nan, "not finite"),
        (prepared_for_quantisation, "denselayer1.conv1 is quantised"),
        (traced, "traced by torch.fx"),
        (with_subclass, "ReversedBlock.*unknown class.*register_adapter"),
    ],
)
def test_refused_by_name_and_unchanged(
    prepare: Callable[[nn.Module], nn.Module], reason: str
) -> None:
    model = prepare(network())
    before = snapshot(model)
    with pytest.raises(ConversionError, match=f"(?s){reason}"):
        convert(model)
    assert snapshot(model) == before


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


def test_nothing_to_convert_is_an_error() -> None:
    with pytest.raises(ConversionError, match="nothing to convert in Linear"):
        convert(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got str"):
        convert("densenet121")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="memory must be"):
        convert(network(), memory="forget")


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
