"""What machine instructions do, as far as a warp's way through a kernel depends on it: integers,
predicates, and floats that are known. An instruction becomes a function of the warp and the mask of
its active lanes; one that this file does not know makes its results unknown.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .operands import (
    LANES,
    MASK,
    Lanes,
    Read,
    Value,
    is_predicate,
    lanes,
    predicate,
    register,
    signed,
    source,
    split,
)

if TYPE_CHECKING:
    from .warp import Warp

Execute = Callable[["Warp", Lanes], None]
_NEVER = lanes(0)
# Instructions that make nothing but predicates, and how many.
_PREDICATES_MADE = {"ISETP": 2, "FSETP": 2, "PLOP3": 2, "FCHK": 1}


def wide(low: Lanes, high: Lanes) -> Lanes:
    """64 bits from two halves, as unsigned integers."""
    return low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)


def halves(value: Lanes) -> tuple[Lanes, Lanes]:
    value = value.astype(np.uint64)
    return (value & np.uint64(MASK)).astype(np.int64), (value >> np.uint64(32)).astype(np.int64)


class Operands:
    """An instruction's destinations and sources, in the order in which they are written."""

    def __init__(self, name: str, rest: str) -> None:
        self.name = name
        self.mods = name.split(".")[1:]
        texts = split(rest)
        # Destinations come first: predicates alone, or a register and predicates on either side.
        alone = _PREDICATES_MADE.get(name.split(".")[0].removeprefix("U"))
        self.to: str | None = None
        self.made, texts = texts[: alone or 0], texts[alone or 0 :]
        while alone is None and texts and (is_predicate(texts[0]) or self._is_target(texts[0])):
            if is_predicate(texts[0]):
                self.made.append(texts.pop(0))
            else:
                self.to = texts.pop(0)
        self.texts = texts

    def _is_target(self, text: str) -> bool:
        return self.to is None and re.fullmatch(r"U?R(\d+|Z)", text) is not None

    def read(self, *indices: int) -> list[Read]:
        return [source(self.texts[i]) for i in indices]

    def predicates(self, first: int) -> list[Callable[[Warp], Lanes | None]]:
        return [predicate(text) for text in self.texts[first:] if is_predicate(text)]

    def store(self, warp: Warp, mask: Lanes, value: Value, offset: int = 0) -> None:
        if self.to is not None:
            place = register(self.to, offset)
            if place is not None:
                warp.put(place, value, mask)

    def store_predicate(self, warp: Warp, mask: Lanes, index: int, value: Lanes | None) -> None:
        if index < len(self.made):
            warp.put_predicate(self.made[index], value, mask)


def simple(
    o: Operands, count: int, compute: Callable[..., Lanes], reads: list[Read] | None = None
) -> Execute:
    """A result of `count` sources, unknown where one of them is."""
    sources = o.read(*range(count)) if reads is None else reads

    def execute(warp: Warp, mask: Lanes) -> None:
        values = [read(warp) for read in sources]
        unknown = any(value is None for value in values)
        o.store(warp, mask, None if unknown else compute(*values) & MASK)

    return execute


# ---- Integers -----------------------------------------------------------------------------------


def add(o: Operands) -> Execute:
    sources = o.read(0, 1, 2)
    # A negative's carry is that of the inverse and one, also for zero.
    negative = [
        t.startswith("-") and not t[1:2].isdigit() and "X" not in o.mods for t in o.texts[:3]
    ]
    carries = o.predicates(3) if "X" in o.mods else []

    def execute(warp: Warp, mask: Lanes) -> None:
        values = [read(warp) for read in sources] + [read(warp) for read in carries]
        if any(value is None for value in values):
            o.store(warp, mask, None)
            for i in range(len(o.made)):
                o.store_predicate(warp, mask, i, None)
            return
        total = sum(value.astype(np.int64) for value in values if value is not None)
        for value, minus in zip(values, negative, strict=False):
            if minus and value is not None:
                total = total + np.where(value == 0, 1 << 32, 0)
        o.store(warp, mask, total & MASK)
        for i in range(len(o.made)):
            o.store_predicate(warp, mask, i, total >> 32 > i)

    return execute


def multiply(o: Operands) -> Execute:
    a, b, c = o.read(0, 1, 2)
    is_signed = "U32" not in o.mods
    carries = o.predicates(3)
    if "WIDE" in o.mods or "HI" in o.mods:
        negated = o.texts[2].startswith("-")  # as 64 bits
        c, upper = (source(o.texts[2].lstrip("-"), i) for i in (0, 1))

        def execute(warp: Warp, mask: Lanes) -> None:
            x, y, low, high = a(warp), b(warp), c(warp), upper(warp)
            if x is None or y is None or low is None or high is None:
                o.store(warp, mask, None)
                if "WIDE" in o.mods:
                    o.store(warp, mask, None, 1)
                for i in range(len(o.made)):
                    o.store_predicate(warp, mask, i, None)
                return
            if is_signed:
                x, y = signed(x), signed(y)
            product = x.astype(np.uint64) * y.astype(np.uint64)
            total = product - wide(low, high) if negated else product + wide(low, high)
            for carry in carries:
                total = total + carry(warp).astype(np.uint64)
            low, high = halves(total)
            if "WIDE" in o.mods:
                o.store(warp, mask, low)
                o.store(warp, mask, high, 1)
                o.store_predicate(warp, mask, 0, total < product)
            else:
                o.store(warp, mask, high)

        return execute
    if "MOV" in o.mods:
        return simple(o, 1, lambda x: x, [c])

    def low(x: Lanes, y: Lanes, z: Lanes, *carry: Lanes) -> Lanes:
        product = (x.astype(np.uint64) * y.astype(np.uint64) & np.uint64(MASK)).astype(np.int64)
        return product + z + sum(carry)

    return simple(o, 3, low, [a, b, c, *carries])


def shifted_add(o: Operands) -> Execute:
    """LEA: (a << shift) + b; LEA.HI: the upper half of the 64 bits shifted, plus b."""
    a, b = o.read(0, 1)
    high = "HI" in o.mods
    extends = "SX32" in o.mods
    c = source(o.texts[2]) if high and not extends else None
    shift = int(o.texts[2 if c is None else 3], 16)
    carries = o.predicates(3)

    def execute(warp: Warp, mask: Lanes) -> None:
        x, y, z = a(warp), b(warp), c(warp) if c is not None else _NEVER
        carry = [read(warp) for read in carries]
        if x is None or y is None or z is None or any(value is None for value in carry):
            o.store(warp, mask, None)
            o.store_predicate(warp, mask, 0, None)
            return
        if extends:
            z = np.where(x >> 31 & 1, MASK, 0)
        if high:
            shifted = halves(wide(x, z) << np.uint64(shift))[1]
        else:
            shifted = (x << shift) & MASK
        total = (
            shifted
            + y
            + (
                sum(v.astype(np.int64) for v in carry if v is not None)
                if carry and "X" in o.mods
                else 0
            )
        )
        o.store(warp, mask, total & MASK)
        o.store_predicate(warp, mask, 0, total >> 32 > 0)

    return execute


def shift(o: Operands) -> Execute:
    left = "L" in o.mods
    wraps, wide64 = "W" in o.mods, "U64" in o.mods or "S64" in o.mods

    def compute(low: Lanes, amount: Lanes, high: Lanes) -> Lanes:
        limit = 63 if wide64 else 32
        by = (amount & 31 if wraps else np.minimum(amount, limit)).astype(np.uint64)
        if left:
            if "HI" in o.mods:
                return halves(wide(low, high) << by)[1]
            return halves(low.astype(np.uint64) << by)[0]
        if "HI" in o.mods:
            if "S32" in o.mods:
                return signed(high) >> np.minimum(by.astype(np.int64), 31)
            return high >> by.astype(np.int64)
        if "S64" in o.mods:
            return halves(
                (wide(low, high).astype(np.int64) >> by.astype(np.int64)).astype(np.uint64)
            )[0]
        return halves(wide(low, high) >> by)[0]

    return simple(o, 3, compute)


def logic(o: Operands) -> Execute:
    a, b, c = o.read(0, 1, 2)
    table = int(o.texts[3], 16)

    def execute(warp: Warp, mask: Lanes) -> None:
        x, y, z = a(warp), b(warp), c(warp)
        known = not (x is None or y is None or z is None)
        # A bit that no result depends on need not be known.
        if not known and o.texts[1] == "0x0" and table == 0xC0:
            known, x, y, z = True, _NEVER, _NEVER, _NEVER
        result = lookup(table, x, y, z) & MASK if known else None
        o.store(warp, mask, result)
        o.store_predicate(warp, mask, 0, None if result is None else result != 0)

    return execute


def lookup(table: int, x: Lanes, y: Lanes, z: Lanes) -> Lanes:
    """A function of three bits, by its table: bit 4 x + 2 y + z."""
    result = x & 0
    for i in range(8):
        if table >> i & 1:
            result = result | (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
    return result


def permute_bytes(o: Operands) -> Execute:
    def compute(low: Lanes, selector: Lanes, high: Lanes) -> Lanes:
        both_words, result = wide(low, high), np.zeros(LANES, np.int64)
        for i in range(4):
            place = (selector >> 4 * i & 7).astype(np.uint64)
            byte = (both_words >> (place * np.uint64(8)) & np.uint64(255)).astype(np.int64)
            sign = selector >> 4 * i & 8
            result = result | np.where(sign != 0, np.where(byte & 128, 255, 0), byte) << 8 * i
        return result

    return simple(o, 3, compute)


def population(value: Lanes) -> Lanes:
    return np.array([int(v).bit_count() for v in value], np.int64)


def highest_bit(value: Lanes) -> Lanes:
    return np.array([int(v).bit_length() - 1 for v in value], np.int64)
