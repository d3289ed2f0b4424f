"""The public interface: what messages advise exists, and old module paths still lead somewhere."""

from __future__ import annotations

import importlib
import re

import pytest
from torch import nn

import densenet_efficient
from densenet_efficient import _moved


def test_everything_named_is_there() -> None:
    for name in densenet_efficient.__all__:
        assert getattr(densenet_efficient, name) is not None


def test_the_advice_for_an_unknown_block_can_be_followed() -> None:
    class DenseBlock(nn.Sequential):
        pass

    model = nn.Sequential(DenseBlock(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)))
    with pytest.raises(densenet_efficient.ConversionError) as refusal:
        densenet_efficient.convert(model)
    advised = re.findall(r"densenet_efficient((?:\.\w+)+)", str(refusal.value))
    assert advised
    for path in advised:
        found = densenet_efficient
        for name in path.strip(".").split("."):
            found = getattr(found, name)
        assert callable(found)


@pytest.mark.parametrize("old", sorted(_moved.MOVED))
def test_modules_are_found_under_their_old_paths(old: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"densenet_efficient.{old} is now"):
        _moved.install()
        importlib.import_module(f"densenet_efficient.{old}")
    new = importlib.import_module(f"densenet_efficient.{_moved.MOVED[old]}")
    assert new.__name__.endswith(_moved.MOVED[old])
