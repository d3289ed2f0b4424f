"""The update of running statistics: the CUDA kernel and the CPU's give the same bits."""

from __future__ import annotations

import pytest
import torch

from densenet_efficient.ops import library
from tests.support.emulators import SEEDS, emulator

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norms", [1, 3, 70])  # one launch takes 64
def test_as_on_the_cpu(norms: int, dtype: torch.dtype) -> None:
    library.load()
    torch.manual_seed(0)
    widths = [1 + 97 * i % 300 for i in range(norms)]
    first = [7 * i % 11 for i in range(norms)]
    table = torch.rand(2, 320, dtype=dtype)
    moments = [[torch.rand(width, dtype=dtype) for width in widths] for _ in range(2)]
    counters = [torch.tensor(i) for i in range(norms)]
    results = []
    for seed in (None, *SEEDS):
        lists = [[value.clone() for value in values] for values in (*moments, counters)]
        arguments = (table, *lists, first, 0.1, 1.25)
        if seed is None:
            torch.ops.densenet_efficient.running_update(*arguments)
        else:
            launches = emulator().call("running_update", *arguments, seed=seed)
            assert len(launches) == -(-norms // 64)
        results.append([value for values in lists for value in values])
    for found in results[1:]:
        for one, other in zip(found, results[0], strict=True):
            assert torch.equal(one, other)
