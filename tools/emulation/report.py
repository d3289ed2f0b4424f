"""The emulation's counters: what a profiler would say about one launch's traffic."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

SECTOR = 32  # bytes


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
    """Global traffic in one direction, by the warps' requests (not what the caches let through).

    bytes and sectors asked for; distinct: sectors touched at all; needed: the sectors that hold the
    bytes where they lie in memory, as often as these are asked for: 24 bytes of a row need one
    sector or two, whoever reads them.
    """

    bytes: int = 0
    sectors: int = 0
    distinct: int = 0
    needed: float = 0.0

    @classmethod
    def from_json(cls, row: dict[str, int]) -> Traffic:
        """Of one launch. Workspaces, whose distinct bytes are not known, are taken as packed."""
        per_byte = row["distinct"] / row["distinct_bytes"] if row["distinct_bytes"] else 1 / SECTOR
        return cls(row["bytes"], row["sectors"], row["distinct"], row["bytes"] * per_byte)

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.bytes + other.bytes,
            self.sectors + other.sectors,
            self.distinct + other.distinct,
            self.needed + other.needed,
        )

    @property
    def efficiency(self) -> float:
        """Sectors needed over sectors requested."""
        return self.needed / self.sectors if self.sectors else 1.0


@dataclass(frozen=True)
class TensorTraffic:
    """What a launch, or several, loaded from and stored to one argument, or "workspace"."""

    load: Traffic
    store: Traffic


@dataclass(frozen=True)
class Launch:
    """The counters of one kernel launch; mma, ldmatrix and shuffles count warp-wide instructions,
    barriers block-wide ones. tiles: what persistent blocks walk over in so many
    static ranges. parameters: the kernel's arguments, as the device would find them."""

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
    tiles: int
    ranges: int
    parameters: bytes
    sites: tuple[Site, ...]
    tensors: dict[str, TensorTraffic]

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Launch:
        row = dict(row)
        row["kernel"] = kernel_name(row["kernel"])
        row["parameters"] = bytes.fromhex(row["parameters"])
        row["grid"] = (row.pop("grid_x"), row.pop("grid_y"))
        row["sites"] = tuple(Site(**site) for site in row["sites"])
        row["tensors"] = {
            tensor["name"]: TensorTraffic(
                Traffic.from_json(tensor["load"]), Traffic.from_json(tensor["store"])
            )
            for tensor in row["tensors"]
        }
        return cls(**row)

    @property
    def conflict_factor(self) -> float:
        """Shared-memory wavefronts over the fewest possible."""
        shared = [site for site in self.sites if site.access.startswith("shared")]
        ideal = sum(site.ideal for site in shared)
        return sum(site.units for site in shared) / ideal if ideal else 1.0

    def table(self) -> str:
        """The counters, one line for each place that accesses memory."""
        lines = [
            f"{self.kernel}  grid {self.grid[0]} x {self.grid[1]}, block {self.block}, "
            f"shared {self.shared_bytes} bytes",
            f"  tensor-core instructions {self.mma} ({self.mma_flops / 1e6:.2f} MFLOP), "
            f"ldmatrix {self.ldmatrix}, shuffles {self.shuffles}, barriers {self.barriers}",
            f"  {'access':14}{'where':34}{'requests':>10}{'bytes':>12}{'cost':>10}{'best':>10}"
            f"{'factor':>8}",
        ]
        for site in sorted(self.sites, key=lambda site: (site.access, site.file, site.line)):
            lines.append(
                f"  {site.access:14}{f'{site.file}:{site.line}':34}{site.requests:10}"
                f"{site.bytes:12}{site.units:10}{site.ideal:10}{site.factor:8.3f}"
            )
        return "\n".join(lines)


def tensor_traffic(launches: Iterable[Launch]) -> dict[str, TensorTraffic]:
    """By argument, summed over launches: of several launches that load the same tensor, each counts
    its distinct sectors anew."""
    total: dict[str, TensorTraffic] = {}
    for launch in launches:
        for name, traffic in launch.tensors.items():
            before = total.get(name, TensorTraffic(Traffic(), Traffic()))
            total[name] = TensorTraffic(before.load + traffic.load, before.store + traffic.store)
    return total


def tensor_table(launches: Iterable[Launch], sizes: dict[str, int]) -> str:
    """Traffic by argument; sizes: the arguments' own bytes, so that multiples of them show."""
    lines = [
        f"{'tensor':14}{'bytes':>12}{'loaded':>12}{'times':>8}{'memory':>8}{'sectors':>9}"
        f"{'stored':>12}{'times':>8}{'sectors':>9}"
    ]
    for name, traffic in tensor_traffic(launches).items():
        load, store, size = traffic.load, traffic.store, sizes.get(name, 0)
        if not load.bytes and not store.bytes:
            continue

        def times(amount: int, size: int = size) -> str:
            return f"{amount / size:.3f}" if size else "-"

        lines.append(
            f"{name:14}{size or '-':>12}{load.bytes:12}{times(load.bytes):>8}"
            f"{times(load.distinct * SECTOR):>8}{load.efficiency:9.3f}"
            f"{store.bytes:12}{times(store.bytes):>8}{store.efficiency:9.3f}"
        )
    return "\n".join(lines)


def kernel_name(signature: str) -> str:
    """The kernel and its template arguments, without namespaces, from the compiler's name of the
    launching function."""
    found = re.search(r"auto kernel = (.*?)(?:; Args|\])", signature)
    name = found.group(1) if found else signature
    return re.sub(r"[\w{}]+::", "", name)
