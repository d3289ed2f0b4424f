"""Faults in large numbers: `make faults N=100 SEED=0`.

    python -m tools.faults [N] [--seed SEED] [--only GROUP ...]

Prints a table of what was done and how often it ended as it must, then every case that did not,
each with what replays it. Exit status 1 where there is one. docs/faults.md says what must hold.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import allocations, damage, kinds, lines, values
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


def damaged_files(count: int, seed: int) -> list[Row]:
    """Files cut off at so many places, with as many single bytes wrong, and foreign ones."""
    with tempfile.TemporaryDirectory() as folder:
        bench = damage.Bench(Path(folder))
        bench.bytes_wrong(count, random.Random(seed))
        rows = [Row("files cut off or damaged", bench.cases, list(bench.problems))]
        bench.cases, bench.problems = 0, []
        bench.foreign()
    return [*rows, Row("foreign and malicious files", bench.cases, bench.problems)]


def interrupted_steps(count: int, seed: int) -> list[Row]:
    """Steps interrupted at every line, and at so many lines of each scenario besides."""
    return _of_scenarios("interrupted", lines.interrupts(None, count, seed))


def failing_allocations(count: int, seed: int) -> list[Row]:
    """Steps in which each allocation fails once."""
    return _of_scenarios("allocation fails", allocations.failing(None, seed))


def values_not_finite(count: int, seed: int) -> list[Row]:
    """Steps with NaN or infinity in the input or gradient."""
    return _of_scenarios("NaN, infinity", values.not_finite())


def _of_scenarios(what: str, found: Iterable[tuple[str, int, list[str]]]) -> list[Row]:
    return [Row(f"{what}: {name}", cases, problems) for name, cases, problems in found]


# The runs of train come first: what they fork must not have run a backward pass.
GROUPS: dict[str, Callable[[int, int], list[Row]]] = {
    "train": runs_of_train,
    "files": damaged_files,
    "interrupts": interrupted_steps,
    "allocations": failing_allocations,
    "values": values_not_finite,
}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("count", nargs="?", type=int, default=100, metavar="N", help="SIGKILLs")
    parser.add_argument("--seed", type=int, default=0, metavar="SEED")
    parser.add_argument(
        "--only", nargs="+", choices=GROUPS, default=list(GROUPS), help=", ".join(GROUPS)
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
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
