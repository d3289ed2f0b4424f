"""How many kernels a dense layer launches in a training step: 9 that compute and combine, one more
where the bottleneck is computed again."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from tests.support.emulators import emulator
from tools import launches

pytestmark = pytest.mark.slow

MOST = 9
MOST_OF_BLOCK = 17


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize("options", [{"growth": 32}, {"growth": 12}])
def test_of_a_layer(memory: str, layout: torch.memory_format, options: dict[str, Any]) -> None:
    found = launches.count(emulator(), 3, memory=memory, memory_format=layout, **options)
    again = memory == "recompute"
    assert sum(found.layer.values()) <= MOST + again, found.layer
    assert not any("PyTorch" in name for name in +found.layer), found.layer
    assert sum(found.block.values()) <= MOST_OF_BLOCK, found.block
    assert min(Counter(found.block).values()) >= 0, found.block
