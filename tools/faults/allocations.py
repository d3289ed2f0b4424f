"""Every allocation of a step fails once, in a process whose allocator does as it is told.

    python -m tools.faults.allocations [COUNT] [SEED]

is that process (it prints JSON); `failing` starts it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .steps import EARLIER, SCENARIOS, Subject, sample

HERE = Path(__file__).resolve().parent


def failing(count: int | None, seed: int) -> list[tuple[str, int, list[str]]]:
    """For every scenario: its name, allocations that failed (so many, or each), and what was wrong
    after them. RuntimeError where there is no compiler, or the process ends by itself."""
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder) / "allocations.so")
        compiler = os.environ.get("CC", "cc")
        build = [compiler, "-O1", "-fPIC", "-shared", "-o", library, str(HERE / "allocations.c")]
        subprocess.run([*build, "-ldl"], check=True)
        words = [
            sys.executable,
            "-X",
            "faulthandler",
            "-m",
            "tools.faults.allocations",
            str(count or 0),
            str(seed),
        ]
        done = subprocess.run(
            words,
            cwd=HERE.parents[1],
            env={**os.environ, "LD_PRELOAD": library},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: {done.stderr[-1000:]}")
    return [tuple(entry) for entry in json.loads(done.stdout)]


@contextlib.contextmanager
def _armed(number: int) -> Iterator[list[int]]:
    """The allocation of this number, from 0, fails; the list will hold how many there were."""
    allocator = ctypes.CDLL(None)
    allocator.faults_disarm.restype = ctypes.c_long
    seen: list[int] = []
    allocator.faults_arm(ctypes.c_long(number))
    try:
        yield seen
    finally:
        seen.append(allocator.faults_disarm())


def _all(count: int | None, seed: int) -> Iterator[tuple[str, int, list[str]]]:
    for scenario in SCENARIOS:
        subject = Subject(scenario)
        made = []
        for earlier in EARLIER:
            subject.prepare(earlier)
            with _armed(-1) as seen:
                subject.step(subject.module)
            made += [(earlier, number) for number in range(*seen)]
        chosen = sample(list(range(len(made))), count, random.Random(f"{seed} {scenario.name}"))
        problems, cases = [], 0
        for earlier, number in (made[index] for index in chosen):
            try:
                problem = subject.broken_off(earlier, _armed(number))
            except LookupError:  # somebody who can do without
                continue
            cases += 1
            if problem is not None:
                which = f"allocation {number} of step {earlier + 1}"
                problems.append(f"{scenario.name}, {which} failed: {problem}")
        yield scenario.name, cases, problems


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    print(json.dumps(list(_all(int(sys.argv[1]) or None, int(sys.argv[2])))))
