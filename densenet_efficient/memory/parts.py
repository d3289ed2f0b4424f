"""What each part of a feature extractor allocates and frees in one step, forward and backward; here
those in front of the first dense block.

A part's forward allocates what its output and its backward need, and names the output that the next
part consumes and nobody keeps. Its backward allocates the gradient it sends on and frees the one
that arrived.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..core import arena, layout
from ..core.arena import Buffer
from . import workspaces
from .timeline import Timeline

PARAMETER_GRADIENTS = "parameter gradients"
SCRATCH = "scratch"


@dataclass
class Part:
    """One part, with its input and output images (N, *spatial) and channels."""

    name: str
    module: nn.Module
    image: tuple[int, ...]
    channels: int
    out_image: tuple[int, ...]
    out_channels: int
    dtype: torch.dtype
    device: torch.device

    kept = False  # whether its output is kept for the backward pass of the next part
    input_again = False  # whether its backward makes its input again, in scratch
    pads_gradient = False  # whether the gradient it sends has padded rows, as a block wants it
    operator = ""  # of which the workspace counts

    def forward(self, timeline: Timeline, training: bool) -> str | None:
        """Returns the name of the output where it dies with the next part."""
        where = f"the forward of {self.name}"
        kept = training and self.kept
        row = self._output_row()
        shape = (*self.out_image, row)
        lifetime = "kept" if kept else "transient"
        output = Buffer(f"{self.name} output", shape, self.dtype, lifetime)
        timeline.allocate(output, where)
        timeline.mark(where, self._workspace("forward"))
        return None if kept else output.name

    def backward(self, timeline: Timeline, arriving: str, follows: Part | None) -> str:
        """arriving: name of the gradient of its output. follows: the next part in forward order.
        Returns the name of the gradient it sends."""
        where = f"the backward of {self.name}"
        row = layout.row_length(self.channels, self.dtype, self.device)
        shape = (*self.image, row if self.pads_gradient else self.channels)
        name = f"gradient before {self.name}"
        timeline.allocate(Buffer(name, shape, self.dtype, "transient"), where)
        timeline.mark(where, self._workspace("backward"))
        timeline.free(arriving)
        return name

    def _output_row(self) -> int:
        return self.out_channels

    def _workspace(self, way: str) -> int:
        """Bytes inside the operator; those inside PyTorch's own are not known."""
        if not self.operator:
            return 0
        shape = (*self.image, self.channels)
        return workspaces.operator(
            f"{self.operator}_{way}", shape, self.out_channels, self.dtype, self.device
        )


class Convolution(Part):
    """The first convolution, whose input needs no gradient."""

    def backward(self, timeline: Timeline, arriving: str, follows: Part | None) -> str:
        """See `Part.backward`."""
        timeline.mark(f"the backward of {self.name}", self._workspace("backward_weight"))
        return arriving


class Norm(Part):
    """A batch norm by itself."""


class Stem(Part):
    """Norm, ReLU and max-pooling. It reads the convolution's output, which is kept or made anew."""

    operator = "stem"

    def backward(self, timeline: Timeline, arriving: str, follows: Part | None) -> str:
        """See `Part.backward`."""
        if self.input_again:
            row = Buffer("convolution", (*self.image, self.channels), self.dtype, "scratch")
            where = f"the backward of {self.name}"
            timeline.grow(SCRATCH, arena.slab_bytes([row]), where)
        return super().backward(timeline, arriving, follows)

    def _output_row(self) -> int:
        return layout.row_length(self.out_channels, self.dtype, self.device)
