"""Faults in large numbers: `make faults N=100 SEED=0`.

    python -m tools.faults [N] [--seed SEED] [--only GROUP ...]

Prints a table of what was done and how often it ended as it must, then every case that did not,
each with what replays it. Exit status 1 where there is one. docs/faults.md says what must hold.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from . import kinds
from .campaign import Campaign
from .runs import warm_up


@dataclass
class Row:
    """A line of the table: what was done, how often, and what did not end as it must."""

    what: str
    cases: int
    failures: list[str] = field(default_factory=list)


def runs_of_train(count: int, seed: int) -> list[Row]:
    """`train` killed so many times, and a quarter as often interrupted, or out of space."""
    warm_up()
    third, rest = divmod(count, len(kinds.KILLS))
    wanted = {kind: third + (index < rest) for index, kind in enumerate(kinds.KILLS)}
    wanted |= dict.fromkeys(kinds.OTHERS, -(-count // 4))
    rows = []
    campaign = Campaign(seed)
    for kind, number in wanted.items():
        campaign.failures.clear()
        try:
            campaign.several(kind, number)
        except PermissionError as error:
            rows.append(Row(f"train {kind} (not possible here: {error})", 0))
            continue
        rows.append(Row(f"train {kind}", campaign.faults.get(kind, 0), list(campaign.failures)))
    campaign.close()
    return rows


# The runs of train come first: what they fork must not have run a backward pass.
GROUPS: dict[str, Callable[[int, int], list[Row]]] = {"train": runs_of_train}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("count", nargs="?", type=int, default=100, metavar="N", help="SIGKILLs")
    parser.add_argument("--seed", type=int, default=0, metavar="SEED")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP")
    options = parser.parse_args()
    start = time.monotonic()
    rows: list[Row] = []
    print(f"{'fault':<48} {'cases':>7} {'as it must be':>14}", flush=True)
    for name in [name for name in GROUPS if name in options.only]:
        for row in GROUPS[name](options.count, options.seed):
            rows.append(row)
            good = row.cases - len(row.failures)
            print(f"{row.what:<48} {row.cases:>7} {good:>14}", flush=True)
    failures = [failure for row in rows for failure in row.failures]
    for failure in failures:
        print(f"\n{failure}")
    cases = sum(row.cases for row in rows)
    print(
        f"\n{cases} cases, {cases - len(failures)} as they must be, seed {options.seed}, "
        f"{time.monotonic() - start:.0f} s"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
