"""Around the dense blocks: the transition, and the executor of a whole feature extractor.

Like `nn.dense_block`, these hold ordinary children under the names and in the
order other libraries use; only the execution is ours, and :meth:`path` says how a call would run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..core.functions import PoolCall, StemFunction, TransitionFunction
from ..ops import dispatch
from ..ops.dispatch import Path
from .layers import CONVOLUTIONS, Convolution, check_input, is_hooked, obstacle, working_dtype
from .norms import (
    BATCH_NORMS,
    BatchNorm,
    attach_stats,
    batch_norm,
    check_count,
    known_stats,
    norm_call,
    update_running_statistics,
    uses_batch_statistics,
)


def _is_pool_by_two(pool: nn.Module) -> bool:
    if type(pool) not in (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d):
        return False
    sizes = {_once(v) for v in (pool.kernel_size, pool.stride)}
    return (
        sizes == {2}
        and _once(pool.padding) == 0
        and not pool.ceil_mode
        and getattr(pool, "divisor_override", None) is None
    )


def _once(value: Any) -> Any:
    """The one number of an option given as a number or as equal numbers per axis."""
    if isinstance(value, (tuple, list)):
        return value[0] if len(set(value)) == 1 else tuple(value)
    return value


class EfficientTransition(reference.Transition):
    """Norm, ReLU, 1x1 convolution and average pooling by 2, executed as one stage that pools first.

    torchvision's ``_Transition``: children norm, relu, conv, pool. Pooling and a pointwise
    convolution commute, so the product runs on a quarter of the pixels. Only the input is kept for
    backward. Input ``[N, C, *spatial]``, output ``[N, K, *(spatial // 2)]``, channels last. Errors
    as in :class:`EfficientDenseBlock`.
    """

    @classmethod
    def from_module(cls, transition: nn.Sequential) -> EfficientTransition:
        """A transition around the four existing children of ``transition``."""
        new = cls.__new__(cls)
        nn.Sequential.__init__(new)
        for name, child in transition._modules.items():
            new.add_module(name, child)
        new.training = transition.training
        return new

    def path(self, x: Tensor) -> Path:
        """How this transition would run on x, and why."""
        reason = obstacle(self._modules.items(), {})
        norm, conv = self.norm, self.conv
        if list(self._modules) != ["norm", "relu", "conv", "pool"]:
            reason = f"children are {', '.join(self._modules)}"
        elif type(norm) not in BATCH_NORMS:
            reason = f"norm is a {type(norm).__name__}"
        elif type(self.relu) is not nn.ReLU:
            reason = f"relu is a {type(self.relu).__name__}"
        elif type(conv) not in CONVOLUTIONS or conv.bias is not None or conv.groups != 1:
            reason = "conv is not a plain convolution without bias"
        elif set(conv.kernel_size) != {1} or set(conv.stride) != {1} or any(conv.padding):
            reason = "conv is not pointwise"
        elif not _is_pool_by_two(self.pool):
            reason = "pool is not an average over 2 pixels in every direction"
        if reason is not None:
            return Path("original", reason)
        dims = len(conv.kernel_size)
        path = dispatch.choose(x.device, x.dtype)
        if path.kind == "kernels" and dims != 2:
            return Path("general", f"transition kernels are two-dimensional, input has {dims}")
        return path

    @torch.compiler.disable  # one opaque step: seconds to compile, and the kernels are ours
    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        path = self.path(x)
        if path.kind == "original":
            return super().forward(x)
        norm, conv = self.norm, self.conv
        check_input(x, len(conv.kernel_size), norm.num_features)
        dtype = working_dtype(x, conv.weight, "conv")
        if min(x.shape[2:]) < 2:
            raise ValueError(
                f"input must be at least 2 pixels in every direction, got shape {list(x.shape)}"
            )
        count = x.numel() // x.shape[1]
        if uses_batch_statistics(norm):
            check_count(count, tuple(x.shape))
        stats = known_stats(x)
        if x.dtype != dtype:
            x, stats = x.to(dtype), None
            path = self.path(x)
        call = PoolCall(norm_call(norm, dtype), path.stages, uses_batch_statistics(norm))
        y, y_stats, used = TransitionFunction.apply(
            call, x, stats, norm.weight, norm.bias, conv.weight
        )
        if call.norm.running is None:
            update_running_statistics([norm], [used], count)
        return attach_stats(y, y_stats) if call.want_stats else y


def _is_stem_pool(pool: nn.Module) -> bool:
    if type(pool) not in (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d):
        return False
    options = [_once(v) for v in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)]
    return options == [3, 2, 1, 1] and not pool.ceil_mode and not pool.return_indices


class EfficientFeatures(nn.Sequential):
    """Runs a feature extractor's children in order, fusing the stem and handing statistics on.

    conv0 stays the framework's; norm0, ReLU and max-pooling behind it become one stage that keeps
    only conv0's output. Dense blocks and transitions pass their channel statistics along, so that
    no norm between them takes a pass over its input. Children, names, order and keys are those of
    the Sequential it replaces, and may still be called one by one.
    """

    @classmethod
    def from_module(cls, features: nn.Sequential) -> EfficientFeatures:
        """An executor around the existing children of ``features``."""
        new = cls()
        for name, child in features._modules.items():
            new.add_module(name, child)
        new.training = features.training
        return new

    def stem_path(self, x: Tensor) -> Path:
        """How the norm, ReLU and pooling behind the stem's convolution would run, and why."""
        children = list(self._modules.items())[:4]
        kinds = [type(child) for _, child in children]
        if len(kinds) < 4 or kinds[0] not in CONVOLUTIONS or kinds[1] not in BATCH_NORMS:
            return Path("original", "does not begin with a convolution and a batch norm")
        if kinds[2] is not nn.ReLU or not _is_stem_pool(children[3][1]):
            return Path("original", "the norm is not followed by ReLU and max-pooling (3, 2, 1)")
        reason = obstacle(children, {})
        if reason is not None:
            return Path("original", reason)
        dims = len(children[0][1].kernel_size)  # type: ignore[arg-type]
        path = dispatch.choose(x.device, x.dtype)
        if path.kind == "kernels" and dims != 2:
            return Path("general", f"stem kernels are two-dimensional, input has {dims}")
        return path

    @torch.compiler.disable  # one opaque step: seconds to compile, and the kernels are ours
    def forward(self, x: Tensor) -> Tensor:
        """x ``[N, C_in, *spatial]`` -> the last child's output."""
        children = list(self._modules.values())
        if self.stem_path(x).kind != "original":
            x = self._stem(x, *children[:3])  # type: ignore[arg-type]
            children = children[4:]
        for child in children:
            if type(child) in BATCH_NORMS and not is_hooked(child):
                x = batch_norm(child, x)  # type: ignore[arg-type]
            else:
                x = child(x)
        return x

    def _stem(self, x: Tensor, conv: Convolution, norm: BatchNorm, _relu: nn.Module) -> Tensor:
        dims = len(conv.kernel_size)
        check_input(x, dims, conv.in_channels)
        x = _channels_last_convolution(conv, x)
        count = x.numel() // x.shape[1]
        if uses_batch_statistics(norm):
            check_count(count, tuple(x.shape))
        path = self.stem_path(x)
        want = uses_batch_statistics(norm)
        call = PoolCall(norm_call(norm, x.dtype), path.stages, want)
        y, y_stats, used = StemFunction.apply(call, x, norm.weight, norm.bias)
        if call.norm.running is None:
            update_running_statistics([norm], [used], count)
        return attach_stats(y, y_stats) if want else y


def _channels_last_convolution(conv: Convolution, x: Tensor) -> Tensor:
    """conv(x) in channels-last memory. The weight's format decides, so no copy of x is kept."""
    if conv.padding_mode != "zeros" or len(conv.kernel_size) != 2:
        return conv(x)
    weight = conv.weight.contiguous(memory_format=torch.channels_last)
    return nn.functional.conv2d(
        x, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
    )
