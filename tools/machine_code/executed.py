"""What a launch's warps issue: instructions by part, for each tile and tensor-core instruction."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from tools.emulation import Launch

from .compiler import Compiled, short_name
from .decode import Code
from .sources import OTHER, PARTS, part_of
from .static import TENSOR, mnemonic
from .warp import LaunchState, run_block

# The first bytes of the constant bank: sizes of block and grid; then the parameters.
_BLOCK, _GRID, _STACK, _PARAMETERS = 0x0, 0xC, 0x28, 0x210


@dataclass(frozen=True)
class Counts:
    """Instructions, by what the columns of the table name. Of one warp."""

    parts: dict[str, float]
    tensor: float
    copies: float  # 16-byte asynchronous copies, warp-wide

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Executed:
    """A launch: of one warp what each tile takes and what a range of tiles takes besides; the
    launch's warps, and its tiles' and ranges' number."""

    kernel: str
    tile: Counts
    fixed: Counts
    warps: int  # that work on a tile
    tiles: int
    ranges: int
    block: int

    @property
    def instructions(self) -> float:
        """Of the whole launch, warp-wide."""
        return self.warps * (self.tiles * self.tile.total + self.ranges * self.fixed.total)

    @property
    def tensor(self) -> float:
        return self.warps * self.tiles * self.tile.tensor

    @property
    def per_tensor(self) -> float:
        return self.instructions / self.tensor

    @property
    def per_copy(self) -> float:
        """Instructions of the copies for each 16-byte copy."""
        return self.tile.parts["copies"] / self.tile.copies if self.tile.copies else 0.0


def name_of(launch: Launch) -> str:
    kernel, _, arguments = launch.kernel.partition("<")
    return short_name(kernel.removesuffix("_kernel"), arguments.removesuffix(">"))


def execute(launch: Launch, kernel: Compiled) -> Executed:
    """Runs one block of the launch over one tile and over two, in the middle of the grid. Raises
    UnknownWayError where the way depends on data."""
    code = Code.of(kernel.listing)
    beside = launch.grid[0] // launch.ranges  # blocks of one range of tiles
    one, two = (_run(code, launch, kernel, beside, tiles) for tiles in (1, 2))
    tile = {key: two[key] - one[key] for key in two}
    fixed = {key: one[key] - tile[key] for key in one}
    return Executed(
        kernel.name,
        _counts(tile),
        _counts(fixed),
        launch.block // 32 * beside * launch.grid[1],
        launch.tiles,
        launch.ranges,
        launch.block,
    )


def _counts(by_key: dict[str, float]) -> Counts:
    parts = {part: by_key[part] for part in (*PARTS, OTHER)}
    return Counts(parts, by_key["tensor"], by_key["copy"])


def _run(code: Code, launch: Launch, kernel: Compiled, beside: int, tiles: int) -> dict[str, float]:
    """Instructions of a warp, on average over the block's, by part; and those that compute, and
    that copy 16 bytes."""
    if launch.tiles < 2 * tiles:
        raise ValueError(f"{launch.kernel}: expected at least {2 * tiles} tiles")
    ranges = launch.tiles // tiles
    grid = (ranges * beside, launch.grid[1])
    state = LaunchState(_constants(launch, grid), grid, launch.block, launch.shared_bytes)
    # The middle of the tiles: whole tiles, whose halo lies in the images.
    warps = run_block(code, state, (ranges // 2 * beside, 0))
    issued: Counter[int] = Counter()
    done: Counter[int] = Counter()
    for warp in warps:
        issued.update(warp.issued)
        done.update(warp.done)
    result = dict.fromkeys((*PARTS, OTHER, "tensor", "copy"), 0.0)
    names = {address: mnemonic(text) for address, text in kernel.listing}
    for address, times in issued.items():
        share = times / len(warps)
        result[part_of(kernel.places.get(address, ()))] += share
        name = names[address]
        result["tensor"] += share * name.startswith(TENSOR)
        if name.startswith("LDGSTS") and ".128" in name:
            result["copy"] += done[address] / len(warps)
    return result


def _constants(launch: Launch, grid: tuple[int, int]) -> dict[int, int]:
    data = launch.parameters + bytes(-len(launch.parameters) % 4)
    words = {_BLOCK: launch.block, _BLOCK + 4: 1, _BLOCK + 8: 1, _STACK: 0xFFFDC0}
    words |= {_GRID: grid[0], _GRID + 4: grid[1], _GRID + 8: 1, 0x208: 0, 0x20C: 0}
    for i in range(0, len(data), 4):
        words[_PARAMETERS + i] = int.from_bytes(data[i : i + 4], "little")
    return words
