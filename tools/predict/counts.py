"""Instructions that one warp executes for a tile, and once for its whole range, of each kernel.

They are counted in the machine code (tools/machine_code) and stored in counts.json, so that a
prediction needs no compiler. A kernel, its block and its shared memory settle everything but the
depth of a product: the forward passes take each further panel of channels in the same
instructions, so two depths are counted and the others lie on the line through them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from tools.emulation import Device, Emulator
from tools.op_cases import kernel_file

from .calls import Call
from .launches import COUNTED, Launch, arguments_of

STORED = Path(__file__).with_name("counts.json")
DEPTH = 32  # channels of a panel of 16 bits
LEAST_TILES = 4  # that a launch must have to be counted


class MissingCountError(LookupError):
    """A kernel of the step was never counted with this block."""


@dataclass(frozen=True)
class Count:
    """Of one warp, for each tile and for its range of tiles."""

    tile: float
    fixed: float


Points = dict[int, Count]  # by the panels of the product


def key(launch: Launch) -> str:
    """What decides about a kernel's way besides its depth: the block, and the tile's geometry."""
    width = f" width {launch.shape[2]}" if "conv1x1" not in launch.op else ""
    if launch.op.startswith("stem_conv"):  # whose tiles are lower where there would be few
        images, height = launch.shape[:2]
        width += f" rows {-(-images * ((height + 1) // 2) // launch.tiles)}"
    stats = "" if launch.stats else " without statistics"
    if "backward_data" in launch.kernel:  # whose blocks may divide the channels
        beside = launch.blocks // launch.ranges
        width += f" beside {beside}" if beside > 1 else ""
    return f"{launch.kernel} threads {launch.threads} shared {launch.shared_bytes}{width}{stats}"


def panels(launch: Launch) -> int:
    """Of the input's channels."""
    channels = launch.shape[-2]
    return -(-channels // DEPTH)


def stored() -> dict[str, Points]:
    data = json.loads(STORED.read_text()) if STORED.is_file() else {}
    return {
        name: {int(panel): Count(*count) for panel, count in points.items()}
        for name, points in data.items()
    }


def write(counts: dict[str, Points]) -> None:
    data = {
        name: {str(p): [round(c.tile, 1), round(c.fixed, 1)] for p, c in sorted(points.items())}
        for name, points in sorted(counts.items())
    }
    rows = ",\n".join(f" {json.dumps(name)}: {json.dumps(points)}" for name, points in data.items())
    STORED.write_text(f"{{\n{rows}\n}}\n")


def count_of(launch: Launch, counts: dict[str, Points]) -> Count:
    """The launch's own count, or that of the same kernel in the block that is most like its own,
    see `stand_ins`. Raises MissingCountError where the kernel was never counted."""
    points = counts.get(key(launch)) or _most_alike(launch, counts)
    if points is None:
        raise MissingCountError(
            f"{key(launch)} was never counted: python -m tools.predict --count, with the network, "
            "batch and GPU in question, counts it (needs nvcc)"
        )
    depth = panels(launch)
    low, high = min(points), max(points)
    if low == high or depth in points:
        return points.get(depth, points[low])
    share = (depth - low) / (high - low)
    first, last = points[low], points[high]
    return Count(
        first.tile + share * (last.tile - first.tile),
        first.fixed + share * (last.fixed - first.fixed),
    )


def _most_alike(launch: Launch, counts: dict[str, Points]) -> Points | None:
    """Of the same kernel, with as nearly as many threads and as much shared memory."""

    def distance(name: str) -> tuple[bool, int, int]:
        words = name.removeprefix(launch.kernel).split()
        statistics = name.endswith("without statistics") == launch.stats
        return (
            statistics,
            abs(int(words[1]) - launch.threads),
            abs(int(words[3]) - launch.shared_bytes),
        )

    alike = [name for name in counts if name.startswith(f"{launch.kernel} threads ")]
    return counts[min(alike, key=distance)] if alike else None


def stand_ins(launches: Iterable[Launch], counts: dict[str, Points]) -> list[str]:
    """What was not counted itself and is taken from another block of the same kernel."""
    persistent = (one for one in launches if one.ranges and one.op.startswith(COUNTED))
    return sorted({key(one) for one in persistent} - set(counts))


def extremes(launches: Iterable[Launch]) -> list[Launch]:
    """Of each kernel and block, the launches of least and of greatest depth: what to count."""
    found: dict[str, list[Launch]] = {}
    for launch in launches:
        counted = launch.ranges and launch.op.startswith(COUNTED)
        if counted and launch.tiles >= LEAST_TILES:
            found.setdefault(key(launch), []).append(launch)
    chosen = (choose(some, key=panels) for some in found.values() for choose in (min, max))
    return list(dict.fromkeys(chosen))


def renew(launches: Iterable[Launch], dtype: torch.dtype) -> None:
    """Counts what these launches need anew, and stores it."""
    write(stored() | count(extremes(launches), dtype))


def count(launches: Iterable[Launch], dtype: torch.dtype, arch: str = "90a") -> dict[str, Points]:
    """Counts these launches, of activations in this dtype, in the machine code of one architecture:
    minutes."""
    from tools.machine_code.compiler import compile_kernels
    from tools.machine_code.executed import execute, name_of

    launches = list(launches)
    ops = sorted({launch.op for launch in launches})
    by_name = {kernel.name: kernel for kernel in compile_kernels(arch, tuple(ops))}
    result: dict[str, Points] = {}
    with Emulator([kernel_file(op) for op in ops], sanitize=False) as emulator:
        for launch in launches:
            device = Device(launch.multiprocessors, launch.device_shared)
            call = Call("", launch.op, launch.shape, launch.stride, stats=launch.stats)
            arguments = arguments_of(call, dtype).arguments.values()
            for one in emulator.call(launch.op, *arguments, device=device):
                if name_of(one) == launch.kernel:
                    done = execute(one, by_name[launch.kernel])
                    count = Count(done.tile.total, done.fixed.total)
                    result.setdefault(key(launch), {})[panels(launch)] = count
    return result
