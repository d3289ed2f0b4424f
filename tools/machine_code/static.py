"""What the compiler made of each kernel with tensor-core instructions: registers, spills, and the
instructions around the tensor cores. One row of the first table in docs/kernels.md."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .compiler import Compiled, Listing

# Instructions by the beginning of their name.
TENSOR = ("HMMA", "HGMMA", "UTCHMMA")
LOCAL = ("LDL", "STL")


@dataclass(frozen=True)
class Kernel:
    """One row of the table. spills: bytes stored and loaded; local: instructions that touch local
    memory; copies: 16-byte asynchronous copies. Instructions beside each tensor-core instruction:
    `product` in the basic blocks that hold any, `loop` in the innermost loops that hold any, with
    loads under way, ways for unaligned rows that are not taken, and all."""

    name: str
    registers: int
    spills: int
    local: int
    tensor: int
    copies: int
    product: float
    loop: float
    instructions: int

    def blocks(self, threads: int) -> int:
        """Blocks that one multiprocessor's 65,536 registers hold; each of its four parts takes
        whole warps."""
        per_warp = -(-self.registers * 32 // 256) * 256
        return 4 * (16384 // per_warp) // (threads // 32)


def describe(compiled: Compiled) -> Kernel:
    """The row of a kernel."""
    instructions = compiled.listing
    names = [(address, mnemonic(text)) for address, text in instructions]
    tensor = sum(name.startswith(TENSOR) for _, name in names)
    product = sum(len(block) for block in basic_blocks(instructions) if has_tensor(block))
    loops = innermost_loops(instructions)
    in_loops = sum(mnemonic(text).startswith(TENSOR) for loop in loops for text in loop)
    return Kernel(
        name=compiled.name,
        registers=compiled.registers,
        spills=compiled.spills,
        local=sum(name.startswith(LOCAL) for _, name in names),
        tensor=tensor,
        copies=sum(name.startswith("LDGSTS") and ".128" in name for _, name in names),
        product=(product - tensor) / tensor if tensor else 0.0,
        loop=sum(len(loop) for loop in loops) / in_loops - 1 if in_loops else 0.0,
        instructions=sum(name != "NOP" for _, name in names),
    )


def has_tensor(code: list[str]) -> bool:
    return any(mnemonic(text).startswith(TENSOR) for text in code)


def innermost_loops(instructions: Listing) -> list[list[str]]:
    """The loops with tensor-core instructions that hold no smaller loop with any."""
    index = {address: i for i, (address, _) in enumerate(instructions)}
    loops: list[tuple[int, int]] = []
    for end, (address, text) in enumerate(instructions):
        target = re.search(r"0x([0-9a-f]+)$", text)
        if mnemonic(text).startswith("BRA") and target and int(target[1], 16) < address:
            begin = index[int(target[1], 16)]
            if has_tensor([code for _, code in instructions[begin : end + 1]]):
                loops.append((begin, end))
    innermost = [
        (begin, end)
        for begin, end in loops
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in loops)
    ]
    return [[code for _, code in instructions[begin : end + 1]] for begin, end in innermost]


def mnemonic(text: str) -> str:
    """The instruction's name, without the predicate before it and the operands behind it."""
    words = text.split()
    return words[1] if words[0].startswith("@") else words[0]


def basic_blocks(instructions: Listing) -> list[list[str]]:
    """Runs of instructions that are entered at their first and left at their last."""
    targets = {
        int(t, 16)
        for _, text in instructions
        for t in re.findall(r"0x([0-9a-f]+)$", text)
        if mnemonic(text).startswith(("BRA", "BSSY"))
    }
    blocks: list[list[str]] = [[]]
    for address, text in instructions:
        if address in targets and blocks[-1]:
            blocks.append([])
        blocks[-1].append(text)
        if mnemonic(text).startswith(("BRA", "EXIT", "BAR", "CALL", "RET")):
            blocks.append([])
    return blocks
