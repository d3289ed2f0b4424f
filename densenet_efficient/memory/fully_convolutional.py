"""What an FC-DenseNet allocates and frees in one step: a way down whose blocks' outputs wait for
the way up, and a way up on which only new features go on.

The gradient of a block on the way up serves as the gradient of its skip connection until backward
has come down to there: PyTorch then adds it to what the transition sends.
"""

from __future__ import annotations

import torch
from torch import nn

from ..core import layout
from ..core.arena import Buffer
from ..nn.dense_block import DenseBlockExecution
from ..nn.fully_convolutional import FCDenseNetBase, Upsampling
from .parts import PARAMETER_GRADIENTS, Convolution, Norm, Part
from .steps import Block, Transition, gradient_bytes, transition_part
from .timeline import Timeline

Image = tuple[int, ...]


def network_in(model: nn.Module) -> FCDenseNetBase | None:
    """The efficient FC-DenseNet in a model, wrapped however deep."""
    for module in model.modules():
        if isinstance(module, FCDenseNetBase) and isinstance(
            module.child("denseblock1"), DenseBlockExecution
        ):
            return module
    return None


class Up(Part):
    """PyTorch's operators on the way up; a ReLU in place keeps what it is applied to."""

    gradient_row = 0  # of the block whose new features it reads

    def forward(self, timeline: Timeline, training: bool) -> str | None:
        """See `Part.forward`. Names an output that is kept as well: the concatenation reads it."""
        where = f"the forward of {self.name}"
        up = self.module
        assert isinstance(up, Upsampling)
        kept = "kept" if training and isinstance(up.relu, nn.ReLU) else "transient"
        n, h, w = self.image
        if up.kind == "subpixel":
            first = Buffer(f"{self.name} product", (n, h, w, self.out_channels), self.dtype, kept)
            shuffled = (n, 2 * h, 2 * w, self.out_channels // 4)
            read = "kept" if training else "transient"
            timeline.allocate(first, where)
            timeline.allocate(Buffer(f"{self.name} shuffled", shuffled, self.dtype, read), where)
            if kept == "transient":
                timeline.free(first.name)
        edge = 1 if up.kind == "deconv" else 0
        shape = (n, 2 * h + edge, 2 * w + edge, self.out_channels)
        output = Buffer(f"{self.name} output", shape, self.dtype, kept)
        timeline.allocate(output, where)
        if not training:
            timeline.free(f"{self.name} shuffled")
        return output.name

    def backward(self, timeline: Timeline, arriving: str, follows: Part | None) -> str:
        """What arrives stays: it is the gradient of the skip connection, too."""
        where = f"the backward of {self.name}"
        name = f"gradient of {self.name}"
        whole = (*self.out_image, self.out_channels)
        timeline.allocate(Buffer(name, whole, self.dtype, "transient"), where)
        before = f"gradient before {self.name}"
        shape = (*self.image, self.channels)
        timeline.allocate(Buffer(before, shape, self.dtype, "transient"), where)
        own = ("output", "product", "shuffled")
        timeline.free(name, *(f"{self.name} {what}" for what in own))
        return before


class Network:
    """The parts of a network for images (N, H, W)."""

    def __init__(
        self, network: FCDenseNetBase, image: Image, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.network, self.dtype, self.device = network, dtype, device
        self.poolings = network.poolings
        conv = network.conv0
        self.first = Convolution("conv0", conv, image, conv.in_channels, image, conv.out_channels,
                                 dtype, device)  # fmt: skip
        self.stem: list[Part] = [self.first]
        if network.child("norm0") is not None:
            self.stem.append(self._part(Norm, "norm0", self.first, image, conv.out_channels))
        early = network.child("transition0")
        if early is not None:
            self.stem.append(self._transition("transition0", self.stem[-1]))
        for part in self.stem[:-1]:  # PyTorch's norm and ReLU keep them, or a transition its input
            part.kept = True
        if early is None and len(self.stem) > 1:
            self.stem[-1].kept = True
        self.down: list[tuple[Block, Transition]] = []
        previous: Part = self.stem[-1]
        for i in range(1, self.poolings + 1):
            block = self._block(i, previous.out_image, previous.out_channels)
            self.down.append((block, self._transition(f"transition{i}", block)))
            previous = self.down[-1][1]
        self.middle = self._block(self.poolings + 1, previous.out_image, previous.out_channels)
        self.up: list[tuple[Up, Block]] = []
        source, new = self.middle, self.middle.new_channels()
        for i, (skip, _) in enumerate(reversed(self.down), start=1):
            up = self._up(i, source, new, skip.out_image)
            block = self._block(
                self.poolings + 1 + i, skip.out_image, up.out_channels + skip.out_channels
            )
            self.up.append((up, block))
            source, new = block, block.new_channels()
        self.last_up: Up | None = None
        if network.child(f"up{self.poolings + 1}") is not None:
            self.last_up = self._up(self.poolings + 1, source, source.out_channels, image)

    def _part(
        self, kind: type[Part], name: str, before: Part, out_image: Image, channels: int
    ) -> Part:
        return kind(name, self.network.child(name), before.out_image, before.out_channels,
                    out_image, channels, self.dtype, self.device)  # fmt: skip

    def _transition(self, name: str, before: Part) -> Transition:
        return transition_part(
            name, self.network.child(name), before.out_image, before.out_channels, self.dtype,
            self.device,
        )  # fmt: skip

    def _block(self, number: int, image: Image, channels: int) -> Block:
        name = f"denseblock{number}"
        made = Block(name, self.network.child(name), image, channels, image, channels, self.dtype,
                     self.device)  # fmt: skip
        made.out_channels += made.new_channels()
        return made

    def _up(self, number: int, source: Part, channels: int, image: Image) -> Up:
        name = f"up{number}"
        module = self.network.child(name)
        return Up(name, module, source.out_image, channels, image, module.num_output_features,
                  self.dtype, self.device)  # fmt: skip


def replay(timeline: Timeline, found: Network, training: bool) -> None:
    """One step, allocation by allocation."""
    dtype = found.dtype
    previous: str | None = None
    for part in found.stem:
        output = part.forward(timeline, training)
        timeline.free(previous or "")
        previous = output
    skips: list[str] = []
    for block, transition in found.down:
        skips.append(block.forward(timeline, training) or "")
        timeline.free(previous or "")
        previous = transition.forward(timeline, training)
    source = found.middle
    given = source.forward(timeline, training)
    timeline.free(previous or "")
    features = ""
    for up, block in found.up:
        reads = found.network.upsampling != "upsampling"
        features = _new_features(timeline, source, training and reads)
        timeline.free(given or "")
        output = up.forward(timeline, training) or ""
        where = f"the forward of {block.name}"
        shape = (*block.image, block.channels)
        joined = Buffer(f"{block.name} input", shape, dtype, "transient")
        timeline.allocate(joined, where)
        if not (training and reads):
            timeline.free(features)
        given = block.forward(timeline, training)
        timeline.free(joined.name, skips.pop())
        if not training or timeline.lifetime(output) == "transient":
            timeline.free(output)
        source = block
    last: Part = source
    if found.last_up is not None:
        last = found.last_up
        found.last_up.forward(timeline, training)
        if not training:
            timeline.free(given or "")
    classes = found.network.num_classes
    head = Buffer("logits and their loss", (*last.out_image, 2 * classes), dtype, "kept")
    timeline.allocate(head, "the head")
    if training:
        _backward(timeline, found, last)


def _new_features(timeline: Timeline, block: Block, kept: bool) -> str:
    lifetime = "kept" if kept else "transient"
    shape = (*block.image, block.new_channels())
    row = Buffer(f"{block.name} new features", shape, block.dtype, lifetime)
    return timeline.allocate(row, f"the forward of {block.name}")


def _backward(timeline: Timeline, found: Network, last: Part) -> None:
    network, dtype = found.network, found.dtype
    timeline.add(PARAMETER_GRADIENTS, gradient_bytes(network.classifier))
    logits = Buffer(
        "gradient of the logits", (*last.out_image, network.num_classes), dtype, "transient"
    )
    timeline.allocate(logits, "the head")
    shape = (*last.out_image, last.out_channels)
    arriving = timeline.allocate(
        Buffer("gradient before the head", shape, dtype, "transient"), "the head"
    )
    timeline.free(logits.name, "logits and their loss")
    if found.last_up is not None:
        timeline.add(PARAMETER_GRADIENTS, gradient_bytes(found.last_up.module))
        before = found.last_up.backward(timeline, arriving, None)
        timeline.free(arriving)
        arriving = before
    follows: Part | None = None
    sources = [found.middle, *(block for _, block in found.up)]
    waiting: list[str] = []
    for (up, block), source in zip(reversed(found.up), reversed(sources[:-1]), strict=True):
        arriving = _step_back(timeline, block, arriving, follows)
        waiting.append(arriving)  # its first channels are the gradient of the skip connection
        timeline.add(PARAMETER_GRADIENTS, gradient_bytes(up.module))
        before = up.backward(timeline, arriving, None)
        timeline.free(f"{source.name} new features")
        row = layout.row_length(source.out_channels, dtype, found.device)
        buffer = Buffer(f"gradient of {source.name}", (*source.image, row), dtype, "transient")
        arriving = timeline.allocate(buffer, f"the backward of {up.name}")
        timeline.free(before)
        follows = found.down[0][1]  # which pads rows as this buffer does
    arriving = _step_back(timeline, found.middle, arriving, follows)
    for block, transition in reversed(found.down):
        before = _step_back(timeline, transition, arriving, None)
        shape = (*block.image, block.out_channels)
        total = Buffer(f"gradient of {block.name}", shape, dtype, "transient")
        arriving = timeline.allocate(total, f"the backward of {block.name}")
        timeline.free(before, waiting.pop())
        arriving = _step_back(timeline, block, arriving, None)
    for part in reversed(found.stem):
        arriving = _step_back(timeline, part, arriving, None)
        timeline.free(f"{part.name} output")


def _step_back(timeline: Timeline, part: Part, arriving: str, follows: Part | None) -> str:
    timeline.add(PARAMETER_GRADIENTS, gradient_bytes(part.module))
    return part.backward(timeline, arriving, follows)
