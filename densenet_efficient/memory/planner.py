"""The memory plan: what a training step will allocate, before anything is.

The plan walks a model's parts (`steps`) with the same tables the execution uses
(`core.specs.kept_table`, `core.specs.scratch_table`) and replays a step on a timeline of
allocations and releases: forward, backward, parameter gradients. The largest sum is the predicted
peak memory above the baseline before the step. Temporary results inside an
operator count with the sizes its own workspace functions give.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..core.arena import Buffer
from ..nn.dense_block import DenseBlockExecution
from ..nn.features import FeaturesExecution
from ..nn.options import check_module, check_number, check_sizes
from ..ops.dtypes import FLOATING, accumulation_dtype
from . import fully_convolutional
from .parts import PARAMETER_GRADIENTS, SCRATCH, Part
from .steps import gradient_bytes, parts_of
from .timeline import Moment, Timeline


@dataclass(frozen=True)
class Plan:
    """Predicted memory of one step.

    rows: every buffer in the order of its allocation. peak_bytes: peak memory above the baseline
    before the step; peak_at: where in the step; at_peak: name -> bytes of what is live then.
    moments: what is live at every place of the step, in order.
    """

    rows: tuple[Buffer, ...]
    peak_bytes: int
    peak_at: str
    at_peak: dict[str, int] = field(repr=False)
    batch: int = 1
    moments: tuple[Moment, ...] = field(default=(), repr=False)

    @property
    def total_bytes(self) -> int:
        """Sum of all rows, whether they are live at the same time or not."""
        return sum(row.bytes for row in self.rows)

    @property
    def kept_bytes(self) -> int:
        """What is live between forward and backward: outputs and other kept rows."""
        return sum(row.bytes for row in self.rows if row.lifetime in ("output", "kept"))

    @property
    def kept_bottlenecks(self) -> dict[str, int]:
        """Of how many layers each block keeps the bottlenecks; blocks that keep none are left
        out."""
        kept = [row.name.split(" ") for row in self.rows if row.lifetime == "kept"]
        return dict(Counter(name for name, *of in kept if of and of[-1][:1] == "b"))

    def describe(self) -> dict[str, Any]:
        """Peak, what is kept and every row as plain values, in bytes."""
        return {
            "peak_bytes": self.peak_bytes,
            "peak_at": self.peak_at,
            "kept_bytes": self.kept_bytes,
            "kept_bottlenecks": self.kept_bottlenecks,
            "rows": [
                {
                    "name": row.name,
                    "shape": list(row.shape),
                    "dtype": str(row.dtype).removeprefix("torch."),
                    "bytes": row.bytes,
                    "lifetime": row.lifetime,
                }
                for row in self.rows
            ],
        }

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
            f"predicted peak {self.peak_bytes / 1e6:.1f} MB above the baseline before the step "
            f"({each:.2f} MB per image), at {self.peak_at}"
        )
        return "\n".join(lines)


def plan(
    model: nn.Module,
    input_shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    training: bool = True,
) -> Plan:
    """Predict the memory of one training step, or of one inference call.

    Args:
        model: an ``EfficientDenseNet``, an ``EfficientFCDenseNet``, or a converted model with
            ``features`` and ``classifier``.
        input_shape: of the images, ``(N, C, *spatial)``.
        dtype: of the activations (autocast's dtype under autocast, but float32 on the CPU for
            images of three dimensions, which autocast pools in float32).
        training: False predicts a call under ``no_grad``.

    Returns:
        A `Plan`; ``str()`` of it is the table. A block whose batch statistics would be of 2 to 7
        values runs its original forward, which the plan does not know. The optimiser's state and
        the parameters are live before the step and are not counted, parameter gradients are.

    Raises:
        TypeError: the model's features are not efficient blocks; dtype is not floating.
        ValueError: input_shape is not (N, C, *spatial), positive, with the model's channels, or it
            has fewer pixels than the network can take.
    """
    check_module("model", model)
    if dtype not in FLOATING:
        raise TypeError(f"dtype must be float64, float32, bfloat16 or float16, got {dtype}")
    network = fully_convolutional.network_in(model)
    features: nn.Module
    features, owner = (network, network) if network is not None else _feature_extractor(model)
    conv: Any = next(iter(features._modules.values()))
    dims = len(getattr(conv, "kernel_size", (0, 0)))
    expected = f"{dims + 2} positive sizes"
    shape = check_sizes("input_shape", input_shape, expected)
    if len(shape) != dims + 2:
        raise ValueError(f"input_shape must be {expected}, got {list(shape)}")
    if shape[1] != conv.in_channels:
        raise ValueError(f"input_shape must have {conv.in_channels} channels, got {shape[1]}")
    device = next(features.parameters()).device
    timeline, image = Timeline(), (shape[0], *shape[2:])
    if network is not None:
        network.check_images(torch.empty(shape, device="meta"))
        walk = fully_convolutional.Network(network, image, dtype, device)
        fully_convolutional.replay(timeline, walk, training)
    else:
        assert isinstance(features, FeaturesExecution)
        parts = parts_of(features, image, shape[1], dtype, device)
        _replay(timeline, parts, getattr(owner, "classifier", None), training)
    if training:
        for name, lifetime in ((PARAMETER_GRADIENTS, "gradient"), (SCRATCH, "scratch")):
            timeline.rows.append(Buffer(name, (timeline.bytes_of(name),), torch.uint8, lifetime))
    peak = max(timeline.moments, key=lambda moment: moment.bytes)
    moments = tuple(timeline.moments)
    return Plan(tuple(timeline.rows), peak.bytes, peak.where, peak.live, shape[0], moments)


def _feature_extractor(model: nn.Module) -> tuple[FeaturesExecution, nn.Module]:
    """The only efficient feature extractor in a model, wrapped however deep, and the module that
    holds it."""
    found = {
        id(child): (name, child, owner)
        for name, owner in model.named_modules()
        for child in owner._modules.values()
        if isinstance(child, FeaturesExecution)
    }
    if isinstance(model, FeaturesExecution):
        return model, model
    if len(found) == 1:
        ((_, features, owner),) = found.values()
        return features, owner
    if found:
        names = ", ".join(name or "the model itself" for name, *_ in found.values())
        raise TypeError(
            f"model must hold one network with efficient features, got {len(found)}: in {names}; "
            "pass one of them"
        )
    converted = any(isinstance(module, DenseBlockExecution) for module in model.modules())
    advice = (
        "its dense blocks are efficient, but not the children of a feature extractor"
        if converted
        else "call densenet_efficient.convert(model) first"
    )
    raise TypeError(
        "model must be an EfficientDenseNet or hold a converted one with efficient features, got "
        f"{type(model).__name__}: {advice}"
    )


def _replay(
    timeline: Timeline, parts: Sequence[Part], classifier: nn.Module | None, training: bool
) -> None:
    """One step, allocation by allocation; every name is one live buffer."""
    previous = None  # the output that the next part consumes and nobody keeps
    for part in parts:
        output = part.forward(timeline, training)
        if previous is not None:
            timeline.free(previous)
        previous = output

    # norm5's output becomes its ReLU's; then pooled features, logits, their log-softmax.
    last = parts[-1]
    map_shape = (*last.out_image, last.out_channels)
    timeline.allocate(Buffer("relu output", map_shape, last.dtype, "kept"), "the head")
    timeline.free(f"{last.name} output")
    classes = getattr(classifier, "out_features", 0)
    head = (last.out_image[0], last.out_channels + 2 * classes)
    acc = accumulation_dtype(last.dtype)
    timeline.allocate(Buffer("head", head, acc, "kept"), "the head")
    if not training:
        return

    if classifier is not None:
        timeline.add(PARAMETER_GRADIENTS, gradient_bytes(classifier))
    gradient = Buffer("gradient before relu", map_shape, last.dtype, "transient")
    arriving = timeline.allocate(gradient, "the head")
    timeline.free("relu output", "head")
    for index, part in reversed(list(enumerate(parts))):
        timeline.add(PARAMETER_GRADIENTS, gradient_bytes(part.module))
        arriving = part.backward(
            timeline, arriving, parts[index + 1] if index + 1 < len(parts) else None
        )
        if index == 1 and parts[0].kept:
            timeline.free(f"{parts[0].name} output")


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
        model: as for `plan`.
        input_shape: of one image, ``(C, *spatial)``.
        dtype: as for `plan`.
        budget: bytes above the pre-step baseline (parameters, optimiser state, the input).
        training: as for `plan`.

    Raises:
        TypeError: as for `plan`.
        ValueError: as for `plan`, and for a budget that is not a positive finite number.
    """
    least = math.nextafter(0.0, 1.0)
    budget = check_number("budget", budget, "a positive number of bytes", least, math.inf)
    image_shape = check_sizes("input_shape", input_shape, "the positive sizes of one image")

    def fits(batch: int) -> bool:
        return plan(model, (batch, *image_shape), dtype, training=training).peak_bytes <= budget

    too_large = next(batch for batch in _batches() if not fits(batch))
    fitting = too_large // 2
    while too_large - fitting > 1:
        middle = (fitting + too_large) // 2
        fitting, too_large = (middle, too_large) if fits(middle) else (fitting, middle)
    return fitting
