"""The tables in docs/kernels.md: written here, and read again by the tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from .compiler import ROOT
from .executed import Executed
from .sources import OTHER, PARTS
from .static import Kernel

DOCUMENT = ROOT / "docs" / "kernels.md"
STATIC, EXECUTED = "machine code", "executed instructions"


@dataclass(frozen=True)
class StoredStage:
    """A row of the second table, as far as tests compare it."""

    tensor: float
    per_tensor: float
    per_copy: float


def static_table(kernels: Sequence[Kernel]) -> str:
    """The kernels as a Markdown table."""
    names = [field.name for field in fields(Kernel)]
    rows = [[getattr(kernel, name) for name in names] for kernel in kernels]
    return _markdown(names, [[f"{v:.2f}" if isinstance(v, float) else v for v in r] for r in rows])


def executed_table(stages: Sequence[tuple[str, Executed]]) -> str:
    """The stages as a Markdown table."""
    parts = (*PARTS, OTHER)
    head = ["stage", "name", *parts, "range", "tensor", "per tensor", "copies", "per copy"]
    rows = []
    for block, one in sorted(stages, key=lambda stage: (stage[1].kernel, stage[0])):
        counts = [*(one.tile.parts[part] for part in parts), one.fixed.total, one.tile.tensor]
        row = [block, one.kernel, *(f"{count:.0f}" for count in counts)]
        rows.append(
            [*row, f"{one.per_tensor:.2f}", f"{one.tile.copies:.1f}", f"{one.per_copy:.1f}"]
        )
    return _markdown(head, rows)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    """As code where it would be taken for a tag: the name of a kernel with its parameters."""
    return f"`{value}`" if "<" in str(value) else str(value)


def _marks(title: str) -> tuple[str, str]:
    return f"<!-- {title}: begin -->", f"<!-- {title}: end -->"


def replaced(document: str, title: str, text: str) -> str:
    """The document with the text between the marks of this title replaced."""
    begin, end = _marks(title)
    before, rest = document.split(begin, 1)
    return f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end, 1)[1]}"


def table_rows(document: str, title: str) -> list[list[str]]:
    """The cells of the table between the marks of this title, without its head."""
    begin, end = _marks(title)
    between = document.split(begin, 1)[1].split(end, 1)[0]
    rows = [line.strip().strip("|").split("|") for line in between.splitlines() if "|" in line]
    return [[cell.strip(" `") for cell in row] for row in rows][2:]


def stored_kernels(document: str) -> dict[str, Kernel]:
    """The kernels of a document's table, by name."""
    kernels = {}
    for name, *cells in table_rows(document, STATIC):
        counts = [float(cell) if "." in cell else int(cell) for cell in cells]
        kernels[name] = Kernel(name, *counts)  # type: ignore[arg-type]
    return kernels


def stored_stages(document: str) -> dict[tuple[str, str], StoredStage]:
    """The stages of a document's table, by block and kernel."""
    stages = {}
    for block, name, *cells in table_rows(document, EXECUTED):
        tensor, per_tensor, _, per_copy = map(float, cells[-4:])
        stages[block, name] = StoredStage(tensor, per_tensor, per_copy)
    return stages
