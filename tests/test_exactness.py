"""Whole networks against the framework's: DenseNet-121 in float64 tensor by tensor, lower precision
by the error ratio, and a training run step by step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchvision
from conftest import error_ratio, relative_error, training_step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from densenet_efficient import reference
from densenet_efficient.models import EfficientDenseNet, densenet121, densenet_cifar

MEMORY = pytest.mark.parametrize("memory", ["recompute", "store"])


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    """Three images; 80 px leave the last block 2 x 2 pixels, an odd 5 x 5 in front of them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, 80, 80, generator=generator, dtype=torch.float64)
    return x, torch.tensor([1, 7, 3])


@pytest.fixture(scope="module")
def source() -> nn.Module:
    """torchvision's DenseNet-121 in float64, with norms that are not at their initial values."""
    torch.manual_seed(0)
    model = torchvision.models.densenet121(num_classes=10).double()
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.uniform_(0.7, 1.3)
                norm.bias.uniform_(-0.2, 0.2)
                norm.running_mean.uniform_(-0.1, 0.1)
                norm.running_var.uniform_(0.8, 1.2)
    return model


@pytest.fixture(scope="module")
def expected(
    source: nn.Module, batch: tuple[Tensor, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """torchvision's own outputs and gradients, and the buffers after that step."""
    model = copy.deepcopy(source)
    tensors = training_step(model, *batch)
    assert len(tensors) == 2 + 364
    return tensors, dict(model.named_buffers())


def ours(source: nn.Module, memory: str) -> EfficientDenseNet:
    model = densenet121(num_classes=10, memory=memory).to(next(source.parameters()).dtype)
    model.load_state_dict(source.state_dict())
    return model


class Wrapped(nn.Module):
    """The model with its feature extractor inside torch.utils.checkpoint."""

    def __init__(self, model: EfficientDenseNet, use_reentrant: bool) -> None:
        super().__init__()
        self.model = model
        self.use_reentrant = use_reentrant

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.named_parameters(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.model.forward_features, x, use_reentrant=self.use_reentrant)
        return self.model.forward_head(y)


@MEMORY
@pytest.mark.parametrize("wrapping", [None, "reentrant", "not reentrant"])
def test_densenet121_in_float64_is_torchvisions(
    source: nn.Module,
    batch: tuple[Tensor, Tensor],
    expected: tuple[dict[str, Tensor], dict[str, Tensor]],
    memory: str,
    wrapping: str | None,
) -> None:
    model = ours(source, memory)
    whole = model if wrapping is None else Wrapped(model, wrapping == "reentrant")
    actual = training_step(whole, *batch)
    tensors, buffers = expected
    assert actual.keys() == tensors.keys()
    for name, value in tensors.items():
        assert relative_error(actual[name], value) < 1e-9, name
    for name, value in buffers.items():
        if name.endswith("num_batches_tracked"):
            assert model.get_buffer(name) == value == 1, name
        else:
            torch.testing.assert_close(model.get_buffer(name), value, rtol=1e-11, atol=1e-12)


def test_densenet121_in_eval_mode_is_torchvisions(
    source: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    theirs, model = copy.deepcopy(source).eval(), ours(source, "recompute").eval()
    expected, actual = training_step(theirs, *batch), training_step(model, *batch)
    for name, value in expected.items():
        assert relative_error(actual[name], value) < 1e-9, name
    with torch.no_grad():
        assert relative_error(model(batch[0]), expected["output"]) < 1e-12
    for name, value in theirs.named_buffers():
        assert torch.equal(model.get_buffer(name), value), name


def settled(model: nn.Module) -> nn.Module:
    """Norms that are nearly always on or nearly always off. An error of one rounding turns a ReLU
    whose input is at zero; that is rare, far larger than every other error of float32, and as
    likely in the framework, so it would decide the comparison by chance."""
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.bias.copy_(torch.where(torch.rand_like(norm.bias) < 0.5, -3.0, 3.0))
                norm.bias.add_(torch.rand_like(norm.bias), alpha=0.4)
    return model


@MEMORY
@pytest.mark.parametrize("precision", ["float32", "bfloat16 autocast", "bfloat16"])
def test_densenet121_error_is_the_frameworks(
    source: nn.Module, precision: str, memory: str
) -> None:
    """Both in channels-last memory, the layout the blocks work in."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    autocast = {"dtype": torch.bfloat16} if "autocast" in precision else {}
    theirs = copy.deepcopy(source).to(dtype, memory_format=torch.channels_last)
    if precision == "float32":
        settled(theirs)
    exact = copy.deepcopy(theirs).double()
    model = ours(theirs, memory)
    runs: tuple[list[dict[str, Tensor]], ...] = ([], [], [])
    for _ in range(3):
        x = torch.randn(3, 3, 64, 64).to(dtype, memory_format=torch.channels_last)
        target = torch.randint(10, (3,))
        runs[0].append(training_step(model, x, target, **autocast))
        runs[1].append(training_step(theirs, x, target, **autocast))
        runs[2].append(training_step(exact, x.double(), target))
    ratio = error_ratio(*runs)
    assert ratio.together <= 1.2, ratio
    assert ratio.worst <= 2.0, ratio


def digits() -> tuple[Tensor, Tensor]:
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    return torch.tensor(images).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)


def losses(model: nn.Module, dtype: torch.dtype, steps: int = 50) -> list[float]:
    """A training run on the digits: SGD with Nesterov momentum, batches of 32."""
    images, labels = digits()
    images = images.to(dtype)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(5))
    optimiser = torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    history = []
    for indices in order[: 32 * steps].split(32):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(images[indices]), labels[indices])
        loss.backward()
        optimiser.step()
        history.append(loss.item())
    assert len(history) == steps
    return history


@MEMORY
@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-2)])
def test_training_follows_the_reference(
    bottleneck: bool, dtype: torch.dtype, tolerance: float, memory: str
) -> None:
    model = densenet_cifar(
        16 if bottleneck else 10, 8, bottleneck, in_channels=1, memory=memory
    ).to(dtype)
    plain = reference.DenseNet(
        8, (2, 2, 2), 16, num_classes=10, small_inputs=True, in_channels=1,
        bottleneck=bottleneck, compression=0.5 if bottleneck else 1.0,
    ).to(dtype)  # fmt: skip
    plain.load_state_dict(model.state_dict())
    expected = losses(plain, dtype)
    actual = losses(model, dtype)
    assert expected[-1] < 0.5 * expected[0], "the run does not train"
    for step, (value, reference_value) in enumerate(zip(actual, expected, strict=True)):
        assert abs(value - reference_value) <= tolerance * reference_value, step
