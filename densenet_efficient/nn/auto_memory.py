"""Which bottlenecks `memory="auto"` keeps: those for which a step's peak has room.

Backward begins with the last block, when little else is live, and in most networks needs most
memory at the first one, whose images are the largest. What the last blocks keep is free again by
then. So a classifier of a stem, blocks and transitions can keep some of its bottlenecks, and not
compute them again, without any more memory than with none.

Per image, in channels of the first block's pixels, live while backward comes from block i + 1 to
block i are the feature buffers and the kept bottlenecks of the blocks up to i, the gradient of F_i,
and that of F_(i+1), which arrives. Of parameter gradients there are the more the earlier the block;
scratch is the same throughout. Leaving both out makes the room of later blocks no larger than it
is.

A bottleneck of K channels that is computed again from C costs C K products a pixel and takes K
channels to keep: the worth of a layer is its C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import nn

from .dense_block import DenseBlockExecution
from .features import FeaturesExecution
from .layers import CONVOLUTIONS
from .options import AUTO
from .transition import TransitionExecution


@dataclass
class _Place:
    """A block in a network. pixels: of its images, in those of the first block."""

    block: DenseBlockExecution
    pixels: float

    def __post_init__(self) -> None:
        parts = self.block.parts()
        self.inputs = [part.norm1.num_features for part in parts]
        self.widths = [0 if part.norm2 is None else part.norm2.num_features for part in parts]
        self.features = self.pixels * (self.inputs[-1] + parts[-1].growth)


def assign(model: nn.Module) -> None:
    """Decides of how many layers the blocks of a model that are set to "auto" keep the bottlenecks:
    as many as its peak has room for where the model is a chain of blocks and transitions that ends
    in a classifier, and has no other convolution than the first; none in any other model."""
    blocks = [m for m in model.modules() if isinstance(m, DenseBlockExecution)]
    for block in blocks:
        if block.memory == AUTO:
            block.kept_layers = 0
    places = _chain(model)
    if not places or len(places) != len(blocks):
        return
    room = _room(places)
    for index, layer in by_worth([place.block for place in places]):
        place = places[index]
        kept = len(place.inputs) - layer
        cost = place.pixels * place.widths[layer]
        follows = place.block.memory == AUTO and place.block.kept_layers == kept - 1
        if follows and cost <= min(room[index:]):
            place.block.kept_layers = kept
            room[index:] = [left - cost for left in room[index:]]


def by_worth(blocks: Sequence[DenseBlockExecution]) -> list[tuple[int, int]]:
    """All layers with bottlenecks as (number of the block, number in it), those first whose
    bottlenecks are the most worth keeping; of a block the last ones first."""
    found = [
        (part.norm1.num_features, index, layer)
        for index, block in enumerate(blocks)
        for layer, part in enumerate(block.parts())
        if part.norm2 is not None
    ]
    return [(index, layer) for _, index, layer in sorted(found, reverse=True)]


def _room(places: Sequence[_Place]) -> list[float]:
    """What may be kept in each block and those before it."""
    sizes = [place.features for place in places]
    arriving = [*sizes[1:], sizes[-1]]
    live = [sum(three) for three in zip(accumulate(sizes), sizes, arriving, strict=True)]
    stored = accumulate(
        place.pixels * sum(place.widths) if place.block.memory == "store" else 0.0
        for place in places
    )
    live = [own + kept for own, kept in zip(live, stored, strict=True)]
    return [max(live) - own for own in live]


def _chain(model: nn.Module) -> list[_Place]:
    """The blocks of a model that is one chain; none of others."""
    chains = [m for m in model.modules() if isinstance(m, FeaturesExecution)]
    if len(chains) != 1:
        return []
    within = set(chains[0].modules())
    after = [m for m in model.modules() if m not in within]
    if any(isinstance(m, CONVOLUTIONS) for m in after):
        return []
    if not any(isinstance(m, nn.Linear) for m in after):
        return []
    pixels, places = 1.0, []
    for number, child in enumerate(chains[0].children()):
        if isinstance(child, DenseBlockExecution):
            places.append(_Place(child, pixels))
        elif isinstance(child, TransitionExecution):
            parts = child.parts()
            if type(parts.pool) is not nn.Identity:
                pixels /= 2 ** len(parts.conv.kernel_size)
        elif number and any(isinstance(m, CONVOLUTIONS) for m in child.modules()):
            return []
    return places
