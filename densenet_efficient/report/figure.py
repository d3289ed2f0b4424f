"""The volumes through a network as a picture: a box for each child of it, as deep as its channels
and as high as its image."""

from __future__ import annotations

import math
import os

from .summary import Summary

__all__ = ["draw_summary"]

_COLOURS = {
    "input": "#b0b0b0",
    "convolution": "#4c72b0",
    "norm": "#8c8c8c",
    "ReLU": "#8c8c8c",
    "pooling": "#937860",
    "dense block": "#dd8452",
    "transition": "#55a868",
    "linear": "#8172b3",
}


def draw_summary(summary: Summary, path: str | os.PathLike[str]) -> None:
    """Draw to a file (png, svg, pdf by its ending).

    Raises:
        ImportError: matplotlib is missing. ValueError: an ending that it does not know.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "a figure needs matplotlib: pip install 'densenet-efficient[train]'"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    boxes = [("input", "input", summary.input_shape, 0)]
    boxes += [(v.name, v.kind, v.shape, v.layers) for v in summary.volumes]
    widest = max(shape[1] for _, _, shape, _ in boxes)
    highest = max((*shape[2:], 1)[0] for _, _, shape, _ in boxes)
    figure, axis = pyplot.subplots(figsize=(max(8.0, 0.95 * len(boxes)), 4.6))
    left, labelled = 0.0, set()
    for name, kind, shape, layers in boxes:
        width = 0.15 + 0.85 * shape[1] / widest
        height = math.sqrt((shape[2] if len(shape) > 2 else 1) / highest)
        colour = _COLOURS.get(kind, "#8c8c8c")
        label = None if kind in labelled else kind
        labelled.add(kind)
        axis.bar(
            left + width / 2, height, width, bottom=-height / 2, color=colour, edgecolor="black",
            linewidth=0.6, label=label,
        )  # fmt: skip
        # A dense block is drawn as what it is: its input, and a slice for every layer.
        for layer in range(1, layers):
            axis.plot([left + width * layer / layers] * 2, [-height / 2, height / 2], "k-", lw=0.3)
        sides = " x ".join(str(side) for side in shape[2:]) or "-"
        text = f"{name}\n{shape[1]} channels\n{sides}"
        axis.text(left + width / 2, -0.56, text, rotation=60, ha="right", va="top", fontsize=7)
        left += width + 0.25
    axis.set(xlim=(-0.2, left), ylim=(-0.56, 0.62), xticks=[], yticks=[])
    axis.set_title(
        f"{summary.title}: {summary.parameters:,} parameters, "
        f"{summary.multiply_adds / summary.input_shape[0] / 1e9:.2f} G multiply-adds an image\n"
        "width: channels; height: the root of the image's side",
        fontsize=9,
    )
    axis.legend(loc="upper right", ncols=4, fontsize=7, frameon=False)
    for side in axis.spines.values():
        side.set_visible(False)
    try:
        figure.savefig(path, dpi=130, bbox_inches="tight")
    finally:
        pyplot.close(figure)
