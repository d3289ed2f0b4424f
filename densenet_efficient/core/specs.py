"""What one call of a block, transition or stem is, apart from its differentiable tensors, and the
memory it takes.

A specification names the norms' modes, the convolutions' geometry and the implementation of the
operators; the tables say what a block keeps and what scratch it shares, for the execution and for
the memory plan.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ops.convolution import ConvOptions
from ..ops.dtypes import accumulation_dtype
from ..ops.interface import NORM_ROWS, Operators
from . import layout
from .arena import Buffer
from .exchange import Exchange

PARAMETERS_PER_LAYER = 8
"""gamma1, beta1, weight1, bias1, gamma2, beta2, weight2, bias2; None where a layer has none."""


@dataclass(frozen=True)
class NormSpec:
    """One batch norm of a call.

    eps: added to the variance. running: [2, C] mean and variance to use, or None for the batch's.
    group: the processes that share the batch's statistics, None where this one's are its own.
    """

    eps: float
    running: Tensor | None = None
    group: Any = None


@dataclass(frozen=True)
class Tail:
    """What follows a bottleneck instead of a convolution.

    call: (z ``[N, K, *spatial]``, its parameters) -> new features ``[N, k, *spatial]``. count: of
    its parameters.
    """

    call: Callable[[Tensor, Sequence[Tensor | None]], Tensor]
    count: int


@dataclass(frozen=True)
class LayerSpec:
    """One dense layer of a call.

    in_channels C_l, growth k, bottleneck K (0: a plain layer, norm1 and conv1 only).
    conv1, conv2: None for the kernels' own geometry (1x1; 3x3, in one and three dimensions 3 and
    3x3x3, with padding 1), else the options of
    PyTorch's convolution. A plain layer's only convolution is conv1, with None meaning 3x3.
    drop_rate: probability of dropping a new value, 0 outside training. bottleneck_drop_rate: of
    dropping a value of the bottleneck, in front of norm2. tail: what conv2 is replaced by.
    """

    in_channels: int
    growth: int
    bottleneck: int
    norm1: NormSpec
    norm2: NormSpec | None
    conv1: ConvOptions | None = None
    conv2: ConvOptions | None = None
    drop_rate: float = 0.0
    channelwise_dropout: bool = False
    bottleneck_drop_rate: float = 0.0
    tail: Tail | None = None

    def batch_norms(self) -> list[NormSpec]:
        """The norms that use the batch's statistics."""
        norms = (self.norm1, self.norm2)
        return [norm for norm in norms if norm is not None and norm.running is None]

    def norm_widths(self) -> tuple[int, int]:
        """Channels of norm1 and norm2."""
        return self.in_channels, self.bottleneck

    def drops(self) -> bool:
        """Whether anything is dropped."""
        return self.drop_rate > 0 or self.bottleneck_drop_rate > 0


@dataclass(frozen=True)
class BlockSpec:
    """Everything about one call of a block that is not a differentiable tensor.

    operators: what runs it. kept_layers: of how many layers, the last ones, the bottlenecks are
    kept for backward; those of the others are computed again. seed: of the dropout masks, which
    backward draws again. masks: those that are kept instead, by layer and whether they are of its
    bottleneck; see `dropout`. newest_first: a layer's new channels stand in front of all earlier
    ones instead of after them. exchange: with the processes that share the statistics, if any.
    known_shared: whether the statistics known of the input are already those of all processes.
    programs: see `replay`; of all calls of these layers, None where a call is not to be recorded.
    """

    layers: tuple[LayerSpec, ...]
    operators: Operators
    kept_layers: int
    seed: int = 0
    newest_first: bool = False
    exchange: Exchange | None = None
    known_shared: bool = False
    masks: dict[tuple[int, bool], Tensor] | None = field(default=None, compare=False)
    programs: Any = field(default=None, compare=False)

    @property
    def variant(self) -> Hashable:
        """In what calls of these layers differ besides their tensors."""
        return self.kept_layers

    def keeps(self, index: int) -> bool:
        """Whether a layer's bottleneck is kept for backward."""
        first = len(self.layers) - self.kept_layers
        return index >= first and self.layers[index].bottleneck > 0

    def inputs(self, index: int) -> slice:
        """The channels of F that a layer reads; `inputs(0)` is the block's input."""
        channels = self.layers[index].in_channels
        if self.newest_first:
            return slice(self.out_channels - channels, self.out_channels)
        return slice(channels)

    def tail_parameters(self, index: int) -> slice:
        """Where the parameters of a layer's tail are: after those of all layers."""
        counts = [0 if layer.tail is None else layer.tail.count for layer in self.layers]
        first = PARAMETERS_PER_LAYER * len(counts) + sum(counts[:index])
        return slice(first, first + counts[index])

    def slot(self, index: int) -> slice:
        """The channels of F that a layer writes."""
        layer = self.layers[index]
        first = layer.in_channels
        if self.newest_first:
            first = self.out_channels - layer.in_channels - layer.growth
        return slice(first, first + layer.growth)

    @property
    def in_channels(self) -> int:
        """Channels of the block's input."""
        return self.layers[0].in_channels

    @functools.cached_property
    def out_channels(self) -> int:
        """Channels of the feature buffer."""
        return self.layers[-1].in_channels + self.layers[-1].growth

    @property
    def new(self) -> slice:
        """The channels of the feature buffer that are not the block's input."""
        added = self.out_channels - self.in_channels
        return slice(0, added) if self.newest_first else slice(self.in_channels, self.out_channels)

    @functools.cached_property
    def batch_stats(self) -> bool:
        """Whether any norm1 of the block uses the batch's statistics of F's channels."""
        return any(layer.norm1.running is None for layer in self.layers)

    @functools.cached_property
    def scratch_widths(self) -> tuple[int, int, int]:
        """Channels of the widest bottleneck that is not kept, of the widest one, and of the most
        values that are dropped together."""
        widths = [layer.bottleneck for layer in self.layers]
        lost = widths[: max(len(widths) - self.kept_layers, 0)]
        masked = [layer.growth for layer in self.layers if layer.drop_rate > 0]
        masked += [layer.bottleneck for layer in self.layers if layer.bottleneck_drop_rate > 0]
        return max(lost, default=0), max(widths), max(masked, default=0)


@dataclass(frozen=True)
class PoolSpec:
    """One call of a transition, a stem or a norm by itself.

    norm: as in a block. operators: what runs it. want_stats: whether to take the statistics of the
    result, which are this process' own. exchange, known_shared: as in `BlockSpec`. pools: False for
    a transition that keeps the resolution. programs: as in `BlockSpec`, of all calls of a module.
    """

    norm: NormSpec
    operators: Operators
    want_stats: bool
    exchange: Exchange | None = None
    known_shared: bool = False
    pools: bool = True
    programs: Any = field(default=None, compare=False)

    @property
    def variant(self) -> Hashable:
        """As in `BlockSpec`."""
        return self.want_stats, self.pools, self.norm.eps, self.norm.running is None


def scratch_table(
    spec: BlockSpec, image: Sequence[int], dtype: torch.dtype, backward: bool
) -> tuple[Buffer, ...]:
    """Shared scratch of one forward or backward call.

    image: (N, *spatial). Bottleneck values and their gradients exist for one layer at a time.
    """
    lost, widest, masked = spec.scratch_widths
    return _scratch_rows(lost, widest if backward else 0, masked, tuple(image), dtype)


@functools.lru_cache(maxsize=256)
def _scratch_rows(
    lost: int, gradient: int, masked: int, image: tuple[int, ...], dtype: torch.dtype
) -> tuple[Buffer, ...]:
    widths = {"bottleneck": lost, "bottleneck gradient": gradient, "dropout mask": masked}
    return tuple(
        Buffer(name, (*image, width), dtype, "scratch") for name, width in widths.items() if width
    )


def norm_length(channels: int, rows: int = NORM_ROWS) -> int:
    """Elements that a table of a norm's takes in the buffer of a block's, by default the folded
    norm: each begins at 16 bytes."""
    return -(-rows * channels // 4) * 4


def norm_elements(spec: BlockSpec, rows: int = NORM_ROWS) -> int:
    """Of the buffer of such tables of all norms of a block."""
    return sum(norm_length(width, rows) for layer in spec.layers for width in layer.norm_widths())


def keeps_norms(device: torch.device) -> bool:
    """Whether backward takes the norms that forward folded. On a GPU, where folding them again is
    two launches a layer; elsewhere that costs next to nothing, and norms take a share of what small
    images keep."""
    return device.type == "cuda"


def kept_table(
    spec: BlockSpec, image: Sequence[int], dtype: torch.dtype, device: torch.device
) -> list[Buffer]:
    """What a block keeps from forward to backward."""
    row = layout.row_length(spec.out_channels, dtype, device)
    table = [Buffer("features", (*image, row), dtype, "output")]
    acc = accumulation_dtype(dtype)
    columns = spec.out_channels + sum(layer.bottleneck for layer in spec.layers)
    table.append(Buffer("statistics", (2, columns), acc, "kept"))
    if keeps_norms(device):
        table.append(Buffer("norms", (norm_elements(spec),), acc, "kept"))
    for index, layer in enumerate(spec.layers):
        if spec.keeps(index):
            table.append(Buffer(f"b{index}", (*image, layer.bottleneck), dtype, "kept"))
    return table
