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

from .steps import EARLIER, SCENARIOS, Subject, sample

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


def lines_of(subject: Subject, earlier: int) -> list[tuple[str, int]]:
    """Every line that a step after so many others reaches, as often as it does."""
    subject.prepare(earlier)
    found: list[tuple[str, int]] = []
    with tracing(lambda path, line: found.append((path, line))):
        subject.step(subject.module)
    return found


def interrupts(
    new: int | None, repeated: int, seed: int, file: str = ""
) -> Iterator[tuple[str, int, list[str]]]:
    """For every scenario: its name, interrupts, and what was wrong after them.

    new: interrupts at lines, the first and second time each is reached in a module's first, second
    or third step, that no earlier scenario has reached so often in such a step; None: at each of
    them. repeated: at any line that is reached. file: only in files whose names end so.
    """
    known: set[tuple[int, tuple[str, int], int]] = set()
    for scenario in SCENARIOS:
        rng = random.Random(f"{seed} {scenario.name}")
        subject = Subject(scenario)
        reached = [
            (earlier, index, place)
            for earlier in EARLIER
            for index, place in enumerate(lines_of(subject, earlier))
        ]
        times: Counter[tuple[int, tuple[str, int]]] = Counter()
        fresh = []
        for number, (earlier, _, place) in enumerate(reached):
            times[earlier, place] += 1
            visit = (earlier, place, times[earlier, place])
            if visit[-1] <= 2 and visit not in known:
                known.add(visit)
                fresh.append(number)
        everywhere = sample(list(range(len(reached))), repeated, rng)
        numbers = sample(fresh, new, rng) + everywhere
        points = [reached[number] for number in numbers if reached[number][2][0].endswith(file)]
        problems = []
        for earlier, index, (path, line) in points:
            problem = subject.broken_off(earlier, interrupting(index))
            if problem is not None:
                at = f"{Path(path).name}:{line} of step {earlier + 1}"
                problems.append(f"{scenario.name}, interrupted at {at}: {problem}")
        yield scenario.name, len(points), problems
