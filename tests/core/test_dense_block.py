"""The block's algorithm against the reference, on the path this machine takes."""

import pytest
import torch
from torch import nn

import densenet_efficient as de
from densenet_efficient import reference
from densenet_efficient.models.densenet import EfficientDenseNet
from densenet_efficient.ops import dispatch, mixed
from tests.support.block_pair import MEMORY, assert_same, pair, step


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bottleneck": False},  # DenseNet-40-12, d2l
        {"dims": 1},
        {"dims": 3},  # medical imaging
        {"dilation": 2},  # dense prediction
        {"momentum": None},  # cumulative average
        {"eps": 1.1e-5, "momentum": 0.01},
    ],
    ids=str,
)
def test_matches_reference(memory, training, options):
    block, ours = pair(memory, **options)
    x = torch.randn(3, 10, *(5, 7, 4)[: options.get("dims", 2)], dtype=torch.float64)
    for _ in range(2):
        expected, got = step(block.train(training), x), step(ours.train(training), x)
        assert_same(expected, got)


@pytest.mark.parametrize("memory", MEMORY)
def test_norm_modes_may_differ_inside_a_block(memory):
    block, ours = pair(memory)
    for module in (block, ours):
        module.denselayer1.norm2.eval()  # frozen
        module.denselayer2.norm1.eval()
        module.denselayer3.norm1.eval().requires_grad_(False)
    x = torch.randn(4, 10, 6, 5, dtype=torch.float64)
    for _ in range(2):
        assert_same(step(block, x), step(ours, x))


@pytest.mark.parametrize("training", [True, False])
def test_norms_without_affine_or_running_statistics(training):
    layers = []
    for make in (reference.DenseLayer, reference.DenseLayer):
        torch.manual_seed(0)
        group = nn.ModuleDict()
        for i in range(3):
            layer = make(10 + 6 * i, 6, 4, 0.0).double()
            layer.norm1 = nn.BatchNorm2d(10 + 6 * i, affine=False).double()
            layer.norm2 = nn.BatchNorm2d(24, track_running_stats=False).double()
            if i == 1:
                layer.norm2.bias = None  # weight without bias
            group[f"denselayer{i + 1}"] = layer
        layers.append(group)
    block = reference.DenseBlock(1, 10, 4, 6, 0.0)
    nn.ModuleDict.__init__(block, layers[0])
    ours = de.EfficientDenseBlock.from_layers(dict(layers[1].items()))
    x = torch.randn(2, 10, 5, 5, dtype=torch.float64)
    assert_same(step(block.train(training), x), step(ours.train(training), x))


def test_convolution_bias_and_kernel_size():
    def build():
        torch.manual_seed(0)
        layers = {}
        for i in range(2):
            layer = reference.DenseLayer(8 + 4 * i, 4, 2, 0.0)
            layer.conv1 = nn.Conv2d(8 + 4 * i, 8, 1, bias=True)
            layer.conv2 = nn.Conv2d(8, 4, 5, padding=2, groups=2, bias=True)
            layers[f"denselayer{i + 1}"] = layer.double()
        return layers

    block = reference.DenseBlock(1, 8, 2, 4, 0.0)
    nn.ModuleDict.__init__(block, build())
    ours = de.EfficientDenseBlock.from_layers(build())
    x = torch.randn(2, 8, 6, 7, dtype=torch.float64)
    assert_same(step(block, x), step(ours, x))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("bottleneck", [True, False])
def test_gradcheck(memory, bottleneck):
    _, ours = pair(memory, layers=2, channels=2, growth=1, bottleneck=bottleneck)
    x = torch.randn(2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    parameters = list(ours.parameters())

    def run(x, *parameters):
        return ours(x)

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=False)


@pytest.mark.parametrize("channelwise", [False, True])
@pytest.mark.parametrize("memory", MEMORY)
def test_dropout(memory, channelwise):
    """Exact against autograd with the same masks, which depend on torch's seed alone."""
    _, ours = pair(memory, drop_rate=0.4)
    if channelwise:
        ours._efficient.parts = _channelwise_parts
    x = torch.randn(3, 10, 4, 4, dtype=torch.float64)
    torch.manual_seed(5)
    first = step(ours, x)
    torch.manual_seed(5)
    second = step(ours, x)
    assert torch.equal(first["y"], second["y"]) and torch.equal(first["dx"], second["dx"])
    torch.manual_seed(6)
    assert not torch.equal(first["y"], step(ours, x)["y"])

    # The masks can be read off the outputs: a dropped value is exactly zero.
    new = first["y"][:, 10:]
    masks = (new != 0).double() / 0.6
    dropped = (new == 0).double().mean().item()
    assert 0.2 < dropped < 0.6
    if channelwise:
        assert all(m.unique().numel() == 1 for m in masks.flatten(0, 1))

    block, _ = pair(memory)

    def with_masks(module, x):
        features = [x]
        for i, layer in enumerate(module.values()):
            features.append(layer(features) * masks[:, 6 * i : 6 * (i + 1)])
        return torch.cat(features, 1)

    fresh = pair(memory, drop_rate=0.4)[1]
    if channelwise:
        fresh._efficient.parts = _channelwise_parts
    torch.manual_seed(5)
    assert_same(step(block, x, call=with_masks), step(fresh, x))
    eval_block, eval_ours = pair(memory, drop_rate=0.4)
    assert_same(step(eval_block.eval(), x), step(eval_ours.eval(), x))


def _channelwise_parts(layer):
    return de.LayerParts(layer.norm1, layer.conv1, layer.norm2, layer.conv2, 0.4, True)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_dropout_rates_at_the_ends(rate):
    _, ours = pair(drop_rate=rate)
    y = ours(torch.randn(2, 10, 4, 4, dtype=torch.float64))
    assert bool((y[:, 10:] == 0).all()) == (rate == 1.0)
    assert torch.isfinite(y).all()


@pytest.fixture
def on_a_gpu(monkeypatch):
    """The path that float32 and float64 take on a GPU: compiled operators around the general
    convolutions."""
    monkeypatch.setattr(
        dispatch, "choose", lambda device, dtype, dims: dispatch._on_a_gpu(dtype, dims, tf32=False)
    )


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("dims", [2, 3])
def test_a_block_in_float64_as_on_a_gpu(dims):
    block, ours = pair(dims=dims)
    x = torch.randn(2, 10, *(3, 4, 5)[:dims], dtype=torch.float64)
    expected = (mixed.WITHOUT_CONVOLUTIONS, mixed.OTHER_DIMENSIONS_WITHOUT_CONVOLUTIONS)
    assert ours.path(x).operators is expected[dims - 2]
    assert_same(step(block, x), step(ours, x))


@pytest.mark.usefixtures("on_a_gpu")
def test_a_network_in_float64_as_on_a_gpu():
    torch.manual_seed(0)
    model = EfficientDenseNet(6, (2, 2), 8, num_classes=3).double()
    plain = reference.DenseNet(6, (2, 2), 8, num_classes=3).double()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 48, 40, dtype=torch.float64)
    assert model.features.stem_path(x).operators is mixed.WITHOUT_CONVOLUTIONS
    assert_same(step(plain, x), step(model, x))
