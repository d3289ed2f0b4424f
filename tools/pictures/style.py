"""What the pictures have in common: colours that all readers can tell apart (Okabe and Ito), one
colour for each peer and each kind of memory, and the figures they show, stored in the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, RED, PURPLE, GREY, BROWN = "#0072B2", "#D55E00", "#CC79A7", "#999999", "#7F4F24"

# Peer: colour, label.
PEERS = {
    "eager": (RED, "PyTorch, eager"),
    "checkpoint": (ORANGE, "PyTorch, checkpointed"),
    "compile": (PURPLE, "torch.compile"),
    "compile-budget": (GREY, "torch.compile, memory budget"),
    "store": (SKY, "ours, store"),
    "auto": (BROWN, "ours, auto"),
    "recompute": (BLUE, "ours, recompute"),
    "ours": (GREEN, "ours"),  # of a network without modes
}
pyplot.rcParams |= {
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.framealpha": 1.0,
    "legend.edgecolor": "none",
}


def panels(columns: int, rows: int = 1, size: tuple[float, float] = (5.4, 4.2)) -> Any:
    """A figure and its axes, [rows, columns]; size: of one panel, in inches."""
    whole = (size[0] * columns, size[1] * rows)
    return pyplot.subplots(rows, columns, figsize=whole, squeeze=False)


def from_zero(axis: Axes, title: str, x: str, y: str) -> None:
    """Title and units; the vertical axis begins at zero."""
    axis.set_title(title)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_ylim(bottom=0)


def save(figure: Figure, path: Path, shown: Mapping[str, float]) -> None:
    """Writes a PNG with the figures it shows, so that a test can tell whether they still hold."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({name: round(value, 4) for name, value in shown.items()})
    figure.savefig(
        path, dpi=144, bbox_inches="tight", facecolor="white",
        metadata={"Figures": text, "Software": None},
    )  # fmt: skip
    pyplot.close(figure)


def shown_by(path: Path) -> dict[str, float]:
    """The figures that a picture shows; none where it was saved without."""
    from PIL import Image

    with Image.open(path) as picture:
        return json.loads(picture.info.get("Figures", "{}"))
