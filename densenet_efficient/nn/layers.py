"""One dense layer's modules, and whether and how the operators can run them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.specs import LayerSpec, NormSpec, Tail
from ..ops.convolution import ConvOptions
from ..ops.dtypes import accumulation_dtype
from .norms import BatchNorm, features_of, norm_problem, norm_spec

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class LayerParts:
    """The modules of one dense layer, whatever its class calls them.

    A plain layer (norm, ReLU, 3x3 convolution) has no norm2 and conv2. drop_rate is applied to the
    new features, bottleneck_drop_rate to what conv1 gives in front of norm2, both channelwise as in
    ``Dropout2d`` where asked. drops: whether they are applied at present; None: in training, by the
    layer's own flag. tail: in the place of conv2, a module without buffers and randomness that
    makes ``tail_channels`` new features of an image of the same size.
    """

    norm1: BatchNorm
    conv1: Convolution
    norm2: BatchNorm | None = None
    conv2: Convolution | None = None
    drop_rate: float = 0.0
    channelwise_dropout: bool = False
    bottleneck_drop_rate: float = 0.0
    drops: bool | None = None
    tail: nn.Module | None = None
    tail_channels: int = 0

    @property
    def growth(self) -> int:
        """New channels, as the weight has them, which alone PyTorch's forward reads; one that is
        computed is not evaluated here, and the attribute believed."""
        if self.tail is not None:
            return self.tail_channels
        conv = self.conv1 if self.conv2 is None else self.conv2
        weight = conv._parameters.get("weight")
        return conv.out_channels if weight is None else len(weight)

    def norms(self) -> list[BatchNorm]:
        """norm1, and norm2 of a bottleneck layer."""
        return [self.norm1] if self.norm2 is None else [self.norm1, self.norm2]


def standard_parts(layer: nn.Module) -> LayerParts:
    """Parts of a layer with torchvision's attribute names."""
    return LayerParts(
        layer.norm1,  # type: ignore[arg-type]
        layer.conv1,  # type: ignore[arg-type]
        getattr(layer, "norm2", None),
        getattr(layer, "conv2", None),
        float(getattr(layer, "drop_rate", 0.0)),
        bottleneck_drop_rate=float(getattr(layer, "bottleneck_drop_rate", 0.0)),
    )


def image_dims(conv: Convolution) -> int:
    """Of the images that a convolution takes."""
    return conv.weight.dim() - 2


def in_channels(conv: Convolution) -> int:
    """Of the images that a convolution takes, as its weight has them."""
    return int(conv.weight.shape[1] * conv.groups)


def per_axis(value: Any, dims: int) -> tuple[int, ...]:
    """An option of a convolution, which PyTorch also takes as one number for all axes."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * dims if len(values) == 1 else values


def _geometry(
    conv: Convolution, name: str, kernel: int, dtype: torch.dtype
) -> tuple[ConvOptions | None, str | None]:
    """How the operators run ``conv``: (None, None) as the kernels' own convolution of size
    ``kernel``, (options, None) through PyTorch's, (None, reason) not at all. The size is that of
    the weight, which alone PyTorch's forward reads."""
    dims, sizes = image_dims(conv), tuple(conv.weight.shape[2:])
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        return None, f"{name} pads by {conv.padding_mode!r} {conv.padding!r}"
    padding, dilation = per_axis(conv.padding, dims), per_axis(conv.dilation, dims)
    same = all(2 * p == d * (k - 1) for p, d, k in zip(padding, dilation, sizes, strict=True))
    if any(s != 1 for s in per_axis(conv.stride, dims)) or not same:
        return None, f"{name} changes the image size"
    # A bias is added to what the kernels give. In 16 bits that would round twice.
    adds = conv.bias is None or dtype == accumulation_dtype(dtype)
    own = conv.groups == 1 and adds and sizes == (kernel,) * dims
    if own and (kernel == 1 or set(dilation) == {1}):
        return None, None
    return ConvOptions(padding, dilation, conv.groups), None


def convolution_options(conv: nn.Module, name: str) -> tuple[ConvOptions | None, str | None]:
    """How PyTorch's convolution runs ``conv`` on a buffer, or why it cannot."""
    if type(conv) not in CONVOLUTIONS:
        return None, f"{name} is a {type(conv).__name__}"
    return _geometry(conv, name, 0, torch.float32)  # type: ignore[arg-type]


def layer_spec(
    part: LayerParts, name: str, channels: int, dtype: torch.dtype, training: bool
) -> tuple[LayerSpec | None, str | None]:
    """The layer's part of a call, or why the operators cannot run it."""
    for index, norm in enumerate(part.norms(), start=1):
        problem = norm_problem(norm)
        if problem:
            return None, f"{name}'s norm{index} {problem}"
    if features_of(part.norm1) != channels:
        return None, f"{name} expects {features_of(part.norm1)} channels, not {channels}"
    convs = [part.conv1] if part.conv2 is None else [part.conv1, part.conv2]
    geometry: list[ConvOptions | None] = [None, None]
    for index, conv in enumerate(convs):
        if type(conv) not in CONVOLUTIONS:
            return None, f"{name}'s conv{index + 1} is a {type(conv).__name__}"
        kernel = 1 if part.norm2 is not None and index == 0 else 3
        geometry[index], problem = _geometry(conv, f"{name}'s conv{index + 1}", kernel, dtype)
        if problem:
            return None, problem
    drops = training if part.drops is None else part.drops
    norm2: NormSpec | None = None if part.norm2 is None else norm_spec(part.norm2, dtype)
    return LayerSpec(
        in_channels=channels,
        growth=part.growth,
        bottleneck=len(part.conv1.weight) if part.norm2 is not None else 0,
        norm1=norm_spec(part.norm1, dtype),
        norm2=norm2,
        conv1=geometry[0],
        conv2=geometry[1],
        drop_rate=part.drop_rate if drops else 0.0,
        channelwise_dropout=part.channelwise_dropout,
        bottleneck_drop_rate=part.bottleneck_drop_rate if drops else 0.0,
        tail=None if part.tail is None else _tail(part.tail),
    ), None


def _tail(module: nn.Module) -> Tail:
    names = [name for name, _ in module.named_parameters()]

    def call(z: Tensor, parameters: Sequence[Tensor | None]) -> Tensor:
        given = {name: p for name, p in zip(names, parameters, strict=True) if p is not None}
        return torch.func.functional_call(module, given, (z,))

    return Tail(call, len(names))


def tail_parameters(part: LayerParts) -> list[Tensor | None]:
    """The parameters of the layer's tail, if it has one."""
    return [] if part.tail is None else list(part.tail.parameters())


def parameter_places(part: LayerParts) -> list[tuple[nn.Module | None, str]]:
    """Module and name of the layer's parameters, in the order of `specs.PARAMETERS_PER_LAYER`; None
    where the layer has no such module."""
    modules = (part.norm1, part.conv1, part.norm2, part.conv2)
    return [(module, name) for module in modules for name in ("weight", "bias")]
