"""Runs a block's warps through a kernel's machine code as far as their way depends on it, and
counts what they issue.

Integers, addresses and predicates are followed lane by lane from the launch's own parameters;
numbers from global memory are unknown, and a branch that depends on one is an error. Shared memory
keeps what is known. The warps of a block take turns between barriers.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from . import decode
from .operands import LANES, Lanes, Value, lanes

# Shared memory begins here in every block: the system's kilobyte comes first.
SHARED_BASE = 1024
_BASE = SHARED_BASE // 4


class UnknownWayError(RuntimeError):
    """A branch depends on what is not known, or the code uses an instruction in an unknown way."""


@dataclass(frozen=True)
class LaunchState:
    """What a kernel is started with. constants: the first constant bank, 32-bit words by byte."""

    constants: dict[int, int]
    grid: tuple[int, int]
    block: int
    shared_bytes: int


@dataclass
class SharedMemory:
    """32-bit words, of which those are known that were stored so."""

    words: Lanes
    known: Lanes

    @classmethod
    def of(cls, size: int) -> SharedMemory:
        count = size // 4 + 64
        return cls(np.zeros(count, np.int64), np.zeros(count, bool))

    def load(self, at: Value, word: int, mask: Lanes) -> Value:
        """A word of each lane; unknown where one of the active lanes' is."""
        if at is None:
            return None
        place = np.where(mask, (at >> 2) - _BASE + word, 0)
        self._check(place, at, mask)
        return self.words[place] if self.known[place[mask]].all() else None

    def store(self, at: Value, word: int, value: Value, mask: Lanes) -> None:
        if at is None:
            self.known[:] = False
            return
        place = (at[mask] >> 2) - _BASE + word
        self._check((at >> 2) - _BASE + word, at, mask)
        self.known[place] = value is not None
        if value is not None:
            self.words[place] = value[mask]

    def _check(self, place: Lanes, at: Lanes, mask: Lanes) -> None:
        if not ((place[mask] >= 0) & (place[mask] < len(self.words))).all():
            raise UnknownWayError(f"shared addresses out of bounds: {at[mask]}")


@dataclass
class Warp:
    """One warp: its registers and predicates, and where its lanes are."""

    launch: LaunchState
    shared: SharedMemory
    index: int
    block: tuple[int, int]
    registers: dict[str, list[Value]] = field(default_factory=dict)
    predicates: dict[str, list[Lanes | None]] = field(default_factory=dict)
    barriers: dict[str, Lanes] = field(default_factory=dict)
    issued: Counter[int] = field(default_factory=Counter)
    done: Counter[int] = field(default_factory=Counter)  # for at least one lane
    held: dict[str, Lanes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.registers = {"R": [lanes(0) for _ in range(258)], "UR": [lanes(0) for _ in range(66)]}
        self.predicates = {bank: [np.zeros(LANES, bool) for _ in range(8)] for bank in ("P", "UP")}
        self.pc = np.zeros(LANES, np.int64)
        self.alive = np.ones(LANES, bool)
        self.waiting = np.zeros(LANES, bool)  # at the end of a divergent region

    def constant(self, at: int) -> int:
        if at not in self.launch.constants:
            raise UnknownWayError(f"constant 0x{at:x} is not known")
        return self.launch.constants[at]

    def special(self, name: str) -> Value:
        known = {
            "SR_CTAID.X": lanes(self.block[0]),
            "SR_CTAID.Y": lanes(self.block[1]),
            "SR_TID.X": lanes(32 * self.index) + np.arange(LANES),
            "SR_LANEID": np.arange(LANES),
            "SR_CgaCtaId": lanes(0),
            "SR_SWINHI": lanes(0),
            "SRZ": lanes(0),
        }
        return known.get(name)

    def put(self, place: tuple[str, int], value: Value, mask: Lanes) -> None:
        bank, index = place
        if value is not None and not mask.all():
            old = self.registers[bank][index]
            value = np.where(mask, value, 0 if old is None else old)
        self.registers[bank][index] = value

    def put_predicate(self, name: str, value: Lanes | None, mask: Lanes) -> None:
        if name in ("PT", "UPT"):
            return
        bank, index = ("UP", int(name[2:])) if name.startswith("U") else ("P", int(name[1:]))
        if value is not None and not mask.all():
            old = self.predicates[bank][index]
            value = np.where(mask, value, False if old is None else old)
        self.predicates[bank][index] = value

    # ---- Execution ------------------------------------------------------------------------------

    def run(self, code: decode.Code) -> bool:
        """Goes on to the next barrier of the block; whether there is one (else the warp has
        ended)."""
        while True:
            ready = self.alive & ~self.waiting
            if not ready.any():
                if self.alive.any():
                    raise UnknownWayError("lanes wait for each other")
                return False
            here = int(self.pc[ready].min())
            mask = ready & (self.pc == here)
            instruction = code.at[here]
            self.issued[here] += instruction.counts
            self.pc[mask] = here + 16
            active = mask
            if instruction.guard is not None:
                guard = instruction.guard(self)
                if guard is None:
                    if instruction.moves:
                        raise UnknownWayError(f"0x{here:x}: {instruction.text}: unknown predicate")
                    instruction.forget(self, mask)
                    continue
                active = mask & guard
                if not active.any():
                    continue
            self.done[here] += 1
            if instruction.is_barrier:
                return True
            try:
                instruction.execute(self, active)
            except UnknownWayError as error:
                raise UnknownWayError(f"0x{here:x}: {instruction.text}: {error}") from None


def run_block(code: decode.Code, launch: LaunchState, block: tuple[int, int]) -> list[Warp]:
    """A block's warps after their run: how often each issued the instruction at each address.
    Raises UnknownWayError."""
    shared = SharedMemory.of(launch.shared_bytes)
    warps = [Warp(launch, shared, i, block) for i in range(launch.block // 32)]
    running = list(warps)
    while running:
        running = [warp for warp in running if warp.run(code)]
    return warps
