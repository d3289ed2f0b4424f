"""How many examples a property gets, and how a failure is replayed.

`make fuzz N=2000 SEED=1` sets FUZZ_EXAMPLES and passes the seed to hypothesis; without it the
ordinary suite takes each property's share of 200 examples, derandomised.
A failure prints its example, smallest first, and a `@reproduce_failure` line that replays it
without searching.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings

IN_THE_SUITE = 200
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))

ran: Counter[str] = Counter()
"""Examples that each property has run in this process, by its name."""


def fuzz(share: float, **strategies: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A property over `strategies`; share: its part of the examples. Those of all properties of
    modules add up to 1, and so do those of all properties of operators, whose examples take
    milliseconds."""

    def decorate(property_: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(property_)
        def counted(*args: Any, **drawn: Any) -> None:
            ran[property_.__name__] += 1
            property_(*args, **drawn)

        return settings(
            max_examples=max(1, round((EXAMPLES or IN_THE_SUITE) * share)),
            derandomize=not EXAMPLES,
            database=None,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        )(given(**strategies)(counted))

    return decorate
