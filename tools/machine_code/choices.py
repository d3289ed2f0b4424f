"""Comparisons, predicates and what they choose: see instructions.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .instructions import Execute, Operands, lookup
from .operands import LANES, MASK, Lanes, predicate, real, signed, source

if TYPE_CHECKING:
    from .warp import Warp

_COMPARE = {
    "EQ": np.equal,
    "NE": np.not_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
}


def compare(o: Operands) -> Execute:
    a, b = o.read(0, 1)
    name, combine = o.mods[0], next(m for m in o.mods if m in ("AND", "OR", "XOR"))
    test, as_signed = _COMPARE[name], "U32" not in o.mods
    with_predicates = [predicate(text) for text in o.texts[2:]]

    def execute(warp: Warp, mask: Lanes) -> None:
        x, y = a(warp), b(warp)
        inputs = [read(warp) for read in with_predicates]
        result: Lanes | None = None
        if x is not None and y is not None:
            if as_signed:
                x, y = signed(x), signed(y)
            result = test(x, y)
            if "EX" in o.mods:
                below = inputs[1]
                if below is None:
                    result = None
                elif name == "EQ":
                    result = result & below
                elif name == "NE":
                    result = result | below
                else:
                    result = np.where(x == y, below, result)
        combined(o, warp, mask, result, inputs[0], combine)

    return execute


def combined(
    o: Operands, warp: Warp, mask: Lanes, result: Lanes | None, other: Lanes | None, how: str
) -> None:
    """A comparison and its opposite, each combined with another predicate."""
    for i, value in enumerate((result, None if result is None else ~result)):
        o.store_predicate(warp, mask, i, both(value, other, how))


def both(value: Lanes | None, other: Lanes | None, how: str) -> Lanes | None:
    if how == "AND":
        for one in (value, other):
            if one is not None and not one.any():
                return one
        return None if value is None or other is None else value & other
    if how == "OR":
        for one in (value, other):
            if one is not None and one.all():
                return one
        return None if value is None or other is None else value | other
    return None if value is None or other is None else value ^ other


def predicate_logic(o: Operands) -> Execute:
    inputs = [predicate(text) for text in o.texts[:3]]
    tables = [int(text, 16) for text in o.texts[3:5]]

    def execute(warp: Warp, mask: Lanes) -> None:
        values = [read(warp) for read in inputs]
        for i, table in enumerate(tables):
            o.store_predicate(warp, mask, i, partly_known(table, values))

    return execute


def partly_known(table: int, values: list[Lanes | None]) -> Lanes | None:
    """The function's value where it does not depend on what is unknown."""
    unknown = [i for i, value in enumerate(values) if value is None]
    results = []
    for choice in range(1 << len(unknown)):
        tried = list(values)
        for k, i in enumerate(unknown):
            tried[i] = np.full(LANES, bool(choice >> k & 1))
        x, y, z = (value.astype(bool) for value in tried if value is not None)
        results.append(lookup(table, x, y, z))
    same = all((result == results[0]).all() for result in results)
    return results[0].astype(bool) if same else None


def select(o: Operands) -> Execute:
    number = o.name.startswith("F")
    a, b = (real(o.texts[i]) if number else source(o.texts[i]) for i in range(2))
    chosen = predicate(o.texts[2])

    def execute(warp: Warp, mask: Lanes) -> None:
        which = chosen(warp)
        x, y = a(warp), b(warp)
        if which is None:
            o.store(warp, mask, x if x is not None and y is not None and (x == y).all() else None)
        elif which[mask].all():
            o.store(warp, mask, x)
        elif not which[mask].any():
            o.store(warp, mask, y)
        else:
            o.store(warp, mask, None if x is None or y is None else np.where(which, x, y))

    return execute


def extreme(o: Operands, plus: bool) -> Execute:
    count = 3 if plus else 2
    least = predicate(o.texts[count])
    unsigned = "U32" in o.mods

    def execute(warp: Warp, mask: Lanes) -> None:
        values = [read(warp) for read in sources]
        if any(value is None for value in values):
            o.store(warp, mask, None)
            return
        x, y = (values[0] + values[1] & MASK, values[2]) if plus else values
        if not unsigned:
            x, y = signed(x), signed(y)
        result = np.where(least(warp), np.minimum(x, y), np.maximum(x, y))
        o.store(warp, mask, (np.maximum(result, 0) if "RELU" in o.mods else result) & MASK)

    sources = o.read(*range(count))
    return execute
