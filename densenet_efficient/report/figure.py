"""The volumes through a network as a picture: a box for each child of it, as deep as its channels
and as high as its image."""

from __future__ import annotations

import math
import os

from .summary import Summary

__all__ = ["draw_summary"]

# Of Okabe and Ito: told apart by readers with any colour vision.
_OTHER = "#999999"
_COLOURS = {
    "input": "#ffffff",
    "convolution": "#0072b2",
    "pooling": "#56b4e9",
    "dense block": "#e69f00",
    "transition": "#009e73",
    "upsampling": "#d55e00",
    "linear": "#cc79a7",
}
_SLOT = 1.0  # at least: room for the text under a box


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
    figure, axis = pyplot.subplots(figsize=(max(8.0, 1.05 * len(boxes)), 4.2))
    left, labelled = 0.0, set()
    for name, kind, shape, layers in boxes:
        width = 0.15 + 0.85 * shape[1] / widest
        height = math.sqrt((shape[2] if len(shape) > 2 else 1) / highest)
        slot = max(width, _SLOT)
        corner = left + (slot - width) / 2
        colour = _COLOURS.get(kind, _OTHER)
        group = kind if kind in _COLOURS else "norm, ReLU"
        label = None if group in labelled else group
        labelled.add(group)
        axis.bar(
            left + slot / 2, height, width, bottom=-height / 2, color=colour, edgecolor="black",
            linewidth=0.6, label=label,
        )  # fmt: skip
        # A dense block is drawn as what it is: its input, and a slice for every layer.
        for layer in range(1, layers):
            place = corner + width * layer / layers
            axis.plot([place] * 2, [-height / 2, height / 2], "k-", lw=0.3)
        sides = " x ".join(str(side) for side in shape[2:])
        text = f"{name}\n{shape[1]} channels\n{sides}"
        axis.text(left + slot / 2, -0.53, text, ha="center", va="top", fontsize=7)
        left += slot + 0.2
    axis.set(xlim=(-0.2, left), ylim=(-0.56, 0.62), xticks=[], yticks=[])
    axis.set_title(
        f"{summary.title}: {summary.parameters:,} parameters, "
        f"{summary.multiply_adds / summary.input_shape[0] / 1e9:.2f} G multiply-adds an image\n"
        "width: channels; height: square root of the side of the image",
        fontsize=9,
    )
    axis.legend(loc="upper right", ncols=4, fontsize=7, frameon=False)
    for side in axis.spines.values():
        side.set_visible(False)
    try:
        figure.savefig(path, dpi=130, bbox_inches="tight")
    finally:
        pyplot.close(figure)
