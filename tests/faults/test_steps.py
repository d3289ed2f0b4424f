"""Steps that break off: parameters, running statistics and scratch are usable afterwards, and the
next step is bit by bit that of a module to which nothing has happened."""

from __future__ import annotations

import copy

import pytest
import torch

import densenet_efficient as de
from densenet_efficient.nn.plain import PlainDenseBlock
from tools.faults import allocations, lines, values


@pytest.mark.slow
def test_ctrl_c_at_lines_of_a_step() -> None:
    """`make faults` takes every line."""
    outcomes = list(lines.interrupts(new=12, repeated=2, seed=0))
    assert not [problem for _, _, problems in outcomes for problem in problems]
    assert sum(cases for _, cases, _ in outcomes) > 60


def test_ctrl_c_at_every_line_that_touches_running_statistics() -> None:
    outcomes = list(lines.interrupts(new=None, repeated=0, seed=0, file="core/running.py"))
    assert not [problem for _, _, problems in outcomes for problem in problems]
    assert sum(cases for _, cases, _ in outcomes) > 30


@pytest.mark.slow
def test_allocations_that_fail() -> None:
    outcomes = allocations.failing(count=4, seed=0)
    assert not [problem for _, _, problems in outcomes for problem in problems]
    assert sum(cases for _, cases, _ in outcomes) > 40


@pytest.mark.slow
def test_nan_and_infinity_are_forgotten() -> None:
    outcomes = list(values.not_finite(["everything"]))
    assert not [problem for _, _, problems in outcomes for problem in problems]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_norm_in_two_places_is_updated_twice(momentum: float | None) -> None:
    """In the order of the layers, as by the plain modules."""
    block = de.EfficientDenseBlock(3, 8, 4, 4, 0.0).double()
    first, second, _ = block.children()
    second.norm2 = first.norm2
    first.norm2.momentum = momentum
    plain = copy.deepcopy(block)
    x = torch.randn(4, 8, 6, 6, dtype=torch.float64)
    for _ in range(2):
        PlainDenseBlock.forward(plain, x), block(x)
    assert block.path(x).kind == "kernels"
    for (name, expected), got in zip(plain.named_buffers(), block.buffers(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12, msg=name)
