"""Running statistics: the operator that updates those of several norms, and PyTorch's rules."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densenet_efficient.core import running
from densenet_efficient.ops import library

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(not library.is_available(), reason="the compiled library is not built"),
]

WIDTHS, FIRST, MOMENTUM, COUNT = (5, 200, 3), (0, 2, 199), 0.3, 7


def given(dtype: torch.dtype = torch.float32) -> tuple[list[nn.BatchNorm1d], Tensor]:
    """Norms with a past, and a table that holds the columns of all."""
    torch.manual_seed(0)
    norms = [nn.BatchNorm1d(width, momentum=MOMENTUM, dtype=dtype) for width in WIDTHS]
    for norm in norms:
        norm(torch.randn(6, norm.num_features, dtype=dtype))
    return norms, torch.rand(2, 210, dtype=dtype) + 0.5


def kept(norms: Sequence[Any]) -> running.Running:
    return running.Running(
        [norm.running_mean for norm in norms],
        [norm.running_var for norm in norms],
        [norm.num_batches_tracked for norm in norms],
        [norm.momentum for norm in norms],
    )


def assert_updated(norms: Sequence[Any], table: Tensor) -> None:
    """Updates the norms, and compares with PyTorch's rule, applied one by one in float64."""
    right = copy.deepcopy(norms)
    for norm, first in zip(right, FIRST, strict=True):
        mean, variance = table[:, first : first + norm.num_features].double()
        norm.num_batches_tracked += 1
        share = norm.momentum or 1 / norm.num_batches_tracked.item()
        for old, new in ((norm.running_mean, mean), (norm.running_var, variance * 7 / 6)):
            if old is not None:
                old.copy_((1 - share) * old.double() + share * new)
    running.update(kept(norms), table, FIRST, COUNT)
    for norm, same in zip(norms, right, strict=True):
        for buffer, value in zip(norm.buffers(), same.buffers(), strict=True):
            rounding = torch.finfo(buffer.dtype).eps if buffer.is_floating_point() else 0
            torch.testing.assert_close(buffer, value, rtol=2 * rounding, atol=2 * rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("together", [True, False])
def test_both_ways_follow_pytorchs_rule(
    together: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms, table = given(dtype)
    if not together:
        monkeypatch.setattr(running, "_update_together", lambda *_: False)
    versions = [buffer._version for norm in norms for buffer in norm.buffers()]
    assert_updated(norms, table)
    now = [buffer._version for norm in norms for buffer in norm.buffers()]
    assert all(after > before for after, before in zip(now, versions, strict=True))


def momentum_of(norms: Any) -> None:
    norms[1].momentum = None


def twice(norms: Any) -> None:
    norms[2] = norms[0]


def without_moments(norms: Any) -> None:
    norms[0].running_mean = norms[0].running_var = None


def other_dtype(norms: Any) -> None:
    norms[1].bfloat16()


def with_gaps(norms: Any) -> None:
    norms[1].running_mean = torch.zeros(400)[::2]


@pytest.mark.parametrize(
    "change", [None, momentum_of, twice, without_moments, other_dtype, with_gaps]
)
def test_what_the_operator_takes(change: Any) -> None:
    """Anything else is updated by PyTorch's operators."""
    norms, table = given()
    if change is not None:
        change(norms)
    same = copy.deepcopy(norms)
    assert running._update_together(kept(same), table, FIRST, COUNT) == (change is None)
    if change is not None:
        for norm, untouched in zip(norms, same, strict=True):
            for buffer, value in zip(norm.buffers(), untouched.buffers(), strict=True):
                assert torch.equal(buffer, value)
    assert_updated(norms, table)


def test_a_negative_view_is_not_taken() -> None:
    norms, table = given()
    norms[1].running_mean = torch._neg_view(torch.ones(200))
    assert not running._update_together(kept(norms), table, FIRST, COUNT)
    assert torch.equal(norms[1].running_mean, -torch.ones(200))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first": [0, 11, 199]}, "must have the columns 11 to 211, has 210"),
        ({"first": [0, -1, 199]}, "must have the columns -1 to 199, has 210"),
        ({"first": [0, 2]}, "equally many norms, got 3 means, 3 variances, 3 batches, 2 first"),
        ({"batches": [torch.zeros(1)] * 3}, "batches must be int64, got float32"),
        ({"batches": [torch.zeros(2).long()] * 3}, r"batches must be one value, got shape \[2\]"),
        ({"means": [torch.zeros(5).double()] * 3}, "means must be float32, got float64"),
        ({"variances": [torch.zeros(5)] * 3}, r"variances must have shape \[200\], got \[5\]"),
        ({"means": [torch.zeros(2, 5)] * 3}, "means must have 1 dimensions"),
        ({"table": torch.zeros(3, 210)}, r"table must have shape \[2, 210\], got \[3, 210\]"),
    ],
)
def test_bad_arguments_leave_all_as_it_was(change: dict[str, Any], message: str) -> None:
    norms, table = given()
    means, variances, batches, _ = kept(norms)
    arguments: dict[str, Any] = {"table": table, "means": means, "variances": variances}
    arguments |= {"batches": batches, "first": list(FIRST)} | change
    before = [buffer.clone() for norm in norms for buffer in norm.buffers()]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.densenet_efficient.running_update(**arguments, momentum=0.1, unbiased=1.0)
    for norm in norms:
        for buffer in norm.buffers():
            assert torch.equal(buffer, before.pop(0))


def test_a_table_that_is_a_running_statistic_is_refused() -> None:
    table = torch.zeros(2, 5)
    lists: Any = [table[0]], [torch.zeros(5)], [torch.zeros(()).long()]
    with pytest.raises(RuntimeError, match="must not share memory with table"):
        torch.ops.densenet_efficient.running_update(table, *lists, [0], 0.1, 1.0)
