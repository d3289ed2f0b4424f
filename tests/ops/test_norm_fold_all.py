"""All norms of a block folded by one operator: the same bits as by `norm_fold`, one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from densenet_efficient import EfficientDenseBlock
from densenet_efficient.core.specs import norm_length
from densenet_efficient.ops import compiled, library

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(not library.is_available(), reason="the compiled library is not built"),
]

WIDTHS, FIRST, EPS = (5, 1, 12), (0, 9, 2), 1e-3


def given(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    table = torch.rand(2, 20, dtype=dtype)[:, :15]
    gammas, betas = ([torch.randn(width, dtype=dtype) for width in WIDTHS] for _ in range(2))
    norms = torch.full((sum(map(norm_length, WIDTHS)),), -7.0, dtype=dtype)
    return {"table": table, "gammas": gammas, "betas": betas, "first": list(FIRST), "norms": norms}


def call(arguments: dict[str, Any]) -> None:
    compiled.norm_fold_all(*list(arguments.values())[:-1], EPS, arguments["norms"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_is_folded_as_by_itself(dtype: torch.dtype) -> None:
    arguments = given(dtype)
    call(arguments)
    place = 0
    for width, first, gamma, beta in zip(
        WIDTHS, FIRST, arguments["gammas"], arguments["betas"], strict=True
    ):
        expected = torch.empty(5, width, dtype=dtype)
        compiled.norm_fold(arguments["table"][:, first : first + width], gamma, beta, EPS, expected)
        norm = arguments["norms"][place : place + norm_length(width)]
        torch.testing.assert_close(norm[: 5 * width].view(5, width), expected, rtol=0, atol=0)
        assert bool((norm[5 * width :] == -7).all())
        place += norm_length(width)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first": [0, 9, 4]}, "table must have the columns 4 to 16, has 15"),
        ({"first": [0, -1, 2]}, "table must have the columns -1 to 0, has 15"),
        ({"first": [0, 9]}, "equally many norms, got 3 gammas, 3 betas, 2 first"),
        ({"gammas": [torch.zeros(5)] * 3}, r"betas must have shape \[5\], got \[1\]"),
        ({"gammas": [torch.zeros(1, 5)] * 3}, "gammas must have 1 dimensions"),
        ({"betas": [torch.zeros(5).double()] * 3}, "betas must be float32, got float64"),
        ({"betas": [torch.zeros(10)[::2]] * 3}, "betas must be contiguous"),
        ({"table": torch.zeros(3, 15)}, r"table must have shape \[2, 15\], got \[3, 15\]"),
        (
            {"betas": [*map(torch.zeros, WIDTHS[:-1]), torch.zeros(12, device="meta")]},
            "betas must be on cpu as table, got meta",
        ),
        ({"norms": torch.zeros(95)}, r"norms must have shape \[96\], got \[95\]"),
        ({"norms": torch.zeros(96).double()}, "norms must be float32, got float64"),
    ],
)
def test_bad_arguments_leave_all_as_it_was(change: dict[str, Any], message: str) -> None:
    arguments = given() | change
    before = arguments["norms"].clone()
    with pytest.raises(RuntimeError, match=message):
        call(arguments)
    assert torch.equal(arguments["norms"], before)


@pytest.mark.parametrize("name", ["table", "gammas", "betas"])
def test_what_is_written_shares_no_memory(name: str) -> None:
    arguments = given()
    norms = arguments["norms"]
    shared: dict[str, Any] = {"table": norms[:30].view(2, 15)}
    shared |= {kind: [norms[:5], *arguments[kind][1:]] for kind in ("gammas", "betas")}
    with pytest.raises(
        RuntimeError, match=f"norms is written and must not share memory with {name}"
    ):
        call(arguments | {name: shared[name]})


def negative(block: Any) -> None:
    weight = block.denselayer2.norm1.weight.detach()
    del block.denselayer2.norm1.weight
    block.denselayer2.norm1._parameters["weight"] = torch._neg_view(weight)


def _trained(parameter: Tensor) -> bool:
    return parameter.requires_grad


CHANGES: dict[str, Any] = {
    "nothing": lambda block: None,
    "another eps": lambda block: setattr(block.denselayer2.norm2, "eps", 0.5),
    "no gamma": lambda block: setattr(block.denselayer1.norm1, "weight", None),
    "no beta": lambda block: setattr(block.denselayer2.norm2, "bias", None),
    "constant statistics": lambda block: block.denselayer2.norm1.eval(),
    "a negative view": negative,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_block_takes_it_for_what_it_folds(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = EfficientDenseBlock(2, 8, 2, 4, 0.0).double()
    CHANGES[change](block)
    x, trained = torch.randn(2, 8, 5, 5).double(), [*filter(_trained, block.parameters())]

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(block(x).square().sum(), trained))

    calls: list[None] = []
    real = compiled.norm_fold_all
    monkeypatch.setattr(compiled, "norm_fold_all", lambda *a: (calls.append(None), real(*a)))
    found = gradients()
    assert bool(calls) == (change in ("nothing", "a negative view"))
    monkeypatch.setattr("densenet_efficient.core.folds.are_together", lambda device: False)
    for one, other in zip(found, gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
