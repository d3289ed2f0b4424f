"""Temporary memory inside the operators, for the memory plan.

The compiled operators allocate exactly what their tilings say (``csrc/cpu/tiling.h``,
``csrc/cuda/tiling``); the fallback holds a chunk's normalised copy, the convolution's operands
and its results.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import torch

from ..core import weights
from ..core.max_pool import CHUNK_BYTES
from ..core.specs import BlockSpec, LayerSpec
from ..ops import compiled, fallback
from ..ops.dispatch import choose
from ..ops.dtypes import accumulation_dtype

_FALLBACK_COPIES = 4
"""Chunk-sized tensors the fallback holds at a time: normalised, ReLU, operand, result."""


def operator(
    name: str,
    shape: tuple[int, ...],
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    accumulate: bool = False,
    packed: bool = False,
) -> int:
    """Bytes operator ``name`` allocates for x of ``shape`` and ``channels`` output channels.

    accumulate: as in ``norm_relu_conv3x3_backward``. packed: whether a 3x3 weight is channels last;
    elsewhere it is copied on CUDA. On CUDA, for rows aligned to 16 bytes; others need less.
    """
    dims = len(shape) - 2 or 2  # rows are the same to all
    if choose(device, dtype, dims).operators is not compiled:
        return _fallback(shape, dtype)
    if device.type != "cuda":
        return _cpu(name, shape, channels, dtype, torch.get_num_threads())
    gpu = torch.cuda.get_device_properties(device)
    shared_bytes = gpu.shared_memory_per_block_optin  # type: ignore[attr-defined]
    multiprocessors = gpu.multi_processor_count
    return _cuda(name, shape, channels, dtype, multiprocessors, shared_bytes, accumulate, packed)


def max_pool(shape: tuple[int, ...], dtype: torch.dtype, drops: bool) -> int:
    """Bytes that max-pooling holds next to x ``(N, *spatial, C)`` and its results: of a few images
    the indices and, with dropout, a mask and the product with it."""
    image = math.prod(shape[1:]) * accumulation_dtype(dtype).itemsize
    return (4 if drops else 2) * min(shape[0] * image, max(image, CHUNK_BYTES))


def _fallback(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    image = math.prod(shape[1:]) * accumulation_dtype(dtype).itemsize
    chunk = min(shape[0] * image, max(image, fallback.CHUNK_BYTES))
    return _FALLBACK_COPIES * chunk


@functools.lru_cache(maxsize=4096)
def _cpu(name: str, shape: tuple[int, ...], channels: int, dtype: torch.dtype, threads: int) -> int:
    from .. import _module

    element = accumulation_dtype(dtype).itemsize
    return _module.workspace_bytes(name, list(shape), channels, element, threads)


@functools.lru_cache(maxsize=4096)
def _cuda(
    name: str,
    shape: tuple[int, ...],
    channels: int,
    dtype: torch.dtype,
    multiprocessors: int,
    shared_bytes: int,
    accumulate: bool,
    packed: bool,
) -> int:
    from .. import _module

    return _module.cuda_workspace_bytes(
        name,
        list(shape),
        channels,
        dtype.itemsize,
        multiprocessors,
        shared_bytes,
        accumulate=accumulate,
        packed_weight=packed,
    )


def _operators(
    layer: LayerSpec, image: tuple[int, ...], backward: bool, recompute: bool
) -> Iterable[tuple[str, tuple[int, ...], int]]:
    """(operator, shape of x, output channels) of one layer's call."""
    way = "backward" if backward else "forward"
    rows = math.prod(image)
    if layer.bottleneck:
        first = (rows, layer.in_channels)
        yield f"norm_relu_conv1x1_{way}", first, layer.bottleneck
        if backward and recompute:
            yield "norm_relu_conv1x1_forward", first, layer.bottleneck
        yield f"norm_relu_conv3x3_{way}", (*image, layer.bottleneck), layer.growth
    else:
        yield f"norm_relu_conv3x3_{way}", (*image, layer.in_channels), layer.growth


def block(
    spec: BlockSpec,
    image: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    backward: bool,
) -> int:
    """The most bytes that one layer of a block holds next to its tables: the largest operator's
    workspace and, in low precision, its weights in the activations' dtype with those that share
    their buffer."""
    worst = 0
    dims = len(image) - 1
    shared = weights.are_shared(device)
    held = weights.held_bytes(spec, dims, dtype, shared)
    for index, (layer, cast) in enumerate(zip(spec.layers, held, strict=True)):
        recompute = not spec.keeps(index)
        packed = weights.is_packed(layer, dims, dtype, shared)
        convolutions = (layer.conv1, layer.conv2, layer.tail)
        uses_fallback = any(other is not None for other in convolutions)
        for name, shape, channels in _operators(layer, image, backward, recompute):
            if uses_fallback:
                size = _fallback((*image, shape[-1]), dtype)
            else:
                plain = not layer.bottleneck
                size = operator(
                    name, shape, channels, dtype, device, accumulate=plain, packed=packed
                )
            worst = max(worst, size + cast)
    return worst
