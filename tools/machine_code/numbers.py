"""Floats and conversions, special registers and exchange between lanes: see instructions.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .choices import both
from .instructions import Execute, Operands, halves, simple, wide
from .operands import LANES, Lanes, Read, bits, floats, lanes, predicate, real, signed, source

if TYPE_CHECKING:
    from .warp import Warp


def arithmetic(o: Operands) -> Execute:
    """FADD, FMUL, FFMA, FMNMX of known numbers."""
    count = 3 if o.name.startswith("FFMA") else 2
    reads = [real(text) for text in o.texts[:count]]

    def compute(x: Lanes, y: Lanes, *z: Lanes) -> Lanes:
        with np.errstate(all="ignore"):
            a, b = floats(x).astype(np.float64), floats(y).astype(np.float64)
            if o.name.startswith("FADD"):
                return bits(a + b)
            return bits(a * b + floats(z[0]).astype(np.float64) if z else a * b)

    return simple(o, count, compute, reads)


def reciprocal(o: Operands) -> Execute:
    def compute(x: Lanes) -> Lanes:
        with np.errstate(all="ignore"):
            return bits(np.float32(1) / floats(x))

    return simple(o, 1, compute, [real(o.texts[0])])


def compare(o: Operands) -> Execute:
    a, b = real(o.texts[0]), real(o.texts[1])
    name, how, other = o.mods[0], o.mods[-1], predicate(o.texts[2])
    functions = {
        "EQ": np.equal, "NE": np.not_equal, "LT": np.less, "LE": np.less_equal, "GT": np.greater,
        "GE": np.greater_equal,
    }  # fmt: skip

    def execute(warp: Warp, mask: Lanes) -> None:
        x, y = a(warp), b(warp)
        result = None
        if x is not None and y is not None:
            result = functions[name[:2]](floats(x), floats(y))
            if name.endswith("U"):
                result = result | np.isnan(floats(x)) | np.isnan(floats(y))
        for i, value in enumerate((result, None if result is None else ~result)):
            o.store_predicate(warp, mask, i, both(value, other(warp), how))

    return execute


def _rounded_up(value: Lanes) -> Lanes:
    near = value.astype(np.float32)
    below = near.astype(np.float64) < value.astype(np.float64)
    return np.where(below, np.nextafter(near, np.float32(np.inf)), near)


def from_integer(o: Operands) -> Execute:
    is_64 = "U64" in o.mods or "S64" in o.mods
    low, high = source(o.texts[0]), source(o.texts[0], 1) if is_64 else source("RZ")

    def compute(x: Lanes, y: Lanes) -> Lanes:
        if is_64:
            value = wide(x, y)
        else:
            value = x if any(m.startswith("U32") for m in o.mods) else signed(x)
        return bits(_rounded_up(value) if "RP" in o.mods else value.astype(np.float32))

    return simple(o, 2, compute, [low, high])


def to_integer(o: Operands) -> Execute:
    read = real(o.texts[0])
    is_64 = "U64" in o.mods

    def execute(warp: Warp, mask: Lanes) -> None:
        value = read(warp)
        if value is None:
            o.store(warp, mask, None)
            if is_64:
                o.store(warp, mask, None, 1)
            return
        number = np.nan_to_num(floats(value).astype(np.float64), posinf=2.0**64)
        top = 2.0**64 if is_64 else 2.0**32
        whole = [min(max(int(n), -(2**31)), int(top) - 1) & 0xFFFFFFFFFFFFFFFF for n in number]
        low, high = halves(np.array(whole, np.uint64))
        o.store(warp, mask, low)
        if is_64:
            o.store(warp, mask, high, 1)

    return execute


def half_constant(o: Operands) -> Execute:
    """HFMA2 of zeros is how two small constants come into a register."""
    if o.texts[:2] != ["-RZ", "RZ"]:
        return unknown(o)
    high, low = (np.float16(float(t)).view(np.uint16) for t in o.texts[2:4])
    constant = lanes(int(high) << 16 | int(low))
    return lambda warp, mask: o.store(warp, mask, constant)


def move(o: Operands) -> Execute:
    read = source(o.texts[0])
    second = source(o.texts[0], 1) if "64" in o.mods or o.name == "CS2R" else None

    def execute(warp: Warp, mask: Lanes) -> None:
        value = read(warp)
        upper = second(warp) if second else None
        o.store(warp, mask, value)
        if second:
            o.store(warp, mask, upper, 1)

    return execute


def zeros(o: Operands) -> Execute:
    """CS2R of SRZ clears a pair of registers."""

    def execute(warp: Warp, mask: Lanes) -> None:
        o.store(warp, mask, lanes(0))
        if "32" not in o.mods:
            o.store(warp, mask, lanes(0), 1)

    return execute


def special(o: Operands) -> Execute:
    name = o.texts[0]
    return lambda warp, mask: o.store(warp, mask, warp.special(name))


def vote(o: Operands) -> Execute:
    given = predicate(o.made.pop())  # the last of the predicates is its source

    def execute(warp: Warp, mask: Lanes) -> None:
        value = given(warp)
        if value is None:
            o.store(warp, mask, None)
            o.store_predicate(warp, mask, 0, None)
            return
        here = value & mask
        o.store(warp, mask, lanes(sum(1 << i for i in range(LANES) if here[i])))
        decided = here.any() if "ANY" in o.mods else (here == mask).all()
        o.store_predicate(warp, mask, 0, np.full(LANES, bool(decided)))

    return execute


def shuffle(o: Operands) -> Execute:
    value, lane = o.read(0, 1)

    def execute(warp: Warp, mask: Lanes) -> None:
        given, by = value(warp), lane(warp)
        if given is None or by is None:
            o.store(warp, mask, None)
            return
        own = np.arange(LANES)
        place = own ^ by if "BFLY" in o.mods else by
        o.store(warp, mask, given[place & 31])

    return execute


def predicates_to_register(o: Operands) -> Execute:
    """P2R: the predicates of a mask as bits, next to the other bits of a register."""
    byte = next((int(m[1]) for m in o.mods if m.startswith("B")), 0)
    keep, chosen = source(o.texts[1]), int(o.texts[2], 16)

    def execute(warp: Warp, mask: Lanes) -> None:
        value = keep(warp)
        known = [warp.predicates["P"][i] for i in range(7) if chosen >> i & 1]
        if value is None or any(p is None for p in known):
            o.store(warp, mask, None)
            return
        result = value & ~(chosen << 8 * byte)
        for i in range(7):
            own = warp.predicates["P"][i]
            if chosen >> i & 1 and own is not None:
                result = result | np.where(own, 1 << i + 8 * byte, 0)
        o.store(warp, mask, result)

    return execute


def register_to_predicates(o: Operands) -> Execute:
    text, _, part = o.texts[1].partition(".")
    byte = int(part[1]) if part.startswith("B") else 0
    read, chosen = source(text), int(o.texts[2], 16)

    def execute(warp: Warp, mask: Lanes) -> None:
        value = read(warp)
        for i in range(7):
            if chosen >> i & 1:
                made = None if value is None else (value >> i + 8 * byte & 1).astype(bool)
                warp.put_predicate(f"P{i}", made, mask)

    return execute


def unknown(o: Operands, width: int = 1) -> Execute:
    """Results that are not followed, in as many registers as they take."""

    def execute(warp: Warp, mask: Lanes) -> None:
        for i in range(width):
            o.store(warp, mask, None, i)
        for i in range(len(o.made)):
            o.store_predicate(warp, mask, i, None)

    return execute


def never(o: Operands) -> Execute:
    """A check for the slow way of a division, which ordinary numbers do not take."""
    nothing = np.zeros(LANES, bool)
    return lambda warp, mask: o.store_predicate(warp, mask, 0, nothing)


def read_all(reads: list[Read], warp: Warp) -> list[Lanes] | None:
    values = [read(warp) for read in reads]
    return None if any(v is None for v in values) else [v for v in values if v is not None]
