"""Tables for people, by rich: text of their natural width, whatever the terminal's."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

__all__ = ["table"]


def table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, left: Sequence[str] = ()
) -> str:
    """Columns to the right, but for the first and those named in `left`."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="")
    for index, column in enumerate(columns):
        to_the_left = index == 0 or column in left
        grid.add_column(column, justify="left" if to_the_left else "right", no_wrap=True)
    for row in rows:
        grid.add_row(*(Text(str(value)) for value in row))
    paper = io.StringIO()
    Console(file=paper, width=10_000, color_system=None).print(grid)
    return "\n".join(line.rstrip() for line in paper.getvalue().splitlines() if line.strip())
