"""Pictures that the package computes: where an image's bytes go, the memory timeline of a step.

Ours from the plan; torchvision's by following its storages (`live`). DenseNet-121, 224 px, batch
16, float32, as in the table of README.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from densenet_efficient.memory.planner import Plan, plan
from densenet_efficient.models.networks import NetworkSpec
from densenet_efficient.report.figure import draw_summary
from densenet_efficient.report.summary import summarise

from . import live, style

BATCH, SIZE = 16, 224
PLAIN = {"eager": "torchvision", "checkpoint": "torchvision-checkpoint"}
OURS = ("store", "recompute")
BUFFERS, BOTTLENECKS = "feature buffers", "bottlenecks"
GRADIENTS, PARAMETERS = "gradients of activations", "gradients of parameters"
SCRATCH = "scratch of the operators"
COLOURS = {
    live.CONCATENATED: style.RED,
    live.NORMALISED: style.ORANGE,
    BUFFERS: style.BLUE,
    live.CONVOLVED: style.PURPLE,
    BOTTLENECKS: style.SKY,
    GRADIENTS: style.GREEN,
    PARAMETERS: style.YELLOW,
    SCRATCH: style.ORANGE,
    live.OTHER: style.GREY,
}
BLOCKS = (6, 12, 24, 16)
# Parts of the network in order, and how wide they are drawn: a block by the root of its layers.
WIDTHS = {"stem": 1.8}
for _index, _layers in enumerate(BLOCKS, start=1):
    WIDTHS |= {f"denseblock{_index}": _layers**0.5, f"transition{_index}": 0.8}
del WIDTHS["transition4"]
WIDTHS["head"] = 1.0
_ALIASES = {"conv0": "stem", "norm0": "stem", "relu0": "stem", "pool0": "stem", "norm5": "head"}
_ALIASES["classifier"] = "head"


@functools.cache
def plain_step(peer: str) -> tuple[list[tuple[str, Counter[str]]], int]:
    """The history of torchvision's step and where its forward pass ends."""
    with torch.device("meta"):
        model = NetworkSpec("densenet121").build(PLAIN[peer])
        images = torch.empty(BATCH, 3, SIZE, SIZE)
    layout = torch.channels_last
    return live.step(model.to(memory_format=layout), images.to(memory_format=layout))  # type: ignore[call-overload]


@functools.cache
def our_plan(mode: str) -> Plan:
    """The plan of our step."""
    return plan(NetworkSpec("densenet121").build(mode), (BATCH, 3, SIZE, SIZE))


def _kind(name: str) -> str:
    """What a buffer of the plan is."""
    part, _, rest = name.partition(" ")
    if name in ("scratch", "inside the operator"):
        return SCRATCH
    if name == "parameter gradients":
        return PARAMETERS
    if part == "gradient":
        return GRADIENTS
    if part == "conv0":
        return live.CONVOLVED
    if rest.startswith("b") and rest[1:].isdigit():
        return BOTTLENECKS
    return BUFFERS if rest in ("features", "statistics") else live.OTHER


def _by_kind(buffers: Iterable[tuple[str, int]]) -> Counter[str]:
    found: Counter[str] = Counter()
    for name, size in buffers:
        found[_kind(name)] += size
    return found


def kept(peer: str) -> Counter[str]:
    """Bytes by kind that are live between the forward and the backward pass."""
    if peer in PLAIN:
        history, forward = plain_step(peer)
        return history[forward][1]
    rows = our_plan(peer).rows
    return _by_kind((row.name, row.bytes) for row in rows if row.lifetime in ("output", "kept"))


def bytes_of_an_image(path: Path) -> None:
    """What each peer keeps of an image for the backward pass, as stacked bars."""
    figure, axes = style.panels(1, size=(10.5, 3.6))
    axis = axes[0][0]
    shown: dict[str, float] = {}
    peers = (*PLAIN, *OURS)
    drawn: dict[str, Any] = {}
    for row, peer in enumerate(peers):
        left = 0.0
        for kind in COLOURS:
            size = kept(peer).get(kind, 0) / BATCH / 1e6
            if size == 0:
                continue
            bar = axis.barh(row, size, 0.62, left=left, color=COLOURS[kind], edgecolor="white")
            drawn.setdefault(kind, bar)
            if size > 4.5:
                ink = "white" if COLOURS[kind] in (style.BLUE, style.RED) else "black"
                axis.text(
                    left + size / 2, row, f"{size:.1f}", ha="center", va="center", fontsize=9,
                    color=ink,
                )  # fmt: skip
            left += size
            shown[f"{peer}, {kind}"] = size
        axis.text(left + 1, row, f"{left:.1f} MB", va="center", fontweight="bold")
    axis.set_yticks(range(len(peers)), [style.PEERS[peer][1] for peer in peers])
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.set_xlim(0, 148)
    axis.grid(axis="y", visible=False)
    axis.set_title(f"Kept for the backward pass: DenseNet-121, {SIZE} px, float32")
    axis.set_xlabel("per image (MB)")
    axis.legend(drawn.values(), drawn.keys(), loc="lower right", fontsize=9)
    style.save(figure, path, shown)


def volumes(path: Path) -> None:
    """The volumes through DenseNet-121, as `summary --figure` draws them."""
    draw_summary(summarise(NetworkSpec("densenet121")), path)


Point = tuple[float, Counter[str]]


def _placed(history: list[tuple[str, str, Counter[str]]]) -> list[Point]:
    """(direction, part, bytes) in order -> (place on the axis, bytes): the moments of a part are
    spread evenly over its width, forward from 0 to 1, backward from 1 to 2."""
    total = sum(WIDTHS.values())
    starts, start = {}, 0.0
    for part, width in WIDTHS.items():
        starts[part] = start
        start += width / total
    groups: dict[tuple[str, str], list[Counter[str]]] = {}
    for direction, part, live_bytes in history:
        groups.setdefault((direction, _ALIASES.get(part, part)), []).append(live_bytes)
    points = []
    for (direction, part), moments in groups.items():
        for i, live_bytes in enumerate(moments):
            inside = (i + 0.5) / len(moments) * WIDTHS[part] / total
            place = starts[part] + inside
            if direction == "backward":
                place = 2 - starts[part] - WIDTHS[part] / total + inside
            points.append((place, live_bytes))
    return sorted(points, key=lambda point: point[0])


def timeline(peer: str) -> list[Point]:
    """Bytes by kind along a step."""
    if peer in PLAIN:
        history, forward = plain_step(peer)
        named = []
        for i, (where, live_bytes) in enumerate(history):
            part = where.partition(" ")[2] or "conv0"
            part = "head" if where == "forward norm5" and i <= forward else part
            named.append(("forward" if i <= forward else "backward", part, live_bytes))
        return _placed(named)
    named, direction = [], "forward"
    for moment in our_plan(peer).moments:
        if any(name.startswith("gradient ") for name in moment.live):
            direction = "backward"
        part = moment.where.split(" ")[-1]
        named.append((direction, part, _by_kind(moment.live.items())))
    return _placed(named)


def timeline_of_a_step(path: Path) -> None:
    """Live memory along a training step: all peers, and ours in detail."""
    figure, axes = style.panels(1, rows=2, size=(10.5, 3.7))
    above, below = axes[0][0], axes[1][0]
    shown: dict[str, float] = {}
    for peer in (*PLAIN, *OURS):
        points = timeline(peer)
        sizes = [sum(live_bytes.values()) / 1e6 for _, live_bytes in points]
        colour, label = style.PEERS[peer]
        above.plot([x for x, _ in points], sizes, color=colour, linewidth=1.6)
        top = max(sizes)
        middle = max(size for (x, _), size in zip(points, sizes, strict=True) if 0.75 < x < 1.25)
        above.text(1, middle + 55, f"{label}: peak {top:,.0f} MB", color=colour, ha="center")
        shown[f"{peer}, peak MB"] = top
    style.from_zero(above, f"DenseNet-121, {SIZE} px, batch {BATCH}, float32", "", "live (MB)")
    above.set_ylim(0, 2400)

    points = timeline("recompute")
    kinds = (BUFFERS, live.CONVOLVED, GRADIENTS, PARAMETERS, SCRATCH, live.OTHER)
    xs = [0.0, *(x for x, _ in points), 2.0]
    moments = [points[0][1], *(live_bytes for _, live_bytes in points), points[-1][1]]
    stacks = [[live_bytes.get(kind, 0) / 1e6 for live_bytes in moments] for kind in kinds]
    below.stackplot(
        xs, stacks, colors=[COLOURS[kind] for kind in kinds], labels=kinds, linewidth=0, step="mid"
    )
    style.from_zero(below, "ours, recompute: what is live", "", "live (MB)")
    below.legend(loc="upper center", ncols=3, fontsize=9)
    below.set_ylim(0, 320)
    for axis in (above, below):
        _mark_parts(axis)
    figure.subplots_adjust(hspace=0.38)
    style.save(figure, path, shown)


def _mark_parts(axis: Any) -> None:
    """Names of the parts under the axis, forward and then backward."""
    total = sum(WIDTHS.values())
    start, edges, middles, names = 0.0, [0.0], [], []
    unnamed = {name for name, width in WIDTHS.items() if width <= 1}
    for name, width in WIDTHS.items():
        middles.append(start + width / total / 2)
        start += width / total
        edges.append(start)
        names.append(name.replace("denseblock", "block ") if name not in unnamed else "")
    axis.set_xlim(0, 2)
    axis.set_xticks([*middles, *(2 - middle for middle in middles)], [*names, *names], fontsize=8.5)
    axis.tick_params(axis="x", length=0)
    axis.grid(axis="x", visible=False)
    for edge in (*edges, *(2 - edge for edge in edges)):
        axis.axvline(edge, color="#eeeeee", linewidth=0.8, zorder=0)
    axis.axvline(1, color="#aaaaaa", linewidth=1, linestyle=":", zorder=0)
    for x, text in ((0.5, "forward"), (1.5, "backward")):
        axis.text(x, -0.11, text, transform=axis.get_xaxis_transform(), ha="center", va="top")
