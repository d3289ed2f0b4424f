"""The weights of a block's convolutions as its operators take them: in the activations' dtype and,
on a GPU, with the channels of a 3x3 kernel as neighbours.

On a GPU each cast and copy is a launch that takes longer than its bytes. So some neighbouring
layers share them: their weights are cast together, into one buffer, and those 3x3 weights that lie
otherwise are then brought into the operators' layout together. One group's casts exist at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .layout import SECTOR
from .specs import PARAMETERS_PER_LAYER, BlockSpec, LayerSpec

GROUP_BYTES = 4 << 20
"""What the casts of layers that share them may take on a GPU, unless one layer's take more."""

_CHUNK = 16  # bytes that a kernel copies at a time

Weights = tuple[Tensor | None, Tensor | None]


def are_shared(device: torch.device) -> bool:
    """Whether layers share their casts and copies there."""
    return device.type == "cuda"


def _shapes(layer: LayerSpec, dims: int) -> list[tuple[int, int, int]]:
    """Outputs, inputs and taps of a layer's weights, with kernels of 1 and 3."""
    if not layer.bottleneck:
        return [(layer.growth, layer.in_channels, 3**dims)]
    return [(layer.bottleneck, layer.in_channels, 1), (layer.growth, layer.bottleneck, 3**dims)]


def elements(layer: LayerSpec, dims: int) -> int:
    """Of a layer's weights."""
    return sum(math.prod(shape) for shape in _shapes(layer, dims))


def groups(spec: BlockSpec, dims: int, dtype: torch.dtype, shared: bool) -> list[range]:
    """The layers of each group, in order. shared: see `are_shared`."""
    found: list[range] = []
    bound = GROUP_BYTES if shared else 0
    size = 0
    for index, layer in enumerate(spec.layers):
        own = elements(layer, dims) * dtype.itemsize
        if found and size + own <= bound:
            found[-1] = range(found[-1].start, index + 1)
            size += own
        else:
            found.append(range(index, index + 1))
            size = own
    return found


def is_packed(layer: LayerSpec, dims: int, dtype: torch.dtype, shared: bool) -> bool:
    """Whether the layer's 3x3 weight becomes channels last here, in whole chunks, and not in its
    operator, which pads."""
    _, channels, _ = _shapes(layer, dims)[-1]
    whole = channels * dtype.itemsize % _CHUNK == 0
    return shared and dims == 2 and whole


def held_bytes(spec: BlockSpec, dims: int, dtype: torch.dtype, shared: bool) -> Iterator[int]:
    """What is made of float32 and contiguous weights and alive while a layer runs, layer by
    layer."""
    casts = dtype != torch.float32
    for group in groups(spec, dims, dtype, shared):
        count = 0
        for index in group:
            layer = spec.layers[index]
            packs = is_packed(layer, dims, dtype, shared)
            for *shape, taps in _shapes(layer, dims):
                count += math.prod(shape) * taps if casts or (packs and taps > 1) else 0
        yield from (count * dtype.itemsize for _ in group)


def by_layer(
    spec: BlockSpec,
    parameters: Sequence[Tensor | None],
    dtype: torch.dtype,
    dims: int,
    shared: bool,
    *,
    backward: bool = False,
) -> Iterator[Weights]:
    """Both weights of every layer in a dtype, from the first to the last, or the other way round.
    shared: what `are_shared` says of the device of the call; not asked here, because a call is
    recorded without its device (`replay`)."""
    order = groups(spec, dims, dtype, shared)
    for layers in reversed(order) if backward else order:
        made = _prepared(spec, layers, parameters, dtype, dims, shared)
        for index in reversed(range(len(layers))) if backward else range(len(layers)):
            yield made[2 * index], made[2 * index + 1]


def _prepared(
    spec: BlockSpec,
    layers: range,
    parameters: Sequence[Tensor | None],
    dtype: torch.dtype,
    dims: int,
    shared: bool,
) -> list[Tensor | None]:
    """conv1's and conv2's weights of some layers."""
    made: list[Tensor | None] = []
    to_pack: dict[torch.Size, list[int]] = {}
    to_cast: list[int] = []
    for index in layers:
        layer, first = spec.layers[index], index * PARAMETERS_PER_LAYER
        packs = is_packed(layer, dims, dtype, shared)
        for offset, options in ((2, layer.conv1), (6, layer.conv2)):
            weight = parameters[first + offset]
            if weight is not None:
                weight = weight if is_dense(weight) else weight.contiguous()
                lies_right = weight.is_contiguous(memory_format=torch.channels_last)
                if options is None and packs and weight.shape[2:] != (1, 1) and not lies_right:
                    to_pack.setdefault(weight.shape, []).append(len(made))
                elif weight.dtype != dtype:
                    to_cast.append(len(made))
            made.append(weight)
    for shape, places in to_pack.items():
        sources = [made[place] for place in places]
        for place, packed in zip(places, _packed(sources, shape, dtype), strict=True):  # type: ignore[arg-type]
            made[place] = packed
    for place, cast in zip(to_cast, _cast([made[p] for p in to_cast], dtype), strict=True):  # type: ignore[misc]
        made[place] = cast
    return made


def is_dense(weight: Tensor) -> bool:
    """Whether operators read a weight as it lies."""
    if weight.is_contiguous():
        return True
    return weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)


def _cast(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The weights in a dtype and in their own layouts, cast together into one buffer."""
    if not weights:
        return []
    step = SECTOR // dtype.itemsize
    places = [0]
    for weight in weights:
        places.append(places[-1] + -(-weight.numel() // step) * step)
    buffer = torch.empty(places[-1], dtype=dtype, device=weights[0].device)
    made = [
        buffer.as_strided(weight.shape, weight.stride(), place)
        for weight, place in zip(weights, places, strict=False)
    ]
    torch._foreach_copy_(made, list(weights))
    return made


def _packed(weights: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype) -> list[Tensor]:
    """Contiguous weights of one shape in a dtype and channels last: cast together, and turned
    together."""
    outputs, channels, *kernel = shape
    taps, count = math.prod(kernel), len(weights)
    cast = torch.empty((count, *shape), dtype=dtype, device=weights[0].device)
    torch._foreach_copy_(list(cast.unbind()), list(weights))
    turned = torch.empty((count, outputs, taps, channels), dtype=dtype, device=cast.device)
    turned.copy_(cast.view(count, outputs, channels, taps).transpose(2, 3))
    return [one.view(outputs, *kernel, channels).movedim(-1, 1) for one in turned.unbind()]
