"""PyTorch's own check of custom operators, with the arguments of a network's step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

from densenet_efficient.models.densenet import EfficientDenseNet
from densenet_efficient.ops import compiled, library


@pytest.mark.skipif(not library.is_available(), reason="the compiled library is not built")
@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_operators_pass_opcheck(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operator, with the arguments of a real step: slices of larger buffers among them."""
    calls: dict[str, tuple[Any, ...]] = {}
    names = (*compiled.NAMES, *compiled.CPU_NAMES, compiled.RUNNING_UPDATE)
    for name in names:
        real = getattr(compiled, name)

        def record(*args: Any, real: Any = real, name: str = name) -> Any:
            calls.setdefault(name, tree_map_only(torch.Tensor, torch.clone, args))
            return real(*args)

        monkeypatch.setattr(compiled, name, record)
    model = EfficientDenseNet(4, (2, 2), 6, 2, num_classes=3, memory=memory).double()
    model(torch.randn(2, 3, 32, 32, dtype=torch.float64)).sum().backward()
    # A convolution's backward makes the corrections of such a network.
    dnorm, norm, correction = torch.rand(2 + 5 + 4, 6, dtype=torch.float64).split((2, 5, 4))
    compiled.norm_correction(dnorm, norm, 7, False, correction)
    # And C++ calls the update of a network's running statistics.
    moments = [torch.rand(6, dtype=torch.float64) for _ in range(2)]
    counter = torch.zeros((), dtype=torch.int64)
    compiled.running_update(
        torch.rand_like(dnorm), moments[:1], moments[1:], [counter], [0], 0.1, 1.5
    )
    assert set(calls) == set(names)
    for name, args in calls.items():
        if name.endswith("forward"):  # the next norm's statistics hold y's; opcheck copies each
            args = args[:5]
        torch.library.opcheck(getattr(torch.ops.densenet_efficient, name).default, args)
