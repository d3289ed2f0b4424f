"""What a stem whose convolution is an operator keeps for its backward pass: the images, of which it
makes the convolution's result again, unless the first block stores everything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import densenet_efficient
from densenet_efficient.models.densenet import densenet121
from densenet_efficient.nn.dense_block import DenseBlockExecution
from tests.support.identifiers import identifier
from tests.support.stem_convolution import STEP, Calls, images, network, pretend

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Every device and dtype has the operator."""
    return pretend(monkeypatch)


def set_memory(model: nn.Module, memory: str) -> None:
    for module in model.modules():
        if isinstance(module, DenseBlockExecution):
            module.memory = memory


def gradients_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(model(x).logsumexp(1).sum(), list(model.parameters())))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=identifier)
def test_what_is_made_again_is_what_was_kept(calls: Calls, dtype: torch.dtype) -> None:
    """Bit by bit, also in scratch that was used before."""
    ours, x = network()[0], images(dtype=FP32)
    found = []
    for memory in ("recompute", "auto", "store"):
        set_memory(ours, memory)
        calls.names.clear()
        with torch.autocast("cpu", BF16, enabled=dtype == BF16):
            found.append([gradients_of(ours, x) for _ in range(2)][-1])
        assert calls.names == STEP[memory == "store" :] * 2
    for one, *others in zip(*found, strict=True):
        assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("memory", ["recompute", "store"])
def test_the_result_is_kept_only_to_be_stored(calls: Calls, memory: str) -> None:
    ours, x = network()[0], images(dtype=FP32)
    set_memory(ours, memory)
    shapes: list[tuple[int, ...]] = []

    def pack(kept: Tensor) -> Tensor:
        shapes.append(tuple(kept.shape))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ours(x).sum().backward()
    assert ((2, 6, 19, 17) in shapes) == (memory == "store")


@pytest.mark.usefixtures("calls")
def test_the_plan_counts_what_is_made_again() -> None:
    """It is made in the scratch of the blocks, and missing from the peak."""
    model, found = densenet121(), {}
    for memory in ("recompute", "auto", "store"):
        set_memory(model, memory)
        found[memory] = densenet_efficient.plan(model, (64, 3, 224, 224), BF16)
        lifetimes = {row.name: row.lifetime for row in found[memory].rows}
        assert lifetimes["conv0 output"] == ("kept" if memory == "store" else "transient")
    features, bottleneck = 56 * 56 * 256 * 2, 56 * 56 * 128 * 2
    gradients = sum(p.numel() * 4 for p in model.parameters())
    for memory in ("recompute", "auto"):
        each = (found[memory].peak_bytes - gradients) / 64
        assert each == pytest.approx(2 * features + 2 * bottleneck, rel=0.02)
    for parameter in model.features.conv0.parameters():
        parameter.requires_grad_(False)
    frozen = densenet_efficient.plan(model, (64, 3, 224, 224), BF16)
    assert next(row.lifetime for row in frozen.rows if row.name == "conv0 output") == "kept"


def test_frozen_weights_leave_the_images_to_the_caller(calls: Calls) -> None:
    """Who may write to them between forward and backward."""
    ours, plain = (m.double() for m in network())
    found = []
    for model in (ours, plain):
        model.features.conv0.weight.requires_grad_(False)
        x = images().fill_(0.5)
        loss = model(x).logsumexp(1).sum()
        x.mul_(2)
        loss.backward()
        found.append(model.features.norm0.weight.grad)
    torch.testing.assert_close(*found)
    assert calls.names == ["stem_conv_forward"]


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("batched", [False, True])
def test_other_derivatives_of_the_stem(batched: bool) -> None:
    """Second ones, and batched first ones, through what is made again."""
    found = []
    x, directions = images(), torch.randn(3, 2, 3, dtype=FP64)
    for model in (m.double() for m in network()):
        parameters = [p for n, p in model.named_parameters() if n.startswith("features.")][:3]
        y = model(x)
        if batched:
            gradients = torch.autograd.grad(y, parameters, directions, is_grads_batched=True)
        else:
            first = torch.autograd.grad(y.logsumexp(1).sum(), parameters, create_graph=True)
            size = sum(g.square().sum() for g in first)
            gradients = torch.autograd.grad(size, parameters)
        found.append(gradients)
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected)
