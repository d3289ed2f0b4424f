"""From what a launch executes to the time it takes.

A kernel of persistent blocks takes as long as its busiest block: one warp of it issues `turns`
tiles' instructions one after the other. Between two of a warp's instructions lie `latency` cycles
that the instruction before needs, and `contention` cycles for each of the warps that share a
scheduler, whether they wait for the issue slot, shared memory or the tensor cores:

    cycles = instructions of a warp * (latency + contention * warps of a scheduler)

With few warps latency counts, with many contention; 1 / contention is the most instructions a cycle
that a scheduler would ever issue. A kernel is no faster than its bytes at a share of the memory's
bandwidth. Each launch costs a fixed time; the second pass of a reduction is a chain of loads and
merges. Operators that only pass over rows take their bytes at a share of the bandwidth.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from .counts import Points, count_of
from .devices import Gpu
from .launches import COUNTED, Launch

SCHEDULERS = 4  # of a multiprocessor
# A second pass of moments (csrc/cuda/reduce/finish.cuh) asks for so many partial results at once,
# and then merges lanes, warps and sets one after the other.
MOMENTS_AT_ONCE, MERGES = 512, 3


@dataclass(frozen=True)
class Work:
    """What the model needs to know of a launch, `times` of which are alike.

    warps: of a scheduler of the busiest multiprocessor. instructions: of one warp of the busiest
    block. size: bytes, of partial results for a second pass. chain: the steps of such a pass that
    wait for one another, where they are moments. waves: of its blocks, where they are sums. flops:
    of a transition's product.
    """

    stage: str
    kernel: str
    times: int = 1
    warps: float = 0.0
    instructions: float = 0.0
    size: float = 0.0
    chain: float = 0.0
    waves: int = 0
    flops: float = 0.0


@dataclass(frozen=True)
class Efficiencies:
    """launch: seconds of any launch. latency, contention: cycles of an instruction, see above.
    memory: share of the bandwidth that the convolutions reach at most. merge: cycles for each step
    of a second pass of moments, a load and a merge. sums: share of the bandwidth at which a
    second pass reads sums, wave: seconds of a wave of its blocks. products: share of the tensor
    cores' rate in a transition's products. rows: share of the bandwidth of operators that only pass
    over rows, by name.
    host: seconds that the host takes for a launch; 0 where a graph replays the step."""

    launch: float
    latency: float
    contention: float
    memory: float
    merge: float
    sums: float
    wave: float
    products: float
    rows: dict[str, float] = field(default_factory=dict)
    host: float = 0.0

    def scaled(self, factor: float) -> Efficiencies:
        """Everything a kernel waits for takes `factor` times as long."""
        return replace(
            self,
            launch=self.launch * factor,
            latency=self.latency * factor,
            contention=self.contention * factor,
            memory=self.memory / factor,
            merge=self.merge * factor,
            sums=self.sums / factor,
            wave=self.wave * factor,
            products=self.products / factor,
            rows={name: share / factor for name, share in self.rows.items()},
            host=self.host * factor,
        )


def work_of(launch: Launch, counts: dict[str, Points]) -> Work:
    """Raises MissingCountError where the launch's instructions were never counted."""
    if launch.partials:
        moments = launch.op.endswith("_forward") or launch.op == "channel_stats"
        chain = -(-launch.partials // MOMENTS_AT_ONCE) + MERGES if moments else 0.0
        waves = 0 if moments else launch.waves
        return Work(
            launch.stage, launch.kernel, launch.times, size=launch.size, chain=chain, waves=waves
        )
    if not launch.ranges or not launch.op.startswith(COUNTED):
        return Work(launch.stage, launch.kernel, launch.times, size=launch.size, flops=launch.flops)
    count = count_of(launch, counts)
    return Work(
        launch.stage,
        launch.kernel,
        launch.times,
        warps=launch.resident_warps / SCHEDULERS,
        instructions=launch.waves * (launch.turns * count.tile + count.fixed),
        size=launch.size,
    )


def seconds(work: Work, gpu: Gpu, given: Efficiencies) -> float:
    """Of one of the launches."""
    if work.chain:
        return given.launch + work.chain * given.merge / gpu.clock
    if work.waves:
        read = work.size / (given.sums * gpu.bandwidth)
        return given.launch + max(work.waves * given.wave, read)
    if work.instructions:
        each = given.latency + given.contention * work.warps
        issued = work.instructions * each / gpu.clock
        moved = work.size / (given.memory * gpu.bandwidth)
        return given.launch + max(issued, moved)
    share = next((s for name, s in given.rows.items() if work.kernel.startswith(name)), 1.0)
    multiplied = work.flops / (given.products * gpu.products)
    return given.launch + max(work.size / (share * gpu.bandwidth), multiplied)


def total(works: Iterable[Work], gpu: Gpu, given: Efficiencies) -> float:
    """Seconds of all launches, one after the other."""
    return sum(work.times * seconds(work, gpu, given) for work in works)
