"""A layer's parameters as the operators take them."""

from __future__ import annotations

import pytest
import torch

from densenet_efficient.core.dense_layer import cast_weight


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_dense_weight_is_not_copied(layout: torch.memory_format) -> None:
    """The operators read both layouts; a copy for every layer and direction costs a launch each."""
    weight = torch.randn(4, 6, 3, 3).to(memory_format=layout)  # type: ignore[call-overload]
    assert cast_weight(weight, torch.float32) is weight
    cast = cast_weight(weight, torch.bfloat16)
    assert cast is not None and cast.stride() == weight.stride() and cast.dtype == torch.bfloat16


def test_a_weight_with_gaps_becomes_contiguous() -> None:
    weight = torch.randn(4, 12, 3, 3)[:, ::2]
    found = cast_weight(weight, torch.float32)
    assert found is not None and found.is_contiguous() and torch.equal(found, weight)
    assert cast_weight(None, torch.float32) is None
