"""A network's first convolution: by PyTorch, in channels-last memory, or, in front of the stem's
norm and pooling, by an operator of our own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..core import eager
from ..core.stem_conv import StemConvCall, StemConvFunction
from ..ops import dispatch
from ..ops.dispatch import Dispatch
from ..ops.stem_conv import PADDING, STRIDE
from . import execution, handover
from .dense_block import DenseBlockExecution
from .execution import ORIGINAL
from .layers import image_dims, per_axis

_KERNEL, _MOST_CHANNELS = 7, 4
_OTHER = "it is not one of 7x7 pixels, stride 2, padding 3, at most 4 channels and without bias"


def has_operator(conv: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the operator computes what this convolution does, in a dtype, for images that need no
    gradient."""
    return dispatch.stem_convolution(device, dtype).kind != ORIGINAL and _is_ours(conv)


def _is_ours(conv: Any) -> bool:
    """By its geometry, whose sizes are the weight's."""
    return (
        type(conv) is nn.Conv2d
        and conv.weight.shape[2:] == (_KERNEL, _KERNEL)
        and conv.weight.shape[1] <= _MOST_CHANNELS
        and per_axis(conv.stride, 2) == (STRIDE, STRIDE)
        and per_axis(conv.padding, 2) == (PADDING, PADDING)
        and per_axis(conv.dilation, 2) == (1, 1)
        and conv.groups == 1
        and conv.bias is None
        and conv.padding_mode == "zeros"
    )


def choose(conv: nn.Module, x: Tensor) -> Dispatch:
    """Whether the operator runs conv(x), or the convolution as it is, and why."""
    dtype = execution.convolution_dtype(x)
    chosen = dispatch.stem_convolution(x.device, dtype)
    if chosen.kind == ORIGINAL:
        return chosen
    weight: Tensor = conv.weight  # type: ignore[assignment]
    reason = None
    if not _is_ours(conv):
        reason = _OTHER
    elif torch.is_grad_enabled() and x.requires_grad:
        reason = "the images need a gradient"
    elif not eager.is_ordinary(weight):
        reason = f"its weight is a {type(weight).__name__}"
    elif {x.dtype, weight.dtype} - {dtype, torch.float32}:
        reason = f"images in {x.dtype} and a weight in {weight.dtype} are not rounded to {dtype}"
    elif not (weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)):
        reason = "its weight is neither contiguous nor channels last"
    return chosen if reason is None else Dispatch(ORIGINAL, reason)


def run(chosen: Dispatch, conv: Any, x: Tensor, contiguous: bool) -> Tensor:
    """conv(x) in channels-last memory, as chosen. contiguous: the memory of x's gradient."""
    if chosen.kind != ORIGINAL:
        dtype = execution.convolution_dtype(x)
        return StemConvFunction.apply(*StemConvCall(chosen.operators, dtype, x, conv.weight))
    return by_pytorch(conv, handover.match_layout(x) if contiguous else x, conv.weight)


def made_by(
    chosen: Dispatch, conv: Any, x: Tensor, network: Iterable[nn.Module | None]
) -> StemConvCall | None:
    """The call of the operator that runs conv(x), as chosen, where its result is not kept but made
    again. network: the modules of the feature extractor."""
    if chosen.kind == ORIGINAL or not is_made_again(conv, network):
        return None
    return StemConvCall(chosen.operators, execution.convolution_dtype(x), x, conv.weight)


def is_made_again(conv: Any, network: Iterable[nn.Module | None]) -> bool:
    """Whether backward makes the operator's result again, which takes about a hundredth of a step:
    where the first block does not store everything. A weight without gradient keeps no images,
    which the caller may write to then."""
    first = next((m for m in network if isinstance(m, DenseBlockExecution)), None)
    return conv.weight.requires_grad and first is not None and first.memory != "store"


def by_pytorch(conv: Any, x: Tensor, weight: Tensor) -> Tensor:
    """conv(x) in channels-last memory. The weight's strides decide, so no copy of x is kept; those
    of one input channel would be ambiguous, and are set by a view."""
    dims = image_dims(conv)
    if conv.padding_mode != "zeros" or dims == 1:
        return conv(x)
    if weight.is_contiguous():  # its gradient is to be contiguous, too
        weight = handover.match_layout(weight)
    rows = weight.movedim(1, -1)
    weight = rows.reshape(-1).view(rows.shape).movedim(-1, 1)
    convolve = nn.functional.conv2d if dims == 2 else nn.functional.conv3d
    return convolve(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
