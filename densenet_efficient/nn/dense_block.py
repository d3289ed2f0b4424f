"""The drop-in dense block.

It holds ordinary layers and real BatchNorm modules as parameter holders, under the names and in the
order other libraries use, so state dicts, optimisers, hooks on parameters and surgery on a model go
on working; only the execution is ours. Where a call needs something the
stages cannot see (a hook on an inner module, a replaced child), the original forward runs instead,
and :meth:`path` says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..core import ownership
from ..core.functions import DenseBlockFunction
from ..core.specs import BlockCall, LayerCall
from ..ops import dispatch
from ..ops.dispatch import Path
from .layers import (
    LayerParts,
    check_input,
    layer_call,
    layer_parameters,
    obstacle,
    standard_parts,
    working_dtype,
)
from .norms import (
    BatchNorm,
    attach_stats,
    check_count,
    known_stats,
    update_running_statistics,
    uses_batch_statistics,
)

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
        path = dispatch.choose(x.device, dtype)
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

    @torch.compiler.disable  # one opaque step: seconds to compile, and the kernels are ours
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
