"""Outputs that the backward pass keeps: who shares their memory, and who gets a copy."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import densenet_efficient as de
from densenet_efficient import reference
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


def doubles_its_input(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Nearly what the norm gives, from twice the input, written over it."""
    return nn.BatchNorm2d.forward(norm, x.mul_(2.0))


class Doubling(nn.BatchNorm2d):
    forward = doubles_its_input


def with_a_class_of_its_own(norm: nn.BatchNorm2d) -> None:
    norm.__class__ = Doubling


def with_a_forward_of_its_own(norm: nn.BatchNorm2d) -> None:
    norm.forward = functools.partial(doubles_its_input, norm)  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [with_a_class_of_its_own, with_a_forward_of_its_own])
@pytest.mark.parametrize("rehearse", [False, True])
def test_a_changed_norm_may_write_to_its_input(
    change: Callable[[nn.BatchNorm2d], None], rehearse: bool
) -> None:
    """The last norm is lent the block's features, which backward reads again; what does more than
    a norm gets a copy."""
    model = network().double()
    x = torch.randn(4, 3, 16, 16).double().contiguous(memory_format=torch.channels_last)
    other = copy.deepcopy(model)
    change(other.features.norm5)
    for one in (model, other):
        with capture.rehearsed() if rehearse else contextlib.nullcontext():
            one(x).square().mean().backward()
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        error = (mine.grad - theirs.grad).norm() / mine.grad.norm()
        assert error < 1e-3, name  # the norm's eps counts half as much


def writes_before(module: nn.Module, x: Tensor) -> Tensor:
    x.data.mul_(1.5)
    return _forward(module, x)


def writes_after(module: nn.Module, x: Tensor) -> Tensor:
    y = _forward(module, x)
    y.data.mul_(1.5)
    return y


def wants_contiguous_memory(module: nn.Module, x: Tensor) -> Tensor:
    return _forward(module, x.view(-1).view(x.shape) * 1.5)


def _forward(module: nn.Module, x: Tensor) -> Tensor:
    return type(module).__mro__[1].forward(module, x)  # type: ignore[attr-defined]


def in_a_subclass(module: nn.Module, forward: Any) -> None:
    module.__class__ = type("Own", (type(module),), {"forward": forward})


def of_its_own(module: nn.Module, forward: Any) -> None:
    in_a_subclass(module, type(module).forward)
    module.forward = functools.partial(forward, module)


@pytest.mark.parametrize("place", [in_a_subclass, of_its_own])
@pytest.mark.parametrize("forward", [writes_before, writes_after, wants_contiguous_memory])
@pytest.mark.parametrize("name", ["denseblock1", "transition1", "denseblock2"])
def test_a_forward_of_somebody_elses_may_write(name: str, forward: Any, place: Any) -> None:
    """Before or after the one of ours, through a path that autograd does not see."""
    torch.manual_seed(0)
    plain = reference.DenseNet(4, (2, 2), 8, num_classes=3).double()
    ours = de.convert(copy.deepcopy(plain))
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    for model in (plain, ours):
        place(getattr(model.features, name), forward)
        model(x).square().sum().backward()
    for (at, theirs), mine in zip(plain.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-9, msg=at)


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
