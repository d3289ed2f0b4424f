"""Outputs that the backward pass keeps: who shares their memory, and who gets a copy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import densenet_efficient as de
from densenet_efficient.core import capture, sharing

_is_cow = torch._C._is_cow_tensor  # type: ignore[attr-defined]


def network() -> nn.Module:
    torch.manual_seed(0)
    return de.densenet_cifar(22, 12, num_classes=10)


def test_a_captured_call_copies_at_once() -> None:
    """PyTorch would make the copy of a copy-on-write clone outside the graph."""
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)[:, :5]
    assert _is_cow(sharing.share(x))
    with capture.rehearsed():
        given = sharing.share(x)
    assert not _is_cow(given) and given.stride() == x.stride()
    assert torch.equal(given, x) and given.data_ptr() != x.data_ptr()


def test_a_replaced_norm_may_write_to_its_input() -> None:
    """The last norm is lent the block's features; another module in its place is not."""

    class Writes(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.mul_(1.0))

    model = network()
    x = torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    other = copy.deepcopy(model)
    writes = Writes(other.features.norm5.num_features)
    writes.load_state_dict(other.features.norm5.state_dict())
    other.features.norm5 = writes
    for one in (model, other):
        one(x).square().mean().backward()
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("memory", ["recompute", "store"])
def test_a_rehearsed_step_has_the_bits_of_an_ordinary_one(memory: str) -> None:
    model = network()
    for module in model.modules():
        if isinstance(module, de.EfficientDenseBlock):
            module.memory = memory
    x = torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    steps = []
    for rehearse in (False, True):
        one = copy.deepcopy(model)
        if rehearse:
            with capture.rehearsed():
                loss = one(x).square().mean()
                loss.backward()
        else:
            loss = one(x).square().mean()
            loss.backward()
        steps.append([loss.detach(), *(p.grad for p in one.parameters()), *one.buffers()])
    for mine, theirs in zip(*steps, strict=True):
        assert torch.equal(mine, theirs)
