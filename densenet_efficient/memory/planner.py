"""The memory plan: what a training step will allocate, before anything is.

The plan walks a model's stages with the same tables the execution uses
(`core.specs.kept_table`, `core.specs.scratch_table`) and
replays a step as a ledger of allocations and releases: forward, backward, parameter gradients. The
largest sum is the predicted peak over what stands before the step. Temporary results inside an
operator count with the sizes its own workspace functions give.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..core import arena, layout
from ..core.arena import Buffer
from ..core.specs import BlockCall, kept_table, scratch_table
from ..nn.dense_block import EfficientDenseBlock
from ..nn.features import EfficientFeatures, EfficientTransition
from ..nn.layers import layer_call
from ..nn.norms import BATCH_NORMS
from ..ops.dispatch import FLOATING, choose
from ..ops.fallback import accumulation_dtype
from . import workspaces
from .timeline import Ledger


@dataclass(frozen=True)
class Plan:
    """Predicted memory of one step.

    rows: every buffer in the order of its allocation. peak_bytes: the most that stands at once over
    what stood before the step; peak_at: where in the step; at_peak: name -> bytes of what stands
    then.
    """

    rows: tuple[Buffer, ...]
    peak_bytes: int
    peak_at: str
    at_peak: dict[str, int] = field(repr=False)
    batch: int = 1

    @property
    def total_bytes(self) -> int:
        """Sum of all rows, whether they stand at the same time or not."""
        return sum(row.bytes for row in self.rows)

    @property
    def kept_bytes(self) -> int:
        """What stands between forward and backward: outputs kept and other kept rows."""
        return sum(row.bytes for row in self.rows if row.lifetime in ("output", "kept"))

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        lines = [f"{'buffer':{width}}  {'shape':24} {'dtype':9} {'MB':>10}  lifetime"]
        for row in self.rows:
            shape = "x".join(str(size) for size in row.shape)
            dtype = str(row.dtype).removeprefix("torch.")
            size = f"{row.bytes / 1e6:10.3f}"
            lines.append(f"{row.name:{width}}  {shape:24} {dtype:9} {size}  {row.lifetime}")
        lines.append(
            f"all rows {self.total_bytes / 1e6:.1f} MB, kept for backward "
            f"{self.kept_bytes / 1e6:.1f} MB"
        )
        each = self.peak_bytes / max(self.batch, 1) / 1e6
        lines.append(
            f"predicted peak {self.peak_bytes / 1e6:.1f} MB over what stands before the step "
            f"({each:.2f} MB per image), at {self.peak_at}"
        )
        return "\n".join(lines)


@dataclass
class _Stage:
    """One child of the feature extractor, with its input and output images (N, *spatial)."""

    name: str
    module: nn.Module
    image: tuple[int, ...]
    channels: int
    out_image: tuple[int, ...]
    out_channels: int


def _image_after(conv: Any, image: tuple[int, ...]) -> tuple[int, ...]:
    meta = torch.empty((1, 1, *image[1:]), device="meta")
    kernel = torch.empty((1, 1, *conv.kernel_size), device="meta")
    out = torch.convolution(
        meta, kernel, None, conv.stride, conv.padding, conv.dilation, False,
        [0] * len(conv.kernel_size), 1,
    )  # fmt: skip
    return (image[0], *out.shape[2:])


def _stages(features: EfficientFeatures, image: tuple[int, ...], channels: int) -> list[_Stage]:
    """The feature extractor's stages with their volumes; the stem's norm to pooling is one."""
    children = list(features._modules.items())
    stages: list[_Stage] = []

    def add(name: str, module: nn.Module, out_image: tuple[int, ...], out_channels: int) -> None:
        nonlocal image, channels
        stages.append(_Stage(name, module, image, channels, out_image, out_channels))
        image, channels = out_image, out_channels

    name, conv = children[0]
    if not isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise TypeError(f"model must begin with a convolution, got {type(conv).__name__}")
    add(name, conv, _image_after(conv, image), conv.out_channels)
    rest = children[1:]
    if type(rest[0][1]) in BATCH_NORMS:
        add("stem", rest[0][1], (image[0], *(-(-s // 2) for s in image[1:])), channels)
        rest = rest[3:]
    for name, child in rest:
        if isinstance(child, EfficientDenseBlock):
            new = sum((p.conv2 or p.conv1).out_channels for p in child.parts())
            add(name, child, image, channels + new)
        elif isinstance(child, EfficientTransition):
            add(name, child, (image[0], *(s // 2 for s in image[1:])), child.conv.out_channels)
        elif type(child) in BATCH_NORMS:
            add(name, child, image, channels)
        else:
            raise TypeError(
                f"model's features must be efficient blocks and transitions, got {name}: "
                f"{type(child).__name__}; call densenet_efficient.convert(model) first"
            )
    return stages


def _block_call(block: EfficientDenseBlock, dtype: torch.dtype, device: torch.device) -> BlockCall:
    layers = []
    channels = block.parts()[0].norm1.num_features
    for name, part in zip(block._modules, block.parts(), strict=True):
        layer, reason = layer_call(part, name, channels, dtype, block._modules[name].training)
        if layer is None:
            raise TypeError(f"model's {name} has no plan: {reason}")
        layers.append(layer)
        channels += layer.growth
    return BlockCall(tuple(layers), choose(device, dtype).stages, block.memory)


def _gradient_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.itemsize for p in module.parameters() if p.requires_grad)


def plan(
    model: nn.Module,
    input_shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    training: bool = True,
) -> Plan:
    """Predict the memory of one training step, or of one inference call.

    Args:
        model: an ``EfficientDenseNet`` or a converted model with ``features`` and ``classifier``.
        input_shape: of the images, ``(N, C, *spatial)``.
        dtype: of the activations (autocast's dtype under autocast).
        training: False predicts a call under ``no_grad``.

    Returns a :class:`Plan`; ``str()`` of it is the table. The optimiser's state and the parameters
    stand before the step and are not counted, parameter gradients are.

    Raises:
        TypeError: the model's features are not efficient blocks; dtype is not floating.
        ValueError: input_shape is not (N, C, *spatial), positive, with the model's channels.
    """
    features = getattr(model, "features", None)
    if not isinstance(features, EfficientFeatures):
        raise TypeError(
            "model must be an EfficientDenseNet or a converted model with efficient features, got "
            f"{type(model).__name__}; call densenet_efficient.convert(model) first"
        )
    if dtype not in FLOATING:
        raise TypeError(f"dtype must be float64, float32, bfloat16 or float16, got {dtype}")
    shape = tuple(int(size) for size in input_shape)
    conv = next(iter(features._modules.values()))
    dims = len(getattr(conv, "kernel_size", (0, 0)))
    if len(shape) != dims + 2 or min(shape) < 1:
        raise ValueError(f"input_shape must be {dims + 2} positive sizes, got {list(input_shape)}")
    if shape[1] != conv.in_channels:
        raise ValueError(f"input_shape must have {conv.in_channels} channels, got {shape[1]}")
    ledger = Ledger()
    stages = _stages(features, (shape[0], *shape[2:]), shape[1])
    device = next(model.parameters()).device
    _replay(ledger, model, stages, dtype, device, training)
    return Plan(tuple(ledger.rows), ledger.peak, ledger.peak_at, ledger.at_peak, shape[0])


def _replay(
    ledger: Ledger,
    model: nn.Module,
    stages: list[_Stage],
    dtype: torch.dtype,
    device: torch.device,
    training: bool,
) -> None:
    """One step, allocation by allocation; every name is one live buffer."""
    acc = accumulation_dtype(dtype)

    def out(stage: _Stage, lifetime: str) -> Buffer:
        row = stage.out_channels
        if stage.name == "stem" or isinstance(stage.module, EfficientTransition):
            row = layout.row_length(row, dtype, device)  # the framework's results are dense
        return Buffer(f"{stage.name} output", (*stage.out_image, row), dtype, lifetime)

    def grad(stage: _Stage) -> Buffer:
        row = stage.channels
        if isinstance(stage.module, EfficientTransition):
            row = layout.row_length(row, dtype, device)
        return Buffer(f"gradient before {stage.name}", (*stage.image, row), dtype, "transient")

    previous = None  # the output that the next stage consumes and nobody keeps
    for index, stage in enumerate(stages):
        where = f"the forward of {stage.name}"
        if isinstance(stage.module, EfficientDenseBlock):
            block = _block_call(stage.module, dtype, device)
            for row in kept_table(block, stage.image, dtype, device):
                ledger.allocate(_renamed(row, stage.name, training), where)
            scratch = scratch_table(block, stage.image, dtype, backward=False)
            ledger.grow("scratch", arena.slab_bytes(scratch), where)
            ledger.mark(where, workspaces.block(block, stage.image, dtype, device, backward=False))
        else:
            # A block copies its input into its own buffer; only the stem's norm keeps it.
            kept = training and index == 0 and not isinstance(stages[1].module, EfficientDenseBlock)
            ledger.allocate(out(stage, "kept" if kept else "transient"), where)
            ledger.mark(where, _inside(stage, dtype, device, "forward"))
        if previous is not None:
            ledger.free(previous)
        if isinstance(stage.module, EfficientDenseBlock):
            previous = None if training else f"{stage.name} features"
            if not training:
                ledger.free(
                    *(
                        n
                        for n in list(ledger.live)
                        if n.startswith(f"{stage.name} ") and n != previous
                    )
                )
        else:
            previous = None if index == 0 and kept else f"{stage.name} output"

    # norm5's output becomes its ReLU's; then pooled features, logits, their log-softmax.
    last = stages[-1]
    map_shape = (*last.out_image, last.out_channels)
    ledger.allocate(Buffer("relu output", map_shape, dtype, "kept"), "the head")
    ledger.free(f"{last.name} output")
    classes = getattr(getattr(model, "classifier", None), "out_features", 0)
    head = Buffer("head", (last.out_image[0], last.out_channels + 2 * classes), acc, "kept")
    ledger.allocate(head, "the head")
    if not training:
        return

    gradients = ledger.live
    gradients["parameter gradients"] = _gradient_bytes(getattr(model, "classifier", nn.Identity()))
    ledger.allocate(Buffer("gradient before relu", map_shape, dtype, "transient"), "the head")
    ledger.free("relu output", "head")
    arriving = "gradient before relu"
    for index in reversed(range(len(stages))):
        stage = stages[index]
        where = f"the backward of {stage.name}"
        after = stages[index + 1].module if index + 1 < len(stages) else None
        gradients["parameter gradients"] += _gradient_bytes(stage.module)
        if isinstance(stage.module, EfficientDenseBlock):
            # The arriving gradient is the block's gradient buffer; its first channels go on. One
            # of the framework's is copied where rows are padded.
            block = _block_call(stage.module, dtype, device)
            length = layout.row_length(block.out_channels, dtype, device)
            if length != block.out_channels and not isinstance(after, EfficientTransition):
                buffer = Buffer(
                    f"gradient buffer of {stage.name}", (*stage.image, length), dtype, "transient"
                )
                ledger.allocate(buffer, where)
                ledger.free(arriving)
                arriving = buffer.name
            scratch = scratch_table(block, stage.image, dtype, backward=True)
            ledger.grow("scratch", arena.slab_bytes(scratch), where)
            ledger.mark(where, workspaces.block(block, stage.image, dtype, device, backward=True))
            ledger.free(*(n for n in list(ledger.live) if n.startswith(f"{stage.name} ")))
        elif index > 0:
            sent = grad(stage)
            ledger.allocate(sent, where)
            ledger.mark(where, _inside(stage, dtype, device, "backward"))
            ledger.free(arriving)
            arriving = sent.name
            if index == 1 and not isinstance(stage.module, EfficientTransition):
                ledger.free(f"{stages[0].name} output")
        else:
            ledger.mark(where, _inside(stage, dtype, device, "backward"))
    parameters = (gradients["parameter gradients"],)
    ledger.rows.append(Buffer("parameter gradients", parameters, torch.uint8, "gradient"))
    scratch_row = Buffer("scratch", (ledger.live.get("scratch", 0),), torch.uint8, "scratch")
    ledger.rows.append(scratch_row)


def _inside(stage: _Stage, dtype: torch.dtype, device: torch.device, way: str) -> int:
    """Bytes inside the operator of a stage that is no block; the framework's own are not known."""
    shape = (*stage.image, stage.channels)
    if isinstance(stage.module, EfficientTransition):
        return workspaces.operator(f"transition_{way}", shape, stage.out_channels, dtype, device)
    if stage.name == "stem":
        return workspaces.operator(f"stem_{way}", shape, stage.channels, dtype, device)
    return 0


def _renamed(row: Buffer, stage: str, training: bool) -> Buffer:
    lifetime = row.lifetime if training else "transient"
    return Buffer(f"{stage} {row.name}", row.shape, row.dtype, lifetime)


def _batches() -> Iterator[int]:
    size = 1
    while True:
        yield size
        size *= 2


def max_batch(
    model: nn.Module,
    input_shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    budget: int | float = 0,
    *,
    training: bool = True,
) -> int:
    """The largest batch whose predicted peak stays within ``budget`` bytes; 0 where none does.

    Args:
        input_shape: of one image, ``(C, *spatial)``.
        budget: bytes over what stands before the step (parameters, optimiser state, the input).

    Raises: as :func:`plan`; ValueError for a budget that is not a positive finite number.
    """
    if not math.isfinite(budget) or budget <= 0:
        raise ValueError(f"budget must be a positive number of bytes, got {budget!r}")

    def fits(batch: int) -> bool:
        return plan(model, (batch, *input_shape), dtype, training=training).peak_bytes <= budget

    too_large = next(batch for batch in _batches() if not fits(batch))
    fitting = too_large // 2
    while too_large - fitting > 1:
        middle = (fitting + too_large) // 2
        fitting, too_large = (middle, too_large) if fits(middle) else (fitting, middle)
    return fitting
