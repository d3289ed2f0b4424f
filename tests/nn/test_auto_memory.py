"""What `memory="auto"` keeps, and blocks that keep the bottlenecks of some layers."""

import copy

import pytest
import torch
from torch import nn

import densenet_efficient as de
from densenet_efficient import reference
from densenet_efficient.models.networks import NetworkSpec
from densenet_efficient.nn.dense_block import DenseBlockExecution
from densenet_efficient.ops.dtypes import FLOATING
from tests.support.block_pair import assert_same, pair, step
from tests.support.kept_memory import kept_bytes

SMALL = {"growth_rate": 8, "block_config": (2, 4, 6), "num_init_features": 16}
CIFAR = {"depth": 100, "growth_rate": 12}


def with_last_convolution() -> nn.Module:
    """Of another kind than the chain's, after its last block."""
    model = reference.DenseNet(**SMALL)
    model.features.extra = nn.Conv2d(model.classifier.in_features, 99, 1)
    return de.convert(model)


def kept(model: nn.Module) -> list[int]:
    return [m.kept_layers for m in model.modules() if isinstance(m, DenseBlockExecution)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("batch", [1, 16, 512])
@pytest.mark.parametrize(
    ("name", "options"),
    [("densenet121", {}), ("densenet161", {}), ("densenet264", {}), ("densenet_cifar", CIFAR)],
)
def test_what_is_kept_costs_no_peak(name, options, batch, dtype):
    network = NetworkSpec(name, **options)
    size = network.default_image_size
    with torch.device("meta"):
        auto, lean = network.build("auto"), network.build("recompute")
    shape = (batch, 3, size, size)
    assert sum(kept(auto)) > 20 and kept(lean) == [0] * len(kept(lean))
    assert de.plan(auto, shape, dtype).peak_bytes == de.plan(lean, shape, dtype).peak_bytes


def test_the_last_layers_of_late_blocks_are_kept_as_far_as_there_is_room():
    """Live on the way from block i + 1 to i, in channels of the first block's pixels: 640, 576, 528
    and 496 for DenseNet-121. That leaves 112 for block 3, 8 a layer, and 32 more for block 4."""
    assert kept(de.densenet121()) == [0, 0, 14, 16]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (lambda: de.convert(reference.DenseNet(**SMALL)), [0, 1, 5]),
        (lambda: de.EfficientDenseNet(**SMALL), [0, 1, 5]),
        (lambda: de.EfficientDenseNet(**SMALL, features_only=True), [0, 0, 0]),
        (lambda: de.EfficientDenseNet(**SMALL, num_classes=None), [0, 0, 0]),
        (lambda: de.EfficientDenseNet(**SMALL, memory="recompute"), [0, 0, 0]),
        (lambda: de.EfficientDenseNet(**SMALL, memory="store"), [2, 4, 6]),
        (lambda: de.EfficientDenseNet(**SMALL, bottleneck=False), [0, 0, 0]),
        (lambda: de.convert(nn.Sequential(reference.DenseNet(**SMALL).features)), [0, 0, 0]),
        (
            lambda: de.convert(nn.Sequential(reference.DenseNet(**SMALL), nn.Conv2d(1, 1, 1))),
            [0, 0, 0],
        ),
        (lambda: de.convert(nn.Sequential(reference.DenseNet(**SMALL), nn.ReLU())), [0, 1, 5]),
        (
            lambda: de.convert(nn.ModuleList(reference.DenseNet(**SMALL) for _ in range(2))),
            [0] * 6,
        ),
        (with_last_convolution, [0, 0, 0]),
        (lambda: de.EfficientFCDenseNet(bottleneck=True), [0] * 11),
        (lambda: de.EfficientDenseBlock(3, 8, 4, 4, 0.0, memory="auto"), [0]),
    ],
)
def test_where_more_may_follow_nothing_is_kept(module, expected):
    assert kept(module()) == expected


def test_converting_again_decides_again():
    model = de.convert(reference.DenseNet(**SMALL), memory="store")
    assert kept(de.convert(model)) == [0, 1, 5]
    model.features.denseblock3.memory = "recompute"
    assert kept(model) == [0, 1, 0] and model.features.denseblock3.memory == "recompute"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (-1, "kept_layers must be an integer of at least 0, got -1"),
        ("2", "kept_layers must be an integer of at least 0, got '2'"),
        (4, "kept_layers must be at most the 3 layers, got 4"),
    ],
)
def test_a_number_of_layers_that_cannot_be_kept_is_refused(value, text):
    _, block = pair("store", layers=3)
    with pytest.raises(ValueError, match=text):
        block.kept_layers = value
    assert block.memory == "store" and "memory='store'" in repr(block)
    block.kept_layers = 2
    assert "memory='auto', kept_layers=2" in repr(block)


@pytest.mark.parametrize("layers", range(5))
@pytest.mark.parametrize("drop_rate", [0.0, 0.4])
def test_any_number_of_layers_gives_the_same_bits(layers, drop_rate):
    _, lean = pair("recompute", layers=4, drop_rate=drop_rate)
    partly = copy.deepcopy(lean)
    partly.kept_layers = layers
    x = torch.randn(2, 10, 7, 5, dtype=torch.float64)
    for _ in range(3):  # the third replays what the second recorded
        torch.manual_seed(3)
        expected = step(lean, x)
        torch.manual_seed(3)
        assert_same(expected, step(partly, x), tolerance=0)


def test_only_the_last_layers_bottlenecks_are_held():
    _, block = pair(layers=5, channels=10, growth=6)
    x = torch.randn(2, 10, 8, 8, dtype=torch.float64)
    bottleneck = 2 * 24 * 8 * 8 * 8
    lean = kept_bytes(block, x)
    for layers in range(6):
        block.kept_layers = layers
        assert kept_bytes(block, x) == lean + layers * bottleneck


def test_a_pickle_keeps_what_was_decided(tmp_path):
    model = de.EfficientDenseNet(**SMALL)
    torch.save(model, tmp_path / "model.pt")
    assert kept(torch.load(tmp_path / "model.pt", weights_only=False)) == [0, 1, 5]
    assert kept(copy.deepcopy(model)) == [0, 1, 5]


SHAPE = (16, 3, 64, 64)


@pytest.mark.parametrize("dtype", sorted(FLOATING, key=str))
def test_a_budget_is_filled_and_not_exceeded(dtype):
    model = de.EfficientDenseNet(**SMALL)
    lean, whole = (
        de.plan(de.EfficientDenseNet(**SMALL, memory=memory), SHAPE, dtype).peak_bytes
        for memory in ("recompute", "store")
    )
    before = 0
    for budget in torch.linspace(lean, whole, 7).tolist():
        found = de.fit_memory(model, SHAPE, max(int(budget), lean), dtype)
        assert found.peak_bytes <= max(budget, lean)
        assert sum(kept(model)) == sum(found.kept_bottlenecks.values()) >= before
        before = sum(kept(model))
    assert de.fit_memory(model, SHAPE, whole, dtype).peak_bytes == whole
    assert kept(model) == [2, 4, 6]


def test_an_fc_densenet_fits_a_budget_too():
    model = de.EfficientFCDenseNet(bottleneck=True)
    shape = (1, 3, 64, 64)
    lean = de.plan(model, shape).peak_bytes
    assert lean < de.fit_memory(model, shape, 1.3 * lean).peak_bytes <= 1.3 * lean
    assert sum(kept(model)) > 10


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (((16, 3, 64), 1e9), ValueError, "4 positive sizes"),
        ((SHAPE, 10**400), ValueError, "budget must be a positive number of bytes, got 1000"),
        ((SHAPE, 0), ValueError, "budget must be a positive number of bytes, got 0"),
        ((SHAPE, "8GB"), ValueError, "budget must be a positive number of bytes, got '8GB'"),
        ((SHAPE, 1000), ValueError, "budget must be at least the [0-9,]+ bytes .* got 1,000"),
        ((SHAPE, 1e9, torch.int8), TypeError, "dtype"),
    ],
)
def test_a_budget_that_cannot_be_met_changes_nothing(arguments, error, text):
    model = de.EfficientDenseNet(**SMALL)
    model.features.denseblock2.memory = "store"
    with pytest.raises(error, match=text):
        de.fit_memory(model, *arguments)
    modes = [m.memory for m in model.modules() if isinstance(m, DenseBlockExecution)]
    assert modes == ["auto", "store", "auto"] and kept(model) == [0, 4, 5]
