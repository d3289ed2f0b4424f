"""Transitions: against the reference, in a chain with their neighbours, and what they refuse."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import densenet_efficient as de
from densenet_efficient import reference
from densenet_efficient.bench.accuracy import moved_norms
from densenet_efficient.models.densenet import EfficientDenseNet
from tests.support.block_pair import assert_same, step


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("image", [(7, 6), (2, 2), (5, 2)])
def test_transition_matches_reference(training, image):
    torch.manual_seed(0)
    module = reference.Transition(10, 5).double()
    ours = de.EfficientTransition(10, 5).double()
    ours.load_state_dict(module.state_dict())
    x = torch.randn(3, 10, *image, dtype=torch.float64)
    assert_same(step(module.train(training), x), step(ours.train(training), x))


def test_gradcheck_of_transition_and_stem():
    """In one chain: stem convolution, norm + ReLU + max-pooling, block, transition, last norm."""
    torch.manual_seed(0)
    model = moved_norms(EfficientDenseNet(2, (1, 1), 3, 2, num_classes=2).double())
    x = torch.randn(2, 3, 14, 11, dtype=torch.float64, requires_grad=True)
    parameters = [p for n, p in model.named_parameters() if "norm" in n or "transition" in n]

    def run(x, *parameters):
        return model.features(x)

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


def test_transition_children_can_be_called_one_by_one():
    torch.manual_seed(0)
    ours = de.EfficientTransition(10, 5).double().eval()
    x = torch.randn(2, 10, 6, 6, dtype=torch.float64)
    by_hand = ours.pool(ours.conv(ours.relu(ours.norm(x))))
    torch.testing.assert_close(ours(x), by_hand, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("images", [0, 2])
def test_images_that_a_transition_leaves_nothing_of_are_refused_before_they_are_counted(images):
    transition = de.EfficientTransition(3, 2).train()
    before = copy.deepcopy(transition.state_dict())
    with pytest.raises(ValueError, match="at least 2 pixels in every direction"):
        transition(torch.zeros(images, 3, 1, 4))
    for name, value in transition.state_dict().items():
        assert torch.equal(value, before[name]), name


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda transition: None,
    "eps": lambda transition: setattr(transition.norm, "eps", 0.5),
    "momentum": lambda transition: setattr(transition.norm, "momentum", 0.7),
    "eval": lambda transition: transition.eval(),
    "norm": lambda transition: transition.norm.eval(),
    "no dropout": lambda transition: transition.drop.eval(),
    "drop rate": lambda transition: setattr(transition.drop, "p", 0.2),
    "no gamma": lambda transition: setattr(transition.norm, "weight", None),
    "bias": lambda transition: setattr(transition.conv, "bias", nn.Parameter(torch.ones(4))),
    "fewer": lambda transition: setattr(
        transition.conv, "weight", nn.Parameter(transition.conv.weight[:3].detach())
    ),
    "data": lambda transition: setattr(transition.conv.weight, "data", torch.ones(5, 6, 1, 1)),
    "kernel": lambda transition: setattr(transition.conv.weight, "data", torch.ones(4, 6, 3, 3)),
    "stride": lambda transition: setattr(transition.conv, "stride", (2, 2)),
    "max-pooling": lambda transition: setattr(transition, "pool", nn.MaxPool2d(2, 2)),
    "no pooling": lambda transition: setattr(transition, "pool", nn.Identity()),
    "pooling": lambda transition: setattr(transition.pool, "ceil_mode", True),
    "hook": lambda transition: transition.conv.register_forward_hook(lambda *_: None),
    "activation": lambda transition: setattr(transition, "relu", nn.ELU()),
    "parametrised": lambda transition: nn.utils.parametrizations.weight_norm(transition.conv),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:EfficientTransition runs its original forward")
def test_a_transition_that_is_called_again_notices_every_change(change: str) -> None:
    """It gives what a copy does that has not been called before."""
    torch.manual_seed(0)
    called = de.EfficientTransition(6, 4, drop_rate=0.5)
    x = torch.randn(2, 6, 5, 6)
    for _ in range(3):
        step(called, x)
    CHANGES[change](called)
    fresh = copy.deepcopy(called)
    assert called.path(x) == fresh.path(x)
    found = []
    for transition in (called, fresh):
        torch.manual_seed(1)
        found.append((transition(x), dict(transition.state_dict())))
    (y, state), (expected, expected_state) = found
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=0)
