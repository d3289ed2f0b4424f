"""The launches of a step's calls, as the launchers themselves make them: blocks, warps, tiles, how
many of them a multiprocessor holds, and what each moves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch

from tools import op_cases
from tools.emulation import Device, Emulator
from tools.emulation import Launch as Listed
from tools.machine_code import document
from tools.machine_code.executed import name_of
from tools.machine_code.static import Kernel

from .calls import PYTORCH, Call

# Threads and blocks that a multiprocessor of sm_80, sm_90 and sm_100 holds.
THREADS, BLOCKS = 2048, 32
# Operators whose blocks walk over tiles in a loop that is counted.
COUNTED = ("norm_relu_conv", "stem_conv")
SYSTEM_BYTES = 1024  # of shared memory, that the system takes for each block


@dataclass(frozen=True)
class Launch:
    """One launch. tiles: what its blocks walk over in so many static ranges; 0 of both where blocks
    do something else. blocks: of the grid; of a range there are blocks / ranges. resident: blocks
    that a multiprocessor holds at a time. size: the least bytes that the kernel moves. shape: of
    the call, stats: whether it takes statistics. partials: results of blocks that the second pass
    of a reduction combines, 0 elsewhere. flops: of a transition's product, 0 elsewhere."""

    stage: str
    op: str
    kernel: str
    times: int
    blocks: int
    threads: int
    resident: int
    tiles: int
    ranges: int
    multiprocessors: int
    size: int
    shape: tuple[int, ...]
    shared_bytes: int
    device_shared: int
    stride: int | None = None
    stats: bool = True
    partials: int = 0
    flops: int = 0

    @property
    def warps(self) -> int:
        """Of a block."""
        return self.threads // 32

    @property
    def at_once(self) -> int:
        """Blocks on the busiest multiprocessor."""
        return min(self.resident, -(-self.blocks // self.multiprocessors))

    @property
    def resident_warps(self) -> int:
        """Warps on the busiest multiprocessor."""
        return self.at_once * self.warps

    @property
    def waves(self) -> int:
        """Rounds of blocks; 1 where all of them are resident at once, as persistent blocks are."""
        return -(-self.blocks // (self.multiprocessors * self.resident))

    @property
    def turns(self) -> int:
        """Tiles that the busiest block takes, one after the other."""
        return -(-self.tiles // self.ranges) if self.ranges else 1

    @property
    def wave_factor(self) -> float:
        """Tiles that the busiest multiprocessor takes, over the average: 1 where all work as long,
        2 where most of them wait for a few that take another tile."""
        if not self.ranges:
            return 1.0
        beside = self.blocks // self.ranges
        return self.turns * self.waves * self.at_once * self.multiprocessors / self.tiles / beside


def emulator_for(calls: Iterable[Call]) -> Emulator:
    """The launchers of these calls, built for the host; needs g++. A context manager."""
    ours = (call.op for call in calls if not call.op.startswith(PYTORCH))
    return Emulator(sorted({op_cases.kernel_file(op) for op in ours}), sanitize=False)


def listed(
    calls: Iterable[Call], device: Device, dtype: torch.dtype, emulator: Emulator
) -> Iterator[Launch]:
    """The launches of these calls on a device."""
    known: dict[Call, list[Launch]] = {}
    for call in calls:
        same = replace(call, stage="")
        if same not in known:
            own = call.op.startswith(PYTORCH)
            known[same] = [_pytorch(call)] if own else _of_call(emulator, call, device, dtype)
        yield from (replace(launch, stage=call.stage) for launch in known[same])


def _pytorch(call: Call) -> Launch:
    return Launch("", call.op, call.op, call.times, 1, 32, 1, 0, 0, 1, 0, call.sizes, 0, 0)


def _of_call(emulator: Emulator, call: Call, device: Device, dtype: torch.dtype) -> list[Launch]:
    case = arguments_of(call, dtype)
    result: list[Launch] = []
    for one in emulator.call(call.op, *case.arguments.values(), device=device):
        size, partials = _least_bytes(case, one.kernel), 0
        if "_finish" in one.kernel:
            partials = result[-1].ranges or result[-1].blocks
            size = _partial_bytes(call, partials)
        result.append(
            Launch(
                "",
                call.op,
                name_of(one),
                call.times,
                one.grid[0] * one.grid[1],
                one.block,
                resident(one, device),
                one.tiles,
                one.ranges,
                device.multiprocessors,
                size,
                call.sizes,
                one.shared_bytes,
                device.shared_bytes,
                call.stride,
                call.stats,
                partials,
                _transition_flops(call, one.kernel),
            )
        )
    return result


def _partial_bytes(call: Call, partials: int) -> int:
    """Of a reduction's partial results: moments, or the sums of a weight gradient if there is one,
    and those of a norm."""
    rows, channels = 3, call.sizes[-1]
    if call.op == "stem_conv_backward_weight":
        rows = 49 * call.sizes[-2]
    if call.op.endswith("_backward"):
        rows = 2
        if not call.op.startswith("stem"):
            channels, outputs = call.sizes[-2:]
            rows += outputs * (9 if "3x3" in call.op else 1)
    return partials * rows * channels * 4


def _transition_flops(call: Call, kernel: str) -> int:
    products = ("transition_forward_kernel", "backward_product", "backward_weight")
    if not call.op.startswith("transition") or not any(name in kernel for name in products):
        return 0
    images, height, width, channels, outputs = call.sizes
    return 2 * images * (height // 2) * (width // 2) * channels * outputs


def arguments_of(call: Call, dtype: torch.dtype) -> op_cases.Case:
    """The call's arguments, without memory."""
    widths = {} if call.stride is None else dict.fromkeys(("x", "dx"), call.stride)
    case = op_cases.make(call.op, call.sizes, dtype, widths=widths, device="meta")
    weight = case.arguments.get("weight")
    if call.packed and weight is not None and weight.dim() == 4:
        case.arguments["weight"] = weight.contiguous(memory_format=torch.channels_last)
    if not call.stats:
        case.arguments["stats"] = None
    return case


def _least_bytes(case: op_cases.Case, kernel: str) -> int:
    """Of the activations and weights that one kernel of the operator reads or writes, each once."""
    names = ["x", "y", "dx", "dy", "dz_y", "weight"]
    if "_finish" in kernel or "_pack" in kernel:
        return 0
    if case.op == "norm_relu_conv3x3_backward" and "_weight" in kernel:
        names = ["x", "y", "dy"]
    moved = sum(case.sizes.get(name, 0) for name in names)
    return moved + (case.sizes["dx"] if op_cases.accumulates(case.op, case.arguments) else 0)


@cache
def _stored() -> dict[str, Kernel]:
    return document.stored_kernels(document.DOCUMENT.read_text())


def resident(launch: Listed, device: Device) -> int:
    """Blocks that a multiprocessor's shared memory, registers (as docs/kernels.md gives them) and
    threads hold. Kernels that are not in that table count by shared memory and threads alone."""
    by_shared = (device.shared_bytes + SYSTEM_BYTES) // (launch.shared_bytes + SYSTEM_BYTES)
    fits = [by_shared, THREADS // launch.block, BLOCKS]
    kernel = _stored().get(name_of(launch))
    if kernel is not None:
        fits.append(kernel.blocks(launch.block))
    return max(1, min(fits))
