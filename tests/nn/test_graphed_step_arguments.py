"""What `GraphedStep` refuses: optimisers that no graph can hold, and wrong arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import densenet_efficient as de
from tests.support.graph_stand_in import stand_in


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        (torch.optim.SGD, {}, ValueError, r"must be SGD\(\.\.\., fused=True\) .* got fused=None"),
        (torch.optim.AdamW, {}, ValueError, r"must be AdamW\(\.\.\., capturable=True\)"),
        (torch.optim.RMSprop, {}, TypeError, "must be SGD, Adam or AdamW .* got RMSprop"),
    ],
)
def test_optimisers(
    monkeypatch: pytest.MonkeyPatch, kind: Any, options: Any, error: type[Exception], message: str
) -> None:
    model = de.densenet_cifar(10, 4, num_classes=3)
    step = de.GraphedStep(lambda x: x, model, kind(model.parameters(), lr=0.1, **options))
    stand_in(monkeypatch)(step)
    with pytest.raises(error, match=message):
        step(torch.zeros(1))


def test_wrong_arguments() -> None:
    model = de.densenet_cifar(10, 4, num_classes=3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(TypeError, match="step must be a function, got a int"):
        de.GraphedStep(3, model, optimizer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="state must be modules and optimisers, got a list"):
        de.GraphedStep(len, [model], optimizer)
    with pytest.raises(TypeError, match="got a GradScaler: it decides on the host"):
        de.GraphedStep(len, model, optimizer, torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match="at least the model and its optimiser"):
        de.GraphedStep(len, model)
    with pytest.raises(ValueError, match="warm_up must be an integer of at least 1, got 0"):
        de.GraphedStep(len, model, optimizer, warm_up=0)
    step = de.GraphedStep(lambda x: 3.0, model, optimizer)
    with pytest.raises(ValueError, match="a batch must be tensors, got nothing"):
        step()
    with pytest.raises(TypeError, match="step must return tensors, got a float"):
        step(torch.zeros(1))
