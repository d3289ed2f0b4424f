"""The examples of docs/compatibility.md convert what they say, exactly."""

import pytest
import torch
from torch import nn

from densenet_efficient import unconvert
from densenet_efficient.nn.dense_block import DenseBlockExecution
from tests.support.conversion_comparison import largest_error, step
from tests.support.markdown import ROOT, Block, blocks, run

PAGE = ROOT / "docs" / "compatibility.md"
EXAMPLES = [block for block in blocks(PAGE) if block.language == "python"]


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_an_example_converts_what_it_says(
    example: Block, capsys: pytest.CaptureFixture[str]
) -> None:
    model = run([example])["model"]
    assert isinstance(model, nn.Sequential)
    model.double()
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
