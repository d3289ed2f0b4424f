"""What the transitions and dense blocks of a feature extractor allocate and free in one step, and
the list of all its parts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..core import arena, layout
from ..core.arena import Buffer
from ..core.specs import BlockSpec, keeps_norms, kept_table, norm_elements, scratch_table
from ..nn.dense_block import DenseBlockExecution
from ..nn.features import FeaturesExecution
from ..nn.first_convolution import has_operator, is_made_again
from ..nn.layers import layer_spec
from ..nn.norms import includes_relu, is_batch_norm
from ..nn.transition import MAX_POOLS, TransitionExecution, is_max_pool_by_two
from ..ops.dispatch import choose
from ..ops.dtypes import accumulation_dtype
from . import workspaces
from .parts import SCRATCH, Convolution, Norm, Part, Stem
from .timeline import Timeline


class Transition(Part):
    """A transition, which keeps nothing but its input, the block's feature buffer. One that drops
    out pools after that, and keeps the mask and what the pooling reads."""

    pads_gradient = True

    def _drops(self) -> bool:
        assert isinstance(self.module, TransitionExecution)
        return self.module.parts().drop_rate > 0

    def forward(self, timeline: Timeline, training: bool) -> str | None:
        """See `Part.forward`."""
        if not self._drops():
            return super().forward(timeline, training)
        where = f"the forward of {self.name}"
        full = (*self.image, self._output_row())
        product = Buffer(f"{self.name} convolution", full, self.dtype, "transient")
        timeline.allocate(product, where)
        timeline.mark(where, self._workspace("forward"))
        mask = self.dtype if self.device.type == "cpu" else torch.bool
        pools = self.image != self.out_image
        lifetime = "kept" if training else "transient"
        timeline.allocate(Buffer(f"{self.name} mask", full, mask, lifetime), where)
        if pools:
            timeline.allocate(Buffer(f"{self.name} dropped", full, self.dtype, lifetime), where)
            timeline.free(product.name)
            return super().forward(timeline, training)
        timeline.allocate(Buffer(f"{self.name} output", full, self.dtype, "transient"), where)
        timeline.free(product.name)
        return f"{self.name} output"

    def backward(self, timeline: Timeline, arriving: str, follows: Part | None) -> str:
        """See `Part.backward`."""
        if self._drops():
            where = f"the backward of {self.name}"
            full = (*self.image, self.out_channels)
            before = Buffer(f"gradient of {self.name} convolution", full, self.dtype, "transient")
            timeline.allocate(before, where)
            timeline.free(arriving, f"{self.name} mask")
            if self.image != self.out_image:
                timeline.free(f"{self.name} dropped")
            arriving = before.name
        return super().backward(timeline, arriving, follows)

    def _workspace(self, way: str) -> int:
        if self.image != self.out_image and not self._drops():
            name, shape = "transition", (*self.image, self.channels)
        else:  # the operator of a block's first convolution
            name, shape = "norm_relu_conv1x1", (math.prod(self.image), self.channels)
        return workspaces.operator(
            f"{name}_{way}", shape, self.out_channels, self.dtype, self.device
        )

    def _output_row(self) -> int:
        return layout.row_length(self.out_channels, self.dtype, self.device)


class MaxTransition(Transition):
    """A transition that takes the largest of what its convolution gives, a few images at a time,
    and keeps where they come from: a byte for each."""

    def forward(self, timeline: Timeline, training: bool) -> str | None:
        """See `Part.forward`."""
        where = f"the forward of {self.name}"
        full = (*self.image, self._output_row())
        product = Buffer(f"{self.name} convolution", full, self.dtype, "transient")
        timeline.allocate(product, where)
        timeline.mark(where, self._workspace("forward"))
        lifetime = "kept" if training else "transient"
        places = (*self.out_image, self.out_channels)
        timeline.allocate(Buffer(f"{self.name} places", places, torch.uint8, lifetime), where)
        shape = (*self.out_image, self._output_row())
        output = Buffer(f"{self.name} output", shape, self.dtype, "transient")
        timeline.allocate(output, where)
        timeline.mark(where, workspaces.max_pool(full, self.dtype, super()._drops()))
        timeline.free(product.name)
        if not training:
            timeline.free(f"{self.name} places")
        return output.name

    def backward(self, timeline: Timeline, arriving: str, follows: Part | None) -> str:
        """See `Part.backward`."""
        full = (*self.image, self.out_channels)
        before = Buffer(f"gradient of {self.name} convolution", full, self.dtype, "transient")
        timeline.allocate(before, f"the backward of {self.name}")
        timeline.free(arriving, f"{self.name} places")
        return Part.backward(self, timeline, before.name, follows)

    def _drops(self) -> bool:
        return True  # it pools after its product, as one that drops out does


class Block(Part):
    """A dense block."""

    def new_channels(self) -> int:
        """Channels that its layers add."""
        assert isinstance(self.module, DenseBlockExecution)
        return sum(part.growth for part in self.module.parts())

    def forward(self, timeline: Timeline, training: bool) -> str | None:
        """See `Part.forward`."""
        spec, where = self._spec(), f"the forward of {self.name}"
        for row in self._rows(spec):
            lifetime = row.lifetime if training else "transient"
            timeline.allocate(Buffer(row.name, row.shape, row.dtype, lifetime), where)
        self._mark(timeline, spec, where, backward=False)
        if training:
            return None
        output, *others = (row.name for row in self._rows(spec))
        timeline.free(*others)
        return output

    def backward(self, timeline: Timeline, arriving: str, follows: Part | None) -> str:
        """The arriving gradient is the block's gradient buffer, whose first channels go on. One of
        PyTorch's is copied where rows are padded."""
        spec, where = self._spec(), f"the backward of {self.name}"
        length = layout.row_length(spec.out_channels, self.dtype, self.device)
        if length != spec.out_channels and not (follows and follows.pads_gradient):
            shape = (*self.image, length)
            buffer = Buffer(f"gradient buffer of {self.name}", shape, self.dtype, "transient")
            timeline.allocate(buffer, where)
            timeline.free(arriving)
            arriving = buffer.name
        self._mark(timeline, spec, where, backward=True)
        timeline.free(*(row.name for row in self._rows(spec)))
        return arriving

    def _rows(self, spec: BlockSpec) -> Iterator[Buffer]:
        for row in kept_table(spec, self.image, self.dtype, self.device):
            yield Buffer(f"{self.name} {row.name}", row.shape, row.dtype, row.lifetime)

    def _mark(self, timeline: Timeline, spec: BlockSpec, where: str, *, backward: bool) -> None:
        scratch = scratch_table(spec, self.image, self.dtype, backward)
        timeline.grow(SCRATCH, arena.slab_bytes(scratch), where)
        inside = workspaces.block(spec, self.image, self.dtype, self.device, backward)
        if not keeps_norms(self.device):
            inside += norm_elements(spec) * accumulation_dtype(self.dtype).itemsize
        timeline.mark(where, inside)

    def _spec(self) -> BlockSpec:
        assert isinstance(self.module, DenseBlockExecution)
        block, layers = self.module, []
        channels = block.parts()[0].norm1.num_features
        for (name, module), part in zip(block.dense_layers().items(), block.parts(), strict=True):
            layer, reason = layer_spec(part, name, channels, self.dtype, module.training)
            if layer is None:
                raise TypeError(f"model's {name} has no plan: {reason}")
            layers.append(layer)
            channels += layer.growth
        operators = choose(self.device, self.dtype, len(self.image) - 1).operators
        return BlockSpec(tuple(layers), operators, block.kept_layers)


def gradient_bytes(module: nn.Module) -> int:
    """Of all its parameters that want one."""
    return sum(p.numel() * p.itemsize for p in module.parameters() if p.requires_grad)


def transition_part(
    name: str,
    module: TransitionExecution,
    image: tuple[int, ...],
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Transition:
    """A transition for images (N, *spatial). ValueError where no pixel is left."""
    parts = module.parts()
    pools = type(parts.pool) is not nn.Identity
    out = (image[0], *(s // 2 if pools else s for s in image[1:]))
    if min(out) < 1:
        raise ValueError(f"input_shape is too small: no pixel is left at {name}")
    kind = MaxTransition if is_max_pool_by_two(parts.pool) else Transition
    return kind(name, module, image, channels, out, parts.conv.out_channels, dtype, device)


def parts_of(
    features: FeaturesExecution,
    image: tuple[int, ...],
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Part]:
    """The feature extractor's parts with their volumes; the stem's norm to pooling is one.
    TypeError for a child that has no plan."""
    parts: list[Part] = []

    def add(
        kind: type[Part], name: str, module: Any, out_image: tuple[int, ...], out_channels: int
    ) -> None:
        nonlocal image, channels
        parts.append(kind(name, module, image, channels, out_image, out_channels, dtype, device))
        image, channels = out_image, out_channels

    (name, conv), *children = features._modules.items()
    if not isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise TypeError(f"model must begin with a convolution, got {type(conv).__name__}")
    add(Convolution, name, conv, _image_after(conv, image), conv.out_channels)
    if is_batch_norm(children[0][1]):
        after = 1 if includes_relu(children[0][1]) else 2
        if type(children[after][1]) in MAX_POOLS:
            halved = (image[0], *(-(-s // 2) for s in image[1:]))
            add(Stem, "stem", children[0][1], halved, channels)
            if has_operator(conv, device, dtype):
                parts[0].operator = "stem_conv"
                parts[1].input_again = is_made_again(conv, features._modules.values())
            after += 1
        else:  # PyTorch's norm, which keeps its input, and its ReLU in place
            add(Norm, "stem", children[0][1], image, channels)
        children = children[after:]
    for name, child in children:
        if isinstance(child, DenseBlockExecution):
            new = sum(part.growth for part in child.parts())
            add(Block, name, child, image, channels + new)
        elif isinstance(child, TransitionExecution):
            parts.append(transition_part(name, child, image, channels, dtype, device))
            image, channels = parts[-1].out_image, parts[-1].out_channels
        elif is_batch_norm(child):
            add(Norm, name, child, image, channels)
        elif isinstance(child, nn.Identity):
            continue
        else:
            raise TypeError(
                f"model's features must be efficient blocks and transitions, got {name}: "
                f"{type(child).__name__}; call densenet_efficient.convert(model) first"
            )
    # A block copies its input into its own buffer; only the stem keeps the convolution's output.
    reads = len(parts) > 1 and not isinstance(parts[1], Block)
    parts[0].kept = reads and not parts[1].input_again
    return parts


def _image_after(conv: Any, image: tuple[int, ...]) -> tuple[int, ...]:
    meta = torch.empty((1, 1, *image[1:]), device="meta")
    kernel = torch.empty((1, 1, *conv.kernel_size), device="meta")
    out = torch.convolution(
        meta, kernel, None, conv.stride, conv.padding, conv.dilation, False,
        [0] * len(conv.kernel_size), 1,
    )  # fmt: skip
    return (image[0], *out.shape[2:])
