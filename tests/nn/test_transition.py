"""Transitions: against the reference, in a chain with their neighbours, and what they refuse."""

import copy

import pytest
import torch

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
