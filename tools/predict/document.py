"""The tables of docs/predict.md: predicted next to measured, and the shapes with idle waves."""

from __future__ import annotations

from collections.abc import Sequence

from tools.machine_code.compiler import ROOT

from .devices import Gpu
from .fit import Group, ratio
from .model import Efficiencies, total
from .waves import Idle

DOCUMENT = ROOT / "docs" / "predict.md"
KERNELS, STEPS, EFFICIENCIES, WAVES = "kernels", "steps", "efficiencies", "idle waves"
MEASURED_STEPS = "measured steps"


def kernel_table(groups: Sequence[Group], gpu: Gpu, given: Efficiencies) -> str:
    """Measured and predicted microseconds of each group, the longest first."""
    rows = [
        [
            f"{group.source}{', ' + group.work[0].stage if group.source == 'ncu' else ''}",
            f"`{group.kernel}`",
            str(sum(work.times for work in group.work)),
            f"{group.seconds * 1e6:.0f}",
            f"{total(group.work, gpu, given) * 1e6:.0f}",
            f"{ratio(group, gpu, given):.2f}",
        ]
        for group in sorted(groups, key=lambda group: -group.seconds)
    ]
    head = ["source", "kernel", "launches", "measured, us", "predicted, us", "measured / predicted"]
    return markdown(head, rows)


def efficiency_table(given: Efficiencies) -> str:
    rows = [
        ["launch", f"{given.launch * 1e6:.2f} us", "of any launch"],
        ["latency", f"{given.latency:.2f} cycles", "of an instruction, alone"],
        ["contention", f"{given.contention:.2f} cycles", "more for each warp of the scheduler"],
        ["memory", f"{given.memory:.2f}", "of the bandwidth, in convolutions at most; a copy's"],
        ["merge", f"{given.merge:.0f} cycles", "for each load and merge of a second pass"],
        ["sums", f"{given.sums:.2f}", "of the bandwidth, partial sums read by a second pass"],
        ["wave", f"{given.wave * 1e6:.2f} us", "for each wave of a second pass of sums"],
        ["products", f"{given.products:.3f}", "of the tensor cores' rate, a transition's products"],
        *([name, f"{share:.2f}", "of the bandwidth"] for name, share in given.rows.items()),
    ]  # fmt: skip
    return markdown(["efficiency", "value", "what it is"], rows)


def idle_table(found: Sequence[Idle]) -> str:
    rows = [
        [
            one.network,
            one.stage,
            f"`{one.kernel}`",
            f"{one.factor:.2f}",
            one.idlest.where,
            str(one.warps),
            one.loneliest.where,
        ]
        for one in found
    ]
    head = ["network", "stage", "kernel", "wave factor", "of", "warps", "of"]
    return markdown(head, rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
