"""Every operator with any arguments: right ones give what the reference gives, wrong ones are
refused by name and change nothing."""

from __future__ import annotations

from hypothesis import assume
from hypothesis import strategies as st

from tests.support.fuzzing.operators import CALLS, Call, decided, judge
from tests.support.fuzzing.profile import fuzz
from tests.support.wrong_arguments import wrong_calls


@fuzz(0.5, call=CALLS)
def test_right_calls(call: Call) -> None:
    case = call.make()
    assume(decided(case))
    judge(case)


@fuzz(0.5, call=CALLS, which=st.integers(0, 2**16))
def test_wrong_calls(call: Call, which: int) -> None:
    made = list(wrong_calls(call.make()))
    made[which % len(made)].refuse()
