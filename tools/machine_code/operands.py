"""Operands of machine instructions, read for the 32 lanes of a warp at once.

A value is an array of 32 lanes that hold unsigned 32-bit integers, or None where it is not known:
whatever comes from global memory, and all that is computed from it. Predicates are arrays of bool,
or None.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .warp import Warp

LANES = 32
MASK = 0xFFFFFFFF

Lanes = np.ndarray
Value = Lanes | None
Read = Callable[["Warp"], Value]


def lanes(value: int) -> Lanes:
    """The same integer in every lane."""
    return np.full(LANES, value & MASK, np.int64)


def floats(value: Lanes) -> Lanes:
    return value.astype(np.uint32).view(np.float32)


def bits(value: Lanes) -> Lanes:
    return value.astype(np.float32).view(np.uint32).astype(np.int64)


def signed(value: Lanes) -> Lanes:
    return (value ^ 0x80000000) - 0x80000000


def _constant(text: str) -> Lanes | None:
    """An immediate: an integer, or a float's bits."""
    if re.fullmatch(r"-?0x[0-9a-f]+", text):
        return lanes(int(text, 16))
    if re.fullmatch(r"[-+]?(\d+\.?\d*(e[-+]?\d+)?|INF|QNAN)", text):
        number = float(text.replace("QNAN", "nan"))
        return bits(np.full(LANES, number, np.float32))
    return None


def split(text: str) -> list[str]:
    """The operands after an instruction's name; "R5.reuse" is R5."""
    return [part.strip().replace(".reuse", "") for part in text.split(",")] if text else []


def register(text: str, offset: int = 0) -> tuple[str, int] | None:
    """("R", 5) of "R5", ("UR", 4) of "UR4", with `offset` added; None of the zero registers."""
    found = re.fullmatch(r"(U?R)(\d+|Z)(?:\.64|\.B\d|\.H\d(?:_H\d)?)?", text)
    if found is None:
        raise ValueError(f"expected a register, got {text!r}")
    return None if found[2] == "Z" else (found[1], int(found[2]) + offset)


def is_predicate(text: str) -> bool:
    return re.fullmatch(r"!?U?P(\d|T)", text) is not None


def predicate(text: str) -> Callable[[Warp], Lanes | None]:
    """Reads a predicate, "!P0" negated."""
    negated, name = text.startswith("!"), text.lstrip("!")
    if name in ("PT", "UPT"):
        constant = np.full(LANES, not negated)
        return lambda warp: constant
    bank, index = ("UP", int(name[2:])) if name.startswith("U") else ("P", int(name[1:]))

    def read(warp: Warp) -> Lanes | None:
        value = warp.predicates[bank][index]
        return ~value if negated and value is not None else value

    return read


def source(text: str, offset: int = 0) -> Read:
    """Reads a source, as 32 bits; `offset`: 1 for the upper half of 64 bits. A minus negates as an
    integer; ~ inverts."""
    invert, negate = text.startswith("~"), text.startswith("-") and not text[1:2].isdigit()
    inner = text[1:] if invert or negate else text
    magnitude = inner.startswith("|")
    inner = inner.strip("|")
    read = _plain(inner, offset)
    if magnitude or not (invert or negate):
        return read
    if invert:
        return lambda warp: None if (v := read(warp)) is None else v ^ MASK
    return lambda warp: None if (v := read(warp)) is None else -v & MASK


def _plain(text: str, offset: int) -> Read:
    constant = _constant(text)
    if constant is not None:
        upper = lanes(-1 if text.startswith("-") and offset else 0)
        return lambda warp: upper if offset else constant
    bank = re.fullmatch(r"c\[0x0\]\[(?:(U?R\d+)\+?)?(0x[0-9a-f]+)?\]", text)
    if bank:
        at, base = int(bank[2] or "0", 16) + 4 * offset, bank[1]
        if base is None:
            return lambda warp: lanes(warp.constant(at))
        read = _plain(base, 0)
        return lambda warp: (
            None if (v := read(warp)) is None else lanes(warp.constant(at + int(v[0])))
        )
    found = register(text, offset)
    if found is None:
        zero = lanes(0)
        return lambda warp: zero
    name, index = found
    return lambda warp: warp.registers[name][index]


def real(text: str) -> Read:
    """Reads a source as a float32's bits: a minus negates the number, bars take its magnitude."""
    negated = text.startswith("-") and not text[1:2].isdigit()
    inner = text[1:] if negated else text
    magnitude, inner = inner.startswith("|"), inner.strip("|")
    read = _plain(inner, 0)

    def value(warp: Warp) -> Value:
        got = read(warp)
        if got is None:
            return None
        if magnitude:
            got = got & 0x7FFFFFFF
        return got ^ 0x80000000 if negated else got

    return value


def address(text: str) -> Read:
    """Reads the shared address of "[R8+UR4+0x10]"; of global ones the lower half."""
    inner = text[text.rindex("[") + 1 : text.rindex("]")]
    terms = [source(term.removesuffix(".64")) for term in re.split(r"\+(?=[^-])|(?<=\d)\+", inner)]

    def value(warp: Warp) -> Value:
        total = lanes(0)
        for term in terms:
            got = term(warp)
            if got is None:
                return None
            total = total + got & MASK
        return total

    return value
