"""Whole networks against PyTorch's: DenseNet-121 in float64 tensor by tensor, lower precision
by the error ratio, and a training run step by step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from densenet_efficient import reference
from densenet_efficient.bench.accuracy import (
    error_ratio,
    moved_norms,
    relative_error,
    training_step,
)
from densenet_efficient.models.densenet import EfficientDenseNet, densenet121, densenet_cifar
from densenet_efficient.nn.dense_block import EfficientDenseBlock
from tests.support.peer import torchvision

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
    return moved_norms(model, (0.7, 1.3), 0.1, statistics=True)


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


@pytest.mark.slow
@MEMORY
@pytest.mark.parametrize("mixed", [True, False])
def test_densenet121_in_bfloat16_errs_no_more_than_pytorch(
    source: nn.Module, mixed: bool, memory: str
) -> None:
    """Autocast, and a pure bfloat16 model."""
    dtype = torch.float32 if mixed else torch.bfloat16
    autocast = torch.bfloat16 if mixed else None
    theirs = copy.deepcopy(source).to(dtype)
    exact = copy.deepcopy(theirs).double()
    model = ours(theirs, memory)
    runs: tuple[list[dict[str, Tensor]], ...] = ([], [], [])
    for _ in range(3):
        x, target = torch.randn(3, 3, 64, 64).to(dtype), torch.randint(10, (3,))
        runs[0].append(training_step(model, x, target, autocast))
        runs[1].append(training_step(theirs, x, target, autocast))
        runs[2].append(training_step(exact, x.double(), target))
    ratio = error_ratio(*runs)
    assert ratio.accepted, ratio


@pytest.mark.slow
def test_untrained_densenet121_in_bfloat16_errs_no_more_than_pytorch() -> None:
    """At the initial values the network does not depend on the scale of its first norm: that
    gradient is a sum in which everything cancels, and shows any bias in what is summed."""
    theirs = torchvision.models.densenet121(num_classes=10)
    model, exact = ours(theirs, "recompute"), copy.deepcopy(theirs).double()
    runs: tuple[list[dict[str, Tensor]], ...] = ([], [], [])
    for _ in range(3):
        x, target = torch.randn(2, 3, 224, 224), torch.randint(10, (2,))
        runs[0].append(training_step(model, x, target, torch.bfloat16))
        runs[1].append(training_step(theirs, x, target, torch.bfloat16))
        runs[2].append(training_step(exact, x.double(), target))
    ratio = error_ratio(*runs)
    assert ratio.accepted, ratio


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bfloat16 autocast"])
def test_both_memory_modes_give_the_same_bits(mixed: bool) -> None:
    """What is computed again is computed the same: the error of one mode is that of both."""
    source = torchvision.models.densenet121(num_classes=10)
    x, target = torch.randn(2, 3, 96, 96), torch.tensor([1, 7])
    autocast = torch.bfloat16 if mixed else None
    first, second = (
        training_step(ours(source, memory), x, target, autocast)
        for memory in ("recompute", "store")
    )
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.slow
@MEMORY
def test_densenet121s_blocks_in_float32_err_no_more_than_the_framework(
    source: nn.Module, memory: str
) -> None:
    """Block by block: across a whole network a single ReLU whose input rounds to the other side of
    zero outweighs all of float32's other errors a thousandfold, and decides by chance."""
    runs: tuple[list[dict[str, Tensor]], ...] = ([], [], [])
    target = torch.tensor([3, 1, 2])
    for _ in range(3):
        for run in runs:
            run.append({})
        for i in range(1, 5):
            theirs = copy.deepcopy(source.features.get_submodule(f"denseblock{i}")).float()
            model = EfficientDenseBlock.from_layers(dict(theirs.items()), memory=memory)
            exact = copy.deepcopy(theirs).double()
            x = torch.relu(torch.randn(3, theirs.denselayer1.norm1.num_features, 2, 2))
            for run, block in zip(runs, (model, theirs, exact), strict=True):
                x = x.to(next(block.parameters()).dtype)
                for name, value in training_step(Pooled(block), x, target).items():
                    run[-1][f"{i}.{name}"] = value.clone()
    ratio = error_ratio(*runs)
    assert ratio.accepted, ratio


class Pooled(nn.Module):
    """A block under norm, ReLU and global pooling, as norm5 ends a DenseNet."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.batch_norm(self.block(x), None, None, training=True)
        return torch.relu(y).mean((2, 3))


def digits() -> tuple[Tensor, Tensor]:
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    return torch.tensor(images).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)


def losses(
    model: nn.Module, dtype: torch.dtype, lr: float, batch: int, steps: int = 50
) -> list[float]:
    """A training run on the digits: SGD with Nesterov momentum."""
    images, labels = digits()
    images = images.to(dtype)
    shuffle = torch.Generator().manual_seed(5)
    order = torch.cat([torch.randperm(len(images), generator=shuffle) for _ in range(4)])
    optimiser = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    history = []
    for indices in order[: batch * steps].split(batch):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(images[indices]), labels[indices])
        loss.backward()
        optimiser.step()
        history.append(loss.item())
    assert len(history) == steps
    return history


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bottleneck", "memory"), [(True, "recompute"), (True, "store"), (False, "recompute")]
)
@pytest.mark.parametrize(
    ("dtype", "tolerance", "lr", "batch", "trained"),
    [
        (torch.float64, 1e-8, 0.05, 32, 0.3),
        # Slower: in float32 two runs of PyTorch itself, in NCHW and in channels-last memory,
        # part by 10 % within 50 steps at the rate above, and by 0.5 % at this one.
        (torch.float32, 1e-2, 0.01, 128, 0.9),
    ],
)
def test_training_follows_the_reference(
    bottleneck: bool,
    dtype: torch.dtype,
    tolerance: float,
    lr: float,
    batch: int,
    trained: float,
    memory: str,
) -> None:
    depth = 16 if bottleneck else 10
    model = densenet_cifar(depth, 8, bottleneck, in_channels=1, memory=memory).to(dtype)
    plain = reference.DenseNet(
        8, (2, 2, 2), 16, num_classes=10, small_inputs=True, in_channels=1,
        bottleneck=bottleneck, compression=0.5 if bottleneck else 1.0,
    ).to(dtype)  # fmt: skip
    plain.load_state_dict(model.state_dict())
    expected = losses(plain, dtype, lr, batch)
    actual = losses(model, dtype, lr, batch)
    assert expected[-1] < trained * expected[0], "the run does not train"
    for step, (value, expected_value) in enumerate(zip(actual, expected, strict=True)):
        assert abs(value - expected_value) <= tolerance * expected_value, step
