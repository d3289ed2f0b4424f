"""The examples of docs/compatibility.md, as a reader would run them."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from densenet_efficient import unconvert
from densenet_efficient.nn.dense_block import DenseBlockExecution
from tests.support.conversion_comparison import largest_error, step

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "compatibility.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_converts_what_it_says(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = ModuleType(f"example{number}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(EXAMPLES[number], module.__dict__)
    model = module.model.double()
    assert isinstance(model[1], DenseBlockExecution)
    assert "refused" not in capsys.readouterr().out
    x = torch.randn(2, 3, 9, 10, dtype=torch.float64)
    for inner in model.modules():
        inner.dropout = 0.0
    state = {name: value.clone() for name, value in model.state_dict().items()}
    ours = step(model, x)
    plain = unconvert(model)
    plain.load_state_dict(state)
    assert largest_error(step(plain, x), ours) < 1e-9


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 2
