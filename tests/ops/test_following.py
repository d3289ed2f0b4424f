"""What a convolution's operator does after its sums: it folds the norm that follows, or makes the
correction of its own, to the last bit as `norm_fold` and `norm_correction` do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from densenet_efficient.ops import compiled, fallback, library
from tests.support import following
from tests.support.identifiers import identifier

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(not library.is_available(), reason="the compiled library is not built"),
]


@pytest.fixture(params=["compiled", "fallback"])
def call(request: pytest.FixtureRequest) -> Callable[..., None]:
    operators: Any = {"compiled": compiled, "fallback": fallback}[request.param]
    return lambda name, *arguments: getattr(operators, name)(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=identifier)
@pytest.mark.parametrize("case", following.FORWARD, ids=identifier)
def test_the_next_norm(
    call: Callable[..., None], case: following.Forward, dtype: torch.dtype
) -> None:
    following.check_forward(call, case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=identifier)
@pytest.mark.parametrize("case", following.BACKWARD, ids=identifier)
def test_the_correction(
    call: Callable[..., None], case: following.Backward, dtype: torch.dtype
) -> None:
    following.check_backward(call, case, dtype)


@pytest.mark.parametrize("change", following.WRONG, ids=lambda change: change["message"])
def test_wrong_arguments(change: dict[str, Any]) -> None:
    def call(name: str, *arguments: Any) -> None:
        getattr(compiled, name)(*arguments)

    following.check_refused(call, change)


def test_a_next_norm_left_out_is_no_argument() -> None:
    """Calls of before are calls still."""
    x, norm, weight = torch.randn(5, 6), torch.randn(5, 6), torch.randn(3, 6)
    results: list[Tensor] = []
    for rest in ((), (None, None, None, 0.0, None)):
        y = torch.empty(5, 3)
        compiled.norm_relu_conv1x1_forward(x, norm, weight, y, None, *rest)
        results.append(y)
    assert torch.equal(*results)
