"""Drop-in modules: the dense block, the transition, and the executor of a whole feature extractor.

They hold ordinary layers and real BatchNorm modules as parameter holders, under the names and in
the order other libraries use, so state dicts, optimisers, hooks on parameters and surgery on
``model.features`` go on working; only the execution is ours. Where a call needs something the
stages cannot see (a hook on an inner module, a replaced child), the original forward runs instead,
and :meth:`path` says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import ownership, paths, reference
from .calls import BlockCall, LayerCall
from .functions import DenseBlockFunction, PoolCall, StemFunction, TransitionFunction
from .layers import (
    CONVOLUTIONS,
    Convolution,
    LayerParts,
    check_input,
    is_hooked,
    layer_call,
    layer_parameters,
    obstacle,
    standard_parts,
    working_dtype,
)
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
from .paths import Path

MEMORY_MODES = ("recompute", "store")


def _check_memory(memory: str) -> str:
    if memory not in MEMORY_MODES:
        raise ValueError(f"memory must be 'recompute' or 'store', got {memory!r}")
    return memory


class EfficientDenseBlock(reference.DenseBlock):
    """A dense block in one feature buffer: torchvision's ``_DenseBlock``, children and keys.

    Args:
        num_layers, num_input_features, bn_size, growth_rate, drop_rate: as in torchvision.
        memory_efficient: accepted for torchvision's signature; every mode here is.
        memory: ``"recompute"`` keeps the output only (Pleiss et al., arXiv 1707.06990, and less);
            ``"store"`` also keeps every bottleneck and saves recomputing it.
        bottleneck, eps, momentum, dilation, dims: options of the layers by keyword.

    Input ``[N, num_input_features, *spatial]`` (or a list of tensors to concatenate), any memory
    format; output ``[N, num_input_features + num_layers * growth_rate, *spatial]``, channels last.
    float64, float32, bfloat16, float16, and autocast.

    Raises:
        ValueError: bad options; wrong rank, channels or device; one value per channel in training.
        TypeError: a dtype that is not floating or differs from the weights'.
    """

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int,
        growth_rate: int,
        drop_rate: float,
        memory_efficient: bool = False,
        *,
        memory: str = "recompute",
        **options: Any,
    ) -> None:
        _check_memory(memory)
        super().__init__(
            num_layers, num_input_features, bn_size, growth_rate, drop_rate, False, **options
        )
        self._adopt(standard_parts, memory)

    @classmethod
    def from_layers(
        cls,
        layers: Mapping[str, nn.Module],
        parts: Callable[[nn.Module], LayerParts] = standard_parts,
        memory: str = "recompute",
    ) -> EfficientDenseBlock:
        """A block around existing layers, which keep their names, parameters and buffers.

        parts: a picklable function that names a layer's modules. Each layer must also run on its
        own, from the list of all earlier outputs to its new features (the original forward).
        """
        if not layers:
            raise ValueError("layers must hold at least one dense layer, got none")
        block = cls.__new__(cls)
        nn.ModuleDict.__init__(block, dict(layers))
        block._adopt(parts, _check_memory(memory))
        block.training = next(iter(layers.values())).training  # not of the layers' own norms
        return block

    def _adopt(self, parts: Callable[[nn.Module], LayerParts], memory: str) -> None:
        self._parts = parts
        self.memory = memory
        self._expected = {
            f"{name}.{child}" if child else name: type(module)
            for name, layer in self.items()
            for child, module in layer.named_modules()
        }
        self._warned: str | None = None

    def parts(self) -> list[LayerParts]:
        """The parts of every layer, in order."""
        return [self._parts(layer) for layer in self.values()]

    def _inner_modules(self) -> Iterable[tuple[str, nn.Module]]:
        for name, layer in self._modules.items():
            yield name, layer
            for child, module in layer._modules.items():
                yield f"{name}.{child}", module  # type: ignore[misc]

    def path(self, x: Tensor) -> Path:
        """How this block would run on x, and why."""
        parts = self.parts()
        return self._calls(x, parts, x.dtype)[0]

    def _calls(
        self, x: Tensor, parts: list[LayerParts], dtype: torch.dtype
    ) -> tuple[Path, tuple[LayerCall, ...]]:
        reason = obstacle(self._inner_modules(), self._expected)
        path = paths.choose(x.device, dtype)
        layers: list[LayerCall] = []
        channels = parts[0].norm1.num_features
        for name, part in zip(self._modules, parts, strict=True):
            call, problem = layer_call(part, name, channels, dtype, self._modules[name].training)
            reason = reason or problem
            if call is None:
                break
            layers.append(call)
            channels += call.growth
        if reason is not None:
            path = Path("original", reason)
        return path, tuple(layers)

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        """See the class."""
        x = x if isinstance(x, Tensor) else torch.cat(list(x), 1)
        parts = self.parts()
        first = parts[0]
        check_input(x, len(first.conv1.kernel_size), first.norm1.num_features)
        dtype = working_dtype(x, first.conv1.weight, f"{next(iter(self))}.conv1")
        count = x.numel() // x.shape[1]
        if any(uses_batch_statistics(n) for part in parts for n in part.norms()):
            check_count(count, tuple(x.shape))
        path, layers = self._calls(x, parts, dtype)
        if path.kind == "original":
            return self._original(x, path.reason)
        stats = known_stats(x)
        if x.dtype != dtype:
            x, stats = x.to(dtype), None
        if torch.is_grad_enabled():
            ownership.sole_counts()
        seed = 0
        if any(layer.drop_rate > 0 for layer in layers):
            seed = int(torch.randint(1 << 48, ()))
        call = BlockCall(layers, path.stages, self.memory, seed)
        parameters = [p for part in parts for p in layer_parameters(part)]
        y, y_stats, *inner = DenseBlockFunction.apply(call, x, stats, *parameters)
        _update(parts, call, y_stats, inner, count)
        return attach_stats(y, y_stats) if call.batch_stats else y

    def _original(self, x: Tensor, reason: str) -> Tensor:
        if reason != self._warned:
            self._warned = reason
            warnings.warn(f"dense block runs its original forward: {reason}", stacklevel=3)
        return super().forward(x)

    def extra_repr(self) -> str:
        """The memory mode."""
        return f"memory={self.memory!r}"


def _update(
    parts: list[LayerParts], call: BlockCall, stats: Tensor, inner: list[Tensor], count: int
) -> None:
    """Every norm's running statistics, once all of the block has run."""
    norms: list[BatchNorm] = []
    values: list[Tensor] = []
    bottlenecks = iter(inner)
    for part, layer in zip(parts, call.layers, strict=True):
        if layer.norm1.running is None:
            norms.append(part.norm1)
            values.append(stats[:, : layer.in_channels])
        if part.norm2 is not None and layer.norm2 is not None:
            b_stats = next(bottlenecks)
            if layer.norm2.running is None:
                norms.append(part.norm2)
                values.append(b_stats)
    if norms:
        update_running_statistics(norms, values, count)


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
        path = paths.choose(x.device, x.dtype)
        if path.kind == "kernels" and dims != 2:
            return Path("general", f"transition kernels are two-dimensional, input has {dims}")
        return path

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
        path = paths.choose(x.device, x.dtype)
        if path.kind == "kernels" and dims != 2:
            return Path("general", f"stem kernels are two-dimensional, input has {dims}")
        return path

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
