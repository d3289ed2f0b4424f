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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import ownership, paths, reference
from .block import BlockPlan, LayerPlan, NormPlan
from .functions import DenseBlockFunction, PoolPlan, StemFunction, TransitionFunction
from .general import ConvOptions
from .norms import (
    BATCH_NORMS,
    BatchNorm,
    attach_stats,
    batch_norm,
    check_count,
    known_stats,
    norm_plan,
    update_running_statistics,
    uses_batch_statistics,
)
from .paths import Path

MEMORY_MODES = ("recompute", "store")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class LayerParts:
    """The modules of one dense layer, whatever its class calls them.

    A plain layer (norm, ReLU, 3x3 convolution) has no norm2 and conv2. drop_rate is applied to the
    new features in training, channelwise as in ``Dropout2d`` where asked.
    """

    norm1: BatchNorm
    conv1: Convolution
    norm2: BatchNorm | None = None
    conv2: Convolution | None = None
    drop_rate: float = 0.0
    channelwise_dropout: bool = False

    def norms(self) -> list[BatchNorm]:
        """norm1, and norm2 of a bottleneck layer."""
        return [self.norm1] if self.norm2 is None else [self.norm1, self.norm2]


def standard_parts(layer: nn.Module) -> LayerParts:
    """Parts of a layer with torchvision's attribute names."""
    return LayerParts(
        layer.norm1,
        layer.conv1,
        getattr(layer, "norm2", None),
        getattr(layer, "conv2", None),
        float(getattr(layer, "drop_rate", 0.0)),
    )


def _check_memory(memory: str) -> str:
    if memory not in MEMORY_MODES:
        raise ValueError(f"memory must be 'recompute' or 'store', got {memory!r}")
    return memory


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _inspect(modules: Iterable[tuple[str, nn.Module]], expected: Mapping[str, type]) -> str | None:
    """Why the original forward must run: a hook or a replaced child; None where nothing is."""
    for name, module in modules:
        if type(module) is not expected.get(name, type(module)):
            return f"{name} was replaced by a {type(module).__name__}"
        if _hooked(module):
            return f"{name} carries a hook or a forward of its own"
    return None


def _working_dtype(x: Tensor, weight: Tensor, name: str) -> torch.dtype:
    """The dtype the stages run in: autocast's, or the one x and the weight share."""
    if x.dtype not in paths.FLOATING:
        raise TypeError(f"input must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if x.device != weight.device:
        raise ValueError(f"input must be on {weight.device} like {name}.weight, got {x.device}")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    if x.dtype != weight.dtype:
        raise TypeError(f"input must be {weight.dtype} like {name}.weight, got {x.dtype}")
    return x.dtype


def _check_input(x: Tensor, dims: int, channels: int) -> None:
    if x.dim() != dims + 2:
        shape = ["N", "C", "D", "H", "W"][:2] + ["D", "H", "W"][3 - dims :]
        raise ValueError(
            f"input must have {dims + 2} dimensions [{', '.join(shape)}], got shape {list(x.shape)}"
        )
    if x.shape[1] != channels:
        raise ValueError(f"input must have {channels} channels, got shape {list(x.shape)}")


def _geometry(conv: Convolution, name: str, kernel: int) -> tuple[ConvOptions | None, str | None]:
    """How the stages run ``conv``: (None, None) as the kernels' own ``kernel``-sized convolution,
    (options, None) on the general path, (None, reason) not at all."""
    dims = len(conv.kernel_size)
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        return None, f"{name} pads by {conv.padding_mode!r} {conv.padding!r}"
    same = all(
        2 * p == d * (k - 1)
        for p, d, k in zip(conv.padding, conv.dilation, conv.kernel_size, strict=True)
    )
    if any(s != 1 for s in conv.stride) or not same:
        return None, f"{name} changes the image size"
    own = conv.groups == 1 and conv.bias is None and conv.kernel_size == (kernel,) * dims
    if own and (kernel == 1 or (dims == 2 and conv.dilation == (1, 1))):
        return None, None
    return ConvOptions(tuple(conv.padding), tuple(conv.dilation), conv.groups), None


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
                yield f"{name}.{child}", module

    def path(self, x: Tensor) -> Path:
        """How this block would run on x, and why."""
        parts = self.parts()
        return self._plan(x, parts, x.dtype)[0]

    def _plan(
        self, x: Tensor, parts: list[LayerParts], dtype: torch.dtype
    ) -> tuple[Path, tuple[LayerPlan, ...]]:
        reason = _inspect(self._inner_modules(), self._expected)
        if reason is None and torch.jit.is_tracing():
            reason = "torch.jit is tracing"
        path = paths.choose(x.device, dtype)
        layers: list[LayerPlan] = []
        channels = parts[0].norm1.num_features
        for name, part in zip(self._modules, parts, strict=True):
            plan, problem = _layer_plan(part, name, channels, dtype, self._modules[name].training)
            reason = reason or problem
            if plan is None:
                break
            layers.append(plan)
            channels += plan.growth
        if reason is not None:
            path = Path("original", reason)
        return path, tuple(layers)

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        """See the class."""
        x = x if isinstance(x, Tensor) else torch.cat(list(x), 1)
        parts = self.parts()
        first = parts[0]
        _check_input(x, len(first.conv1.kernel_size), first.norm1.num_features)
        dtype = _working_dtype(x, first.conv1.weight, f"{next(iter(self))}.conv1")
        count = x.numel() // x.shape[1]
        if any(uses_batch_statistics(n) for part in parts for n in part.norms()):
            check_count(count, tuple(x.shape))
        path, layers = self._plan(x, parts, dtype)
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
        plan = BlockPlan(layers, path.stages, self.memory, seed)
        parameters = [p for part in parts for p in _parameters(part)]
        y, y_stats, *inner = DenseBlockFunction.apply(plan, x, stats, *parameters)
        _update(parts, plan, y_stats, inner, count)
        return attach_stats(y, y_stats) if plan.batch_stats else y

    def _original(self, x: Tensor, reason: str) -> Tensor:
        if reason != self._warned:
            self._warned = reason
            warnings.warn(f"dense block runs its original forward: {reason}", stacklevel=3)
        return super().forward(x)

    def extra_repr(self) -> str:
        """The memory mode."""
        return f"memory={self.memory!r}"


def _layer_plan(
    part: LayerParts, name: str, channels: int, dtype: torch.dtype, training: bool
) -> tuple[LayerPlan | None, str | None]:
    """The layer's part of a call, or why the stages cannot run it."""
    norms: list[NormPlan | None] = [None, None]
    for index, norm in enumerate(part.norms()):
        if type(norm) not in BATCH_NORMS:
            return None, f"{name}'s norm{index + 1} is a {type(norm).__name__}"
        norms[index] = norm_plan(norm, dtype)
    if part.norm1.num_features != channels:
        return None, f"{name} expects {part.norm1.num_features} channels, not {channels}"
    convs = [part.conv1] if part.conv2 is None else [part.conv1, part.conv2]
    geometry: list[ConvOptions | None] = [None, None]
    for index, conv in enumerate(convs):
        if type(conv) not in _CONVOLUTIONS:
            return None, f"{name}'s conv{index + 1} is a {type(conv).__name__}"
        kernel = 1 if part.conv2 is not None and index == 0 else 3
        geometry[index], problem = _geometry(conv, f"{name}'s conv{index + 1}", kernel)
        if problem:
            return None, problem
    assert norms[0] is not None
    return LayerPlan(
        in_channels=channels,
        growth=convs[-1].out_channels,
        bottleneck=part.conv1.out_channels if part.conv2 is not None else 0,
        norm1=norms[0],
        norm2=norms[1],
        conv1=geometry[0],
        conv2=geometry[1],
        drop_rate=part.drop_rate if training else 0.0,
        channelwise_dropout=part.channelwise_dropout,
    ), None


def _parameters(part: LayerParts) -> list[Tensor | None]:
    """The layer's parameters in the order of ``block.PARAMETERS_PER_LAYER``."""
    first = [part.norm1.weight, part.norm1.bias, part.conv1.weight, part.conv1.bias]
    if part.norm2 is None or part.conv2 is None:
        return [*first, None, None, None, None]
    return [*first, part.norm2.weight, part.norm2.bias, part.conv2.weight, part.conv2.bias]


def _update(
    parts: list[LayerParts], plan: BlockPlan, stats: Tensor, inner: list[Tensor], count: int
) -> None:
    """Every norm's running statistics, once all of the block has run."""
    norms: list[BatchNorm] = []
    values: list[Tensor] = []
    bottlenecks = iter(inner)
    for part, layer in zip(parts, plan.layers, strict=True):
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
        reason = _inspect(self._modules.items(), {})
        norm, conv = self.norm, self.conv
        if list(self._modules) != ["norm", "relu", "conv", "pool"]:
            reason = f"children are {', '.join(self._modules)}"
        elif type(norm) not in BATCH_NORMS:
            reason = f"norm is a {type(norm).__name__}"
        elif type(self.relu) is not nn.ReLU:
            reason = f"relu is a {type(self.relu).__name__}"
        elif type(conv) not in _CONVOLUTIONS or conv.bias is not None or conv.groups != 1:
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
        _check_input(x, len(conv.kernel_size), norm.num_features)
        dtype = _working_dtype(x, conv.weight, "conv")
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
        plan = PoolPlan(norm_plan(norm, dtype), path.stages, uses_batch_statistics(norm))
        y, y_stats, used = TransitionFunction.apply(
            plan, x, stats, norm.weight, norm.bias, conv.weight
        )
        if plan.norm.running is None:
            update_running_statistics([norm], [used], count)
        return attach_stats(y, y_stats) if plan.want_stats else y


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
        if len(kinds) < 4 or kinds[0] not in _CONVOLUTIONS or kinds[1] not in BATCH_NORMS:
            return Path("original", "does not begin with a convolution and a batch norm")
        if kinds[2] is not nn.ReLU or not _is_stem_pool(children[3][1]):
            return Path("original", "the norm is not followed by ReLU and max-pooling (3, 2, 1)")
        reason = _inspect(children, {})
        if reason is not None:
            return Path("original", reason)
        dims = len(children[0][1].kernel_size)
        path = paths.choose(x.device, x.dtype)
        if path.kind == "kernels" and dims != 2:
            return Path("general", f"stem kernels are two-dimensional, input has {dims}")
        return path

    def forward(self, x: Tensor) -> Tensor:
        """x ``[N, C_in, *spatial]`` -> the last child's output."""
        children = list(self._modules.values())
        if self.stem_path(x).kind != "original":
            x = self._stem(x, *children[:3])
            children = children[4:]
        for child in children:
            if type(child) in BATCH_NORMS and not _hooked(child):
                x = batch_norm(child, x)
            else:
                x = child(x)
        return x

    def _stem(self, x: Tensor, conv: Convolution, norm: BatchNorm, _relu: nn.Module) -> Tensor:
        dims = len(conv.kernel_size)
        _check_input(x, dims, conv.in_channels)
        x = _channels_last_convolution(conv, x)
        count = x.numel() // x.shape[1]
        if uses_batch_statistics(norm):
            check_count(count, tuple(x.shape))
        path = self.stem_path(x)
        want = uses_batch_statistics(norm)
        plan = PoolPlan(norm_plan(norm, x.dtype), path.stages, want)
        y, y_stats, used = StemFunction.apply(plan, x, norm.weight, norm.bias)
        if plan.norm.running is None:
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
