"""Ctrl-C at any line of core, nn and ops, in the middle of a step."""

from __future__ import annotations

import ast
import functools
import random
import sys
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import densenet_efficient

from .steps import SCENARIOS, Subject, sample

ROOMS = tuple(
    str(Path(densenet_efficient.__file__).parent / room) for room in ("core", "nn", "ops")
)


@functools.cache
def with_lines(path: str) -> frozenset[int]:
    """The lines at which the `with` statements of a file begin."""
    nodes = ast.walk(ast.parse(Path(path).read_text()))
    return frozenset(node.lineno for node in nodes if isinstance(node, ast.With))


@contextmanager
def tracing(at_line: Any) -> Iterator[None]:
    """Calls at_line(file, line) at every line of the rooms; what it raises, the line raises.

    Not where a `with` ends, for which Python reports its line once more: a real ctrl-C comes at a
    call or a jump, never between a body and its `__exit__`.
    """
    open_at: dict[types.FrameType, set[int]] = {}

    def trace(frame: types.FrameType, event: str, argument: Any) -> Any:
        path, line = frame.f_code.co_filename, frame.f_lineno
        if not path.startswith(ROOMS):
            return None
        if event == "line" and line in with_lines(path):
            inside = open_at.setdefault(frame, set())
            inside ^= {line}
            if line not in inside:
                return trace
        if event == "line":
            at_line(path, line)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def interrupting(wanted: int) -> Any:
    """KeyboardInterrupt at the line number ``wanted``, from 0, that is reached."""
    left = wanted

    def at_line(path: str, line: int) -> None:
        nonlocal left
        left -= 1
        if left == -1:
            raise KeyboardInterrupt

    return tracing(at_line)


def lines_of(subject: Subject) -> list[tuple[str, int]]:
    """Every line that a step reaches, as often as it does."""
    found: list[tuple[str, int]] = []
    with tracing(lambda path, line: found.append((path, line))):
        subject.step(subject.module)
    return found


def interrupts(
    new: int | None, repeated: int, seed: int, file: str = ""
) -> Iterator[tuple[str, int, list[str]]]:
    """For every scenario: its name, interrupts, and what was wrong after them.

    new: interrupts at lines, the first and second time each is reached, that no earlier scenario
    has reached so often; None: at each of them. repeated: at any line that is reached. file: only
    in files whose names end so.
    """
    known: set[tuple[tuple[str, int], int]] = set()
    for scenario in SCENARIOS:
        rng = random.Random(f"{seed} {scenario.name}")
        subject = Subject(scenario)
        reached = lines_of(subject)
        times: Counter[tuple[str, int]] = Counter()
        fresh = []
        for index, place in enumerate(reached):
            times[place] += 1
            visit = (place, times[place])
            if times[place] <= 2 and visit not in known:
                known.add(visit)
                fresh.append(index)
        everywhere = sample(list(range(len(reached))), repeated, rng)
        points = [
            point
            for point in sample(fresh, new, rng) + everywhere
            if reached[point][0].endswith(file)
        ]
        problems = []
        for point in points:
            problem = subject.broken_off(interrupting(point))
            if problem is not None:
                path, line = reached[point]
                problems.append(
                    f"{scenario.name}, interrupted at {Path(path).name}:{line}: {problem}"
                )
        yield scenario.name, len(points), problems
