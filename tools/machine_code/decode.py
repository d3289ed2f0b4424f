"""A kernel's instructions, each made a function once: which of them move a warp, and how memory is
touched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import choices, numbers
from . import instructions as integer
from .instructions import Execute, Operands
from .operands import LANES, Lanes, address, predicate, register, source

if TYPE_CHECKING:
    from .warp import Warp

Make = Callable[[Operands], Execute]

_MAKERS: dict[str, Make] = {
    "IADD3": integer.add, "VIADD": lambda o: integer.simple(o, 2, lambda x, y: x + y),
    "IMAD": integer.multiply, "LEA": integer.shifted_add, "SHF": integer.shift,
    "LOP3": integer.logic, "PLOP3": choices.predicate_logic, "ISETP": choices.compare,
    "SEL": choices.select, "FSEL": choices.select,
    "VIMNMX": lambda o: choices.extreme(o, False), "IMNMX": lambda o: choices.extreme(o, False),
    "VIADDMNMX": lambda o: choices.extreme(o, True), "PRMT": integer.permute_bytes,
    "POPC": lambda o: integer.simple(o, 1, integer.population),
    "FLO": lambda o: integer.simple(o, 1, integer.highest_bit),
    "IABS": lambda o: integer.simple(o, 1, lambda x: abs(integer.signed(x))),
    "FADD": numbers.arithmetic, "FMUL": numbers.arithmetic, "FFMA": numbers.arithmetic,
    "FSETP": numbers.compare, "FCHK": numbers.never, "I2F": numbers.from_integer,
    "I2FP": numbers.from_integer, "F2I": numbers.to_integer, "HFMA2": numbers.half_constant,
    "MOV": numbers.move, "LDC": numbers.move, "ULDC": numbers.move, "R2UR": numbers.move,
    "CS2R": numbers.zeros, "S2R": numbers.special, "S2UR": numbers.special, "VOTE": numbers.vote,
    "VOTEU": numbers.vote, "SHFL": numbers.shuffle, "P2R": numbers.predicates_to_register,
    "R2P": numbers.register_to_predicates,
}  # fmt: skip
_NOTHING = (
    "NOP",
    "LDGDEPBAR",
    "DEPBAR",
    "WARPSYNC",
    "MEMBAR",
    "YIELD",
    "ERRBAR",
    "CCTL",
    "PREFETCH",
)
_WIDTH = {"64": 2, "128": 4}


@dataclass(frozen=True)
class Instruction:
    """text: as disassembled. counts: 1, or 0 of what fills the code up. moves: whether it may end,
    branch or wait. forget: what it does where nobody knows which lanes it is done for."""

    text: str
    counts: int
    guard: Callable[[Warp], Lanes | None] | None
    moves: bool
    is_barrier: bool
    execute: Execute
    forget: Execute


@dataclass(frozen=True)
class Code:
    """A kernel's instructions by address."""

    at: dict[int, Instruction]

    @classmethod
    def of(cls, listing: list[tuple[int, str]]) -> Code:
        return cls({at: decode(at, text) for at, text in listing})


def decode(at: int, text: str) -> Instruction:
    words = text.split(None, 1)
    guard = None
    if words[0].startswith("@"):
        guard, words = predicate(words[0][1:]), words[1].split(None, 1)
    name, rest = words[0], words[1] if len(words) > 1 else ""
    base = name.split(".")[0]
    moves = base in ("BRA", "EXIT", "CALL", "RET", "BSYNC", "BREAK", "BAR", "BRX", "JMP")
    execute = _control(at, name, rest) if moves or base == "BSSY" else _plain(name, rest)
    forget = _forget(name, rest) if not moves else execute
    return Instruction(text, int(base != "NOP"), guard, moves, base == "BAR", execute, forget)


def _plain(name: str, rest: str) -> Execute:
    base = name.split(".")[0]
    if base in _NOTHING:
        return lambda warp, mask: None
    if base.startswith(("LD", "ST", "RED", "ATOM")) and base not in ("LDC",):
        return _memory(name, rest)
    operands = Operands(name, rest)
    if base == "MUFU" and "RCP" in operands.mods:
        return numbers.reciprocal(operands)
    maker = _MAKERS.get(base) or _MAKERS.get(base.removeprefix("U"))
    if maker is not None:
        return maker(operands)
    return numbers.unknown(operands, 4 if base.endswith("MMA") else 1)


def _forget(name: str, rest: str) -> Execute:
    base = name.split(".")[0]
    if base in _NOTHING or base.startswith(("ST", "BSSY")) or base == "LDGSTS":
        return _memory(name, rest, forget=True) if base == "STS" else lambda warp, mask: None
    width = next((_WIDTH[m] for m in name.split(".")[1:] if m in _WIDTH), 1)
    return numbers.unknown(Operands(name, rest.split("[")[0].rstrip(", ")), width)


# ---- Control ------------------------------------------------------------------------------------


def _control(at: int, name: str, rest: str) -> Execute:
    base = name.split(".")[0]
    texts = [t.strip() for t in rest.split(",")]
    if base == "BSSY":
        return lambda warp, mask: warp.barriers.__setitem__(texts[0], mask.copy())
    if base == "BSYNC":
        return lambda warp, mask: _reconverge(warp, mask, texts[0])
    if base == "BREAK":
        return lambda warp, mask: warp.barriers.__setitem__(
            texts[-1], warp.barriers[texts[-1]] & ~mask
        )
    if base == "EXIT":
        return _exit
    if base == "RET":
        back = source(rest.split()[0])

        def go_back(warp: Warp, mask: Lanes) -> None:
            to = back(warp)
            assert to is not None
            warp.pc[mask] = to[mask]

        return go_back
    if base in ("BRA", "CALL"):
        if "DIV" in name.split("."):
            return lambda warp, mask: None  # taken by warps that are not together
        target = int(texts[-1], 16)
        condition = predicate(texts[0]) if len(texts) > 1 else None
        return lambda warp, mask: _branch(warp, mask, at, target, condition)
    return lambda warp, mask: None


def _branch(
    warp: Warp,
    mask: Lanes,
    at: int,
    target: int,
    condition: Callable[[Warp], Lanes | None] | None,
) -> None:
    if condition is not None:
        value = condition(warp)
        if value is None:
            from .warp import UnknownWayError

            raise UnknownWayError(f"0x{at:x}: a branch on an unknown predicate")
        mask = mask & value
    warp.pc[mask] = target


def _exit(warp: Warp, mask: Lanes) -> None:
    warp.alive = warp.alive & ~mask
    for name in list(warp.barriers):
        _release(warp, name)


def _reconverge(warp: Warp, mask: Lanes, name: str) -> None:
    warp.waiting = warp.waiting | mask
    warp.held[name] = warp.held.get(name, np.zeros(LANES, bool)) | mask
    _release(warp, name)


def _release(warp: Warp, name: str) -> None:
    held = warp.held.get(name)
    if held is None or not held.any():
        return
    if not (warp.barriers[name] & warp.alive & ~held).any():
        warp.waiting = warp.waiting & ~held
        warp.held[name] = np.zeros(LANES, bool)


# ---- Memory -------------------------------------------------------------------------------------


def _memory(name: str, rest: str, forget: bool = False) -> Execute:
    mods = name.split(".")
    base = mods[0]
    words = next((_WIDTH[m] for m in mods[1:] if m in _WIDTH), 1)
    if base == "LDS":
        to, place = rest.split(",", 1)
        target = to.strip()
        where = address(place)

        def load(warp: Warp, mask: Lanes) -> None:
            at = where(warp)
            for i in range(words):
                spot = register(target, i)
                if spot is not None:
                    warp.put(
                        spot, warp.shared.load(at, i, mask) if "U16" not in mods else None, mask
                    )

        return load
    if base == "STS":
        where = address(rest)
        value_text = rest.rsplit(",", 1)[1].strip().replace(".reuse", "")
        values = [source(value_text, i) for i in range(words)]

        def store(warp: Warp, mask: Lanes) -> None:
            at = where(warp)
            for i in range(words):
                known = None if forget or "U16" in mods or "U8" in mods else values[i](warp)
                warp.shared.store(at, i, known, mask)

        return store
    if base == "LDGSTS":
        where = address(rest.split("]", 1)[0] + "]")

        def copy(warp: Warp, mask: Lanes) -> None:
            for i in range(words):
                warp.shared.store(where(warp), i, None, mask)

        return copy
    if base.startswith(("ST", "RED")):
        return lambda warp, mask: None
    if base == "LDSM":
        words = 4
    operands = Operands(name, rest.split(",")[0])
    return numbers.unknown(operands, words)
