"""The volumes through a network, block by block: a table and a picture in text.

Computed on the meta device: nothing is allocated and nothing is run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..models.networks import NetworkSpec
from .tables import table

__all__ = ["Summary", "Volume", "summarise"]

_KINDS = {
    "conv": "convolution",
    "norm": "norm",
    "relu": "ReLU",
    "pool": "pooling",
    "denseblock": "dense block",
    "transition": "transition",
    "up": "upsampling",
    "classifier": "linear",
}
_BAR = 28


@dataclass(frozen=True)
class Volume:
    """One child of the network. shape: of its output [N, C, H, W] (classifier: [N, classes]).
    layers: of a dense block, else 0. parameters: numbers. multiply_adds: of its products, for the
    whole batch."""

    name: str
    kind: str
    shape: tuple[int, ...]
    layers: int
    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class Summary:
    """What `summarise` found; `str` of it is a table."""

    title: str
    input_shape: tuple[int, ...]
    volumes: tuple[Volume, ...]
    parameters: int
    depth: int

    @property
    def multiply_adds(self) -> int:
        """Of the whole forward pass."""
        return sum(volume.multiply_adds for volume in self.volumes)

    def __str__(self) -> str:
        n, c, h, w = self.input_shape
        title = (
            f"{self.title}: {self.parameters:,} parameters, depth {self.depth}, "
            f"{self.multiply_adds / n / 1e9:.3f} G multiply-adds an image"
        )
        columns = ["name", "what", "channels", "height x width", "values", "parameters"]
        columns += ["G mult-adds", "values to scale"]
        rows: list[tuple[Any, ...]] = [
            ("input", f"batch of {n}", c, f"{h} x {w}", f"{c * h * w:,}", "", "", "")
        ]
        widest = max(_values(volume.shape) for volume in self.volumes)
        for volume in self.volumes:
            what = f"{volume.kind}, {volume.layers} layers" if volume.layers else volume.kind
            sides = " x ".join(str(side) for side in volume.shape[2:]) or "-"
            values = _values(volume.shape)
            rows.append(
                (
                    volume.name,
                    what,
                    volume.shape[1],
                    sides,
                    f"{values:,}",
                    f"{volume.parameters:,}",
                    f"{volume.multiply_adds / n / 1e9:.3f}",
                    "#" * max(1, round(_BAR * values / widest)),
                )
            )
        text = table(columns, rows, left=("what", "values to scale"))
        return f"{title}\n\n{text}\n\nvalues: numbers in the output, per image"


def _values(shape: tuple[int, ...]) -> int:
    return math.prod(shape[1:])


def _kind(name: str) -> str:
    return _KINDS.get(name.rstrip("0123456789"), name)


def summarise(network: NetworkSpec, batch: int = 1, image_size: int | None = None) -> Summary:
    """Follow a batch of images through a network.

    Args:
        network: which.
        batch: images, positive.
        image_size: pixels a side; None: what the papers use it at.

    Raises:
        ValueError: an option out of its range, or images too small for the network.
    """
    for name, value in (("batch", batch), ("image_size", image_size)):
        if value is not None and (isinstance(value, bool) or value < 1):
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    size = image_size or network.default_image_size
    with torch.device("meta"):
        model = network.build("reference").eval()
        images = torch.empty(batch, network.in_channels, size, size)
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            shapes[name] = tuple(output.shape)

        return hook

    features = model if network.dense else model.get_submodule("features")
    children: dict[str, nn.Module] = dict(features.named_children())
    if network.num_classes:
        children["classifier"] = model.get_submodule("classifier")
    for name, child in children.items():
        child.register_forward_hook(record(name))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    by_module = counter.get_flop_counts()
    root = type(model).__name__
    volumes = []
    convolutions = 0
    for name, child in children.items():
        path = (
            f"{root}.features.{name}"
            if child is not getattr(model, name, None)
            else f"{root}.{name}"
        )
        flops = sum(by_module.get(path, {}).values())
        kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
        convolutions += sum(isinstance(module, kinds) for module in child.modules())
        layers = len(list(child.children())) if name.startswith("denseblock") else 0
        count = sum(parameter.numel() for parameter in child.parameters())
        kind = "convolution" if isinstance(child, nn.Conv2d) else _kind(name)
        volumes.append(Volume(name, kind, shapes[name], layers, count, flops // 2))
    total = sum(parameter.numel() for parameter in model.parameters())
    shape = (batch, network.in_channels, size, size)
    return Summary(network.title, shape, tuple(volumes), total, convolutions)
