"""Named networks of the libraries at their full depth, one small step each."""

import copy

import pytest
import torch
from torch import nn

from densenet_efficient import convert
from tests.support.conversion_comparison import largest_error, step
from tests.support.libraries import load

# Of these the depth and the stem are kept: in float64 their weights would take half a gigabyte.
NARROW = {"growth_rate": 12}
TIMM: dict[str, dict[str, int]] = {
    "densenet121": {},
    "densenet161": NARROW,
    "densenet169": {},
    "densenet201": {},
    "densenet264d": NARROW,
    "densenetblur121d": {},
}


def assert_same_step(plain: nn.Module, x: torch.Tensor) -> None:
    ours = convert(copy.deepcopy(plain))
    keys = list(plain.state_dict())
    assert list(ours.state_dict()) == keys
    assert largest_error(step(plain, x), step(ours, x)) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    model = load("timm").create_model(name, pretrained=False, num_classes=3, **TIMM[name]).double()
    assert_same_step(model, torch.randn(2, 3, 64, 64).double())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["densenet121", "densenetblur121d"])
def test_timm_features_only(name: str) -> None:
    model = load("timm").create_model(name, pretrained=False, features_only=True).double()
    assert_same_step(model, torch.randn(2, 3, 64, 64).double())


@pytest.mark.slow
def test_monai_in_three_dimensions() -> None:
    """DenseNet121, narrow: three-dimensional convolutions in float64 take their time. The last
    block sees eight values of a channel; two would make the norms' gradients rounding alone."""
    home = load("monai")
    model = home.DenseNet121(3, 1, 2, init_features=8, growth_rate=4).double()
    assert_same_step(model, torch.randn(2, 1, 64, 64, 33).double())
