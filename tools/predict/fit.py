"""The efficiencies that explain measured kernels.

A group is what was measured together: one kernel's launches of a step, or one launch alone. The fit
lowers the mean squared logarithm of measured over predicted, each group weighted by the square root
of its time, by a pattern search over the efficiencies' logarithms.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .devices import GPUS, Gpu
from .model import Efficiencies, Work, total

ROOT = Path(__file__).resolve().parents[2]
STORED = Path(__file__).with_name("efficiencies.json")
MEASURED = ROOT / "benchmarks" / "results" / "kernels-h200.json"
FITTED = ("launch", "latency", "contention", "merge", "sums", "wave", "products")
START = Efficiencies(
    launch=2e-6, latency=3.0, contention=1.5, memory=0.83, merge=500.0, sums=0.3, wave=1e-6,
    products=0.05,
    rows={"channel_stats": 0.3, "norm_correction_apply": 0.7, "stem": 0.4, "transition": 0.4},
)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """What was measured: the source, such as "densenet121 store", the kernel, its launches' seconds
    together, and the work of those launches."""

    source: str
    kernel: str
    seconds: float
    work: tuple[Work, ...]

    @property
    def held_out(self) -> bool:
        """Whether it is predicted only: everything but DenseNet-121's kernels."""
        return self.source.startswith(("densenet264", "densenet_cifar"))


@dataclass(frozen=True)
class Measured:
    """A device's measurements: groups, and whole steps as they are stored."""

    gpu: Gpu
    groups: tuple[Group, ...]
    steps: tuple[dict[str, Any], ...]

    @property
    def fitted(self) -> list[Group]:
        return [group for group in self.groups if not group.held_out]


def measured(path: Path = MEASURED) -> Measured:
    data = json.loads(path.read_text())
    groups = [
        Group(
            group["source"],
            group["kernel"],
            group["microseconds"] * 1e-6,
            tuple(Work(stage, group["kernel"], *rest) for stage, *rest in group["work"]),
        )
        for group in data["groups"]
    ]
    return Measured(GPUS[data["gpu"]], tuple(groups), tuple(data["steps"]))


def stored() -> Efficiencies:
    """Those of `fit` to the stored measurements, of the groups that are not held out."""
    return Efficiencies(**json.loads(STORED.read_text()))


def write(found: Efficiencies) -> None:
    rounded = {
        name: {k: _digits(v) for k, v in value.items()}
        if isinstance(value, dict)
        else _digits(value)
        for name, value in asdict(found).items()
    }
    STORED.write_text(json.dumps(rounded, indent=1) + "\n")


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def ratio(group: Group, gpu: Gpu, given: Efficiencies) -> float:
    """Measured over predicted."""
    return group.seconds / total(group.work, gpu, given)


def fit(groups: Sequence[Group], gpu: Gpu, start: Efficiencies = START) -> Efficiencies:
    """Those of `FITTED`, and rows; memory and host are taken as given."""
    weights = [math.sqrt(group.seconds) for group in groups]

    def loss(given: Efficiencies) -> float:
        logs = (math.log(ratio(group, gpu, given)) for group in groups)
        return sum(w * log**2 for w, log in zip(weights, logs, strict=True)) / sum(weights)

    moves: list[Callable[[Efficiencies, float], Efficiencies]] = [
        lambda given, factor, name=name: replace(given, **{name: getattr(given, name) * factor})  # type: ignore[misc]
        for name in FITTED
    ]
    moves += [
        lambda given, factor, name=name: replace(  # type: ignore[misc]
            given, rows={**given.rows, name: given.rows[name] * factor}
        )
        for name in start.rows
    ]
    best, least, step = start, loss(start), 1.3
    while step > 1.002:
        better = False
        for move in moves:
            for factor in (step, 1 / step):
                tried = move(best, factor)
                found = loss(tried)
                if found < least * (1 - 1e-9):
                    best, least, better = tried, found, True
                    break
        if not better:
            step = math.sqrt(step)
    return best


def spread(groups: Sequence[Group], gpu: Gpu, given: Efficiencies) -> tuple[float, float]:
    """Measured over predicted at a tenth and at nine tenths of the measured time, the kernels in
    order of this ratio: what best and worst are."""
    ordered = sorted(groups, key=lambda group: ratio(group, gpu, given))
    whole = sum(group.seconds for group in groups)
    ends: list[float] = []
    for share in (0.1, 0.9):
        passed, found = 0.0, ordered[-1]
        for group in ordered:
            passed += group.seconds
            if passed >= share * whole:
                found = group
                break
        ends.append(ratio(found, gpu, given))
    return ends[0], ends[1]
