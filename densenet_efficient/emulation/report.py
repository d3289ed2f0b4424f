"""The emulation's counters: what a profiler would say about one launch's traffic."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Site:
    """One place in the source that accesses memory.

    units and ideal are 32-byte sectors (global) or wavefronts of 32 banks (shared): what the warps'
    requests cost, and what the same bytes would cost at best.
    """

    file: str
    line: int
    access: str
    requests: int
    bytes: int
    units: int
    ideal: int

    @property
    def factor(self) -> float:
        """Cost over the best possible: for shared memory the bank-conflict factor."""
        return self.units / self.ideal if self.ideal else 1.0


@dataclass(frozen=True)
class Traffic:
    """Global traffic of one or more launches in one direction."""

    bytes: int
    sectors: int
    ideal_sectors: int

    @property
    def efficiency(self) -> float:
        """Sectors needed over sectors requested."""
        return self.ideal_sectors / self.sectors if self.sectors else 1.0


@dataclass(frozen=True)
class Launch:
    """The counters of one kernel launch; mma, ldmatrix and shuffles count warp-wide instructions,
    barriers block-wide ones."""

    op: str
    kernel: str
    grid: tuple[int, int]
    block: int
    shared_bytes: int
    mma: int
    mma_flops: int
    ldmatrix: int
    shuffles: int
    barriers: int
    sites: tuple[Site, ...]

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Launch:
        row = dict(row)
        grid = (row.pop("grid_x"), row.pop("grid_y"))
        sites = tuple(Site(**site) for site in row.pop("sites"))
        return cls(grid=grid, sites=sites, **row | {"kernel": _kernel_name(row["kernel"])})

    def table(self) -> str:
        """The counters, one line for each place that accesses memory."""
        lines = [
            f"{self.kernel}  grid {self.grid[0]} x {self.grid[1]}, block {self.block}, "
            f"shared {self.shared_bytes} bytes",
            f"  tensor-core instructions {self.mma} ({self.mma_flops / 1e6:.2f} MFLOP), "
            f"ldmatrix {self.ldmatrix}, shuffles {self.shuffles}, barriers {self.barriers}",
            f"  {'access':14}{'where':32}{'requests':>10}{'bytes':>12}{'cost':>10}{'best':>10}"
            f"{'factor':>8}",
        ]
        for site in sorted(self.sites, key=lambda site: (site.access, site.line)):
            lines.append(
                f"  {site.access:14}{f'{site.file}:{site.line}':32}{site.requests:10}"
                f"{site.bytes:12}{site.units:10}{site.ideal:10}{site.factor:8.3f}"
            )
        return "\n".join(lines)


def traffic(launches: Iterable[Launch], access: str) -> Traffic:
    """Sums the sites of one kind of access: "global load" or "global store"."""
    sites = [site for launch in launches for site in launch.sites if site.access == access]
    return Traffic(_sum(sites, "bytes"), _sum(sites, "units"), _sum(sites, "ideal"))


def conflict_factor(launches: Iterable[Launch]) -> float:
    """Wavefronts of all shared-memory accesses over the fewest possible."""
    sites = [s for launch in launches for s in launch.sites if s.access.startswith("shared")]
    ideal = _sum(sites, "ideal")
    return _sum(sites, "units") / ideal if ideal else 1.0


def _sum(sites: Sequence[Site], field: str) -> int:
    return sum(getattr(site, field) for site in sites)


def _kernel_name(signature: str) -> str:
    """The kernel and its template arguments, out of the compiler's name of the launching function."""
    found = re.search(r"auto kernel = (.*?); Args", signature) or re.search(
        r"kernel = (.*?)(?:; |\])", signature
    )
    name = found.group(1) if found else signature
    name = (
        re.sub(r"\((?:&|anonymous namespace|.*?::\*?)\)?", "", name)
        if name.startswith("(")
        else name
    )
    return name.replace("densenet_efficient::{anonymous}::", "").replace("c10::", "")
