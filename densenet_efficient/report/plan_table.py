"""A memory plan for people: a row for each group of buffers, or for every buffer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..core.arena import Buffer
from ..memory.planner import Plan
from .tables import table

__all__ = ["plan_text"]

SMALL = 0.01  # of the peak; smaller groups share a row


def plan_text(plan: Plan, *, every_row: bool = False) -> str:
    """The plan as a table and its peak.

    Args:
        every_row: every buffer, in the order of its allocation; else one row for the buffers of
            the same lifetime in each part of the network.
    """
    if every_row:
        columns = ["buffer", "shape", "dtype", "MB", "lifetime"]
        rows = [
            (
                row.name,
                " x ".join(str(size) for size in row.shape),
                str(row.dtype).removeprefix("torch."),
                _megabytes(row.bytes),
                row.lifetime,
            )
            for row in plan.rows
        ]
        text = table(columns, rows, left=("shape", "dtype", "lifetime"))
    else:
        text = table(["part", "lifetime", "buffers", "MB"], list(_groups(plan)), left=("lifetime",))
    each = plan.peak_bytes / max(plan.batch, 1)
    return (
        f"{text}\n\n"
        f"kept for backward {_megabytes(plan.kept_bytes)} MB{_bottlenecks(plan)}\n"
        f"predicted peak {_megabytes(plan.peak_bytes)} MB above the baseline before the step, "
        f"{_megabytes(each)} MB per image, at {plan.peak_at}"
    )


def _bottlenecks(plan: Plan) -> str:
    """How many layers' bottlenecks that includes, by block."""
    blocks = [f"{layers} in {name}" for name, layers in plan.kept_bottlenecks.items()]
    return f", with the bottlenecks of layers: {', '.join(blocks)}" if blocks else ""


def _groups(plan: Plan) -> Iterator[tuple[str, str, int, str]]:
    groups: dict[tuple[str, str], list[Buffer]] = {}
    for row in plan.rows:
        groups.setdefault((_part(row.name), row.lifetime), []).append(row)
    small: list[Buffer] = []
    for (part, lifetime), rows in groups.items():
        if _bytes(rows) < SMALL * plan.peak_bytes:
            small += rows
        else:
            yield part, lifetime, len(rows), _megabytes(_bytes(rows))
    if small:
        yield f"below {SMALL:.0%} of the peak", "", len(small), _megabytes(_bytes(small))


def _part(name: str) -> str:
    """The block, transition or other part of the network that a buffer belongs to."""
    if name.startswith("gradient "):
        return "gradients of the activations"
    return name if name == "parameter gradients" else name.split(" ")[0]


def _bytes(rows: Iterable[Buffer]) -> int:
    return sum(row.bytes for row in rows)


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.2f}"
