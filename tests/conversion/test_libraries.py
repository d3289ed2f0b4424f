"""Networks of other libraries, or written after them, converted: the same results to 1e-9 in
float64, the same keys, weights that load both ways, and the way back."""

import pytest

from tests.support.conversion_cases import CASES, DROPOUT_CASES, Case
from tests.support.conversion_comparison import compare, compare_dropout, pair


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_converted_networks_are_the_same(case: Case) -> None:
    assert compare(case, *pair(case)) < 1e-9


@pytest.mark.parametrize("case", DROPOUT_CASES, ids=lambda case: case.name)
def test_dropout_is_the_same_under_the_same_masks(case: Case) -> None:
    assert compare_dropout(case) < 1e-9
