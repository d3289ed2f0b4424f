"""What `path` answers is what a call does."""

import copy
import statistics

import pytest
import torch
from torch import Tensor, nn

from densenet_efficient import EfficientDenseBlock, EfficientDenseNet
from densenet_efficient.bench.accuracy import relative_error
from densenet_efficient.nn.plain import PlainDenseBlock

ROWS = {2: (2, 1), 7: (7, 1), 8: (2, 4), 12: (3, 4)}


def test_path_is_the_one_that_a_call_takes_under_autocast():
    """Dense block, transition and stem, whose path() once answered for the input's own dtype. A
    float32 input keeps a block and a transition in float32, as PyTorch keeps its norms."""
    model = EfficientDenseNet(4, (2, 2), 8, 2, num_classes=3)
    x = torch.randn(2, 8, 8, 8)
    features = model.features
    with torch.autocast("cpu", torch.bfloat16):
        for chosen in (
            features.denseblock1.path(x.bfloat16()),
            features.transition1.path(torch.randn(2, 16, 8, 8).bfloat16()),
            features.stem_path(torch.randn(2, 3, 32, 32)),
        ):
            assert chosen.kind == "kernels" and "bfloat16" in chosen.reason
        chosen = features.denseblock1.path(x)
        assert chosen.kind == "kernels" and "float32, in which autocast" in chosen.reason
    chosen = features.denseblock1.path(x)
    assert "float32" in chosen.reason and "autocast" not in chosen.reason


def plain_layers(dtype: torch.dtype) -> PlainDenseBlock:
    """Two layers of one convolution, whose gradients reach the input at full size."""
    return PlainDenseBlock(2, 4, 2, 4, 0.0, bottleneck=False).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values", [2, 7, 8])
def test_batch_statistics_of_few_values_are_pytorchs(dtype: torch.dtype, values: int) -> None:
    """Known by the shape, whatever the memory format; constant statistics cancel nothing."""
    images, pixels = ROWS[values]
    block = EfficientDenseBlock.from_layers(dict(plain_layers(dtype).named_children()))
    x = torch.randn(images, 4, 1, pixels, dtype=dtype)
    expected = "kernels" if dtype == torch.float64 or values == 8 else "original"
    assert block.path(x).kind == expected
    for norm in (block.denselayer1.norm1, block.denselayer2.norm1):
        assert block.path(x).kind == expected
        norm.eval()
    assert block.path(x).kind == "kernels"


def input_error(block: nn.Module, exact: nn.Module, x: Tensor, dy: Tensor) -> float:
    gradients = []
    for model, dtype in ((block, x.dtype), (exact, torch.float64)):
        leaf = x.to(dtype).requires_grad_()
        gradients += torch.autograd.grad(copy.deepcopy(model)(leaf), leaf, dy.to(dtype))
    return relative_error(*gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values", [2, 7, 8, 12])
def test_few_values_lose_no_more_than_in_pytorch(dtype: torch.dtype, values: int) -> None:
    """The input's gradient, of which two values leave nothing but the block's own gradient: median
    over 15 draws of everything, with gammas that make what cancels large."""
    images, pixels = ROWS[values]
    errors: list[tuple[float, float]] = []
    for seed in range(15):
        torch.manual_seed(seed)
        plain = plain_layers(dtype)
        for layer in plain.children():
            layer.norm1.weight.data.mul_(10)
        ours = EfficientDenseBlock.from_layers(dict(copy.deepcopy(plain).named_children()))
        x = torch.randn(images, 4, 1, pixels, dtype=dtype)
        dy = torch.randn(images, 12, 1, pixels, dtype=dtype)
        exact = copy.deepcopy(plain).double()
        errors.append((input_error(ours, exact, x, dy), input_error(plain, exact, x, dy)))
    mine, theirs = (statistics.median(side) for side in zip(*errors, strict=True))
    assert mine <= 1.2 * theirs


@pytest.mark.slow  # tracing takes seconds
def test_a_graph_takes_few_values_to_pytorch_as_well() -> None:
    """Whatever batch it was compiled for."""
    block = EfficientDenseBlock.from_layers(dict(plain_layers(torch.float32).named_children()))
    graph = torch.compile(copy.deepcopy(block), backend="aot_eager", fullgraph=True, dynamic=True)
    for images in (5, 2, 7, 16):
        x = torch.randn(images, 4, 1, 1)
        torch.testing.assert_close(graph(x), block(x))
        if images < 8:
            assert torch.equal(graph(x), block(x))
