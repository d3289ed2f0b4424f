"""A step's allocations and releases in order: what is live at every moment of it."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.arena import Buffer


@dataclass(frozen=True)
class Moment:
    """A place in a step, such as "the forward of denseblock1", and the bytes live there by name."""

    where: str
    live: dict[str, int]

    @property
    def bytes(self) -> int:
        """All that is live."""
        return sum(self.live.values())


class Timeline:
    """Live buffers by name, the rows of the table, and the moments at which memory may be most."""

    def __init__(self) -> None:
        self.rows: list[Buffer] = []
        self.moments: list[Moment] = []
        self._live: dict[str, int] = {}

    def allocate(self, row: Buffer, where: str) -> str:
        """A buffer of its own; where: the place in the step, for the report. Returns its name."""
        self.rows.append(row)
        self._live[row.name] = row.bytes
        self.mark(where)
        return row.name

    def grow(self, name: str, size: int, where: str) -> None:
        """A buffer that is shared and only grows."""
        self._live[name] = max(self.bytes_of(name), size)
        self.mark(where)

    def add(self, name: str, size: int) -> None:
        """Bytes that come to a collection of buffers; seen by the next mark."""
        self._live[name] = self.bytes_of(name) + size

    def bytes_of(self, name: str) -> int:
        """Live bytes of that name."""
        return self._live.get(name, 0)

    def mark(self, where: str, extra: int = 0) -> None:
        """Notes what is live, with ``extra`` bytes that live inside one operator."""
        inside = {"inside the operator": extra} if extra else {}
        self.moments.append(Moment(where, {**self._live, **inside}))

    def lifetime(self, name: str) -> str:
        """Of the last buffer of that name."""
        return next(row.lifetime for row in reversed(self.rows) if row.name == name)

    def free(self, *names: str) -> None:
        """Names that are live no longer; unknown ones are ignored."""
        for name in names:
            self._live.pop(name, None)
