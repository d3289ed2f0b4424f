"""The operators' calls of one training step of a network, by shape."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from densenet_efficient.core.weights import GROUP_BYTES
from densenet_efficient.models.networks import NetworkSpec
from densenet_efficient.nn.dense_block import DenseBlockExecution
from densenet_efficient.nn.options import check_memory
from densenet_efficient.ops.interface import CUDA_NAMES
from tools.op_cases import Sizes

# PyTorch's own kernels: casts, copies, zeros, the head, the optimiser, whose number was read from a
# profile.
PYTORCH = "pytorch"


@dataclass(frozen=True)
class Call:
    """times: how often the step makes it. stride: channels of the buffer that x is a slice of."""

    stage: str
    op: str
    sizes: Sizes
    stride: int | None = None
    times: int = 1
    stats: bool = True  # whether the statistics of the result are wanted
    packed: bool = True  # a 3x3 weight is channels last, as in a network that trains so


@dataclass(frozen=True)
class Step:
    """A training step: the batch's images of so many pixels a side, by memory mode."""

    network: NetworkSpec
    batch: int
    image_size: int
    memory: str

    def __post_init__(self) -> None:
        if self.network.dense or not self.network.options().get("bottleneck", True):
            raise ValueError(
                f"network: expected one with bottlenecks and a classifier, got {self.network.title}"
            )
        if self.batch < 1:
            raise ValueError(f"batch: expected a positive integer, got {self.batch}")
        check_memory(self.memory)

    @property
    def layers(self) -> int:
        return sum(self.network.options()["block_config"])

    @property
    def stem_side(self) -> int:
        """Of the first convolution's result."""
        return self.image_size if self.network.small_inputs else (self.image_size + 1) // 2

    def kept_layers(self) -> list[int]:
        """Of how many layers each block keeps the bottlenecks."""
        with torch.device("meta"):
            network = self.network.build(self.memory)
        return [m.kept_layers for m in network.modules() if isinstance(m, DenseBlockExecution)]

    def calls(self) -> list[Call]:
        """In the order of the step, forward and backward."""
        forward, backward = [], []
        for part in self._parts():
            forward += part[0]
            backward[:0] = part[1]
        layers = self.layers
        return [*forward, Call("head", PYTORCH, (), times=30), *backward,
                Call("optimiser", PYTORCH, (), times=60 + layers // 2)]  # fmt: skip

    def _parts(self) -> Iterator[tuple[list[Call], list[Call]]]:
        """Forward and backward of the stem, and of each layer and transition."""
        options = self.network.options()
        growth, channels = options["growth_rate"], options["num_init_features"]
        side = self.stem_side
        stats = Call("stem", "channel_stats", (self.batch * side * side, channels))
        own = Call("stem", PYTORCH, (), times=12)
        if self.network.small_inputs:
            yield [own, stats], [own]
        else:
            sizes = (self.batch, side, side, channels)
            images = (self.batch, self.image_size, self.image_size, 3, channels)
            first, gradient = (Call("stem", name, images) for name in CUDA_NAMES)
            again = [] if self.memory == "store" else [first]
            yield (
                [own, first, stats, Call("stem", "stem_forward", sizes)],
                [*again, Call("stem", "stem_backward", sizes), gradient, own],
            )
            side = (side + 1) // 2
        blocks, kept = options["block_config"], self.kept_layers()
        for index, layers in enumerate(blocks):
            stage = f"block {index + 1}"
            rows, total = self.batch * side * side, _row(channels + growth * layers)
            apply = Call(stage, "norm_correction_apply", (rows, channels), total)
            own = Call(stage, PYTORCH, (), times=3 + _casts(channels, growth, layers))
            yield [own, Call(stage, "norm_fold", (channels,))], [apply, own]
            for layer in range(layers):
                again = layer < layers - kept[index]
                yield self._layer(stage, side, channels + growth * layer, growth, total, again)
            yield [Call(stage, PYTORCH, ())], []  # the running statistics
            channels += growth * layers
            if index + 1 < len(blocks):
                half = int(channels * options.get("compression", 0.5))
                sizes = (self.batch, side, side, channels, half)
                fold, own = Call(stage, "norm_fold", (channels,)), Call(stage, PYTORCH, (), times=2)
                yield (
                    [own, fold, Call(stage, "transition_forward", sizes)],
                    [own, fold, Call(stage, "transition_backward", sizes)],
                )
                channels, side = half, side // 2

    def _layer(
        self, stage: str, side: int, inputs: int, growth: int, total: int, again: bool
    ) -> tuple[list[Call], list[Call]]:
        width = 4 * growth
        flat = (self.batch * side * side, inputs, width)
        image = (self.batch, side, side, width, growth)
        first = Call(stage, "norm_relu_conv1x1_forward", flat, total)
        forward = [first, Call(stage, "norm_relu_conv3x3_forward", image, width)]
        second = [dataclasses.replace(first, stats=False)] if again else []
        backward = [
            *second,
            Call(stage, "norm_relu_conv3x3_backward", image, width),
            Call(stage, "norm_relu_conv1x1_backward", flat, total),
        ]
        return forward, backward


def _casts(channels: int, growth: int, layers: int) -> int:
    """How often the weights of a block are cast to 16 bits, some layers' together."""
    inputs = sum(channels + growth * layer for layer in range(layers))
    elements = 4 * growth * inputs + layers * 36 * growth**2
    return math.ceil(2 * elements / GROUP_BYTES)


def _row(channels: int) -> int:
    """Channels of a buffer's row, which begins at a sector of memory."""
    return -(-channels // 16) * 16
