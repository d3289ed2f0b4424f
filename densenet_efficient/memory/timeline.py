"""A step's allocations and releases in order: what stands at its fullest moment."""

from __future__ import annotations

from ..core.arena import Buffer


class Ledger:
    """Live buffers by name, the rows of the table, and the largest sum so far (bytes)."""

    def __init__(self) -> None:
        self.rows: list[Buffer] = []
        self.live: dict[str, int] = {}
        self.peak = 0
        self.peak_at = "the beginning"
        self.at_peak: dict[str, int] = {}

    def allocate(self, row: Buffer, where: str) -> None:
        """A buffer of its own; where: the place in the step, for the report."""
        self.rows.append(row)
        self.live[row.name] = row.bytes
        self.mark(where)

    def grow(self, name: str, size: int, where: str) -> None:
        """A buffer that is shared and only grows."""
        self.live[name] = max(self.live.get(name, 0), size)
        self.mark(where)

    def mark(self, where: str, extra: int = 0) -> None:
        """Note the sum, with ``extra`` bytes that live inside one operator."""
        total = sum(self.live.values()) + extra
        if total > self.peak:
            self.peak, self.peak_at = total, where
            self.at_peak = dict(self.live)
            if extra:
                self.at_peak["inside the operator"] = extra

    def free(self, *names: str) -> None:
        """Names that stand no longer; unknown ones are ignored."""
        for name in names:
            self.live.pop(name, None)
