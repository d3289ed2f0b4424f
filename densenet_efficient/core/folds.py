"""The folded norms of a block's layers: scale and shift of each, from its statistics, gamma, beta.

A norm can be folded as soon as the last of its statistics is there, which is when the second pass
of the convolution in front of it has ended; so that convolution's operator folds it, where nothing
comes between (`Fold`). Backward takes the norms of the forward pass: a few values for each channel
that a layer reads, in one buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import compiled
from ..ops.interface import NORM_ROWS, Operators
from .specs import PARAMETERS_PER_LAYER, BlockSpec, NormSpec, norm_length


class Fold(NamedTuple):
    """What `norm_fold` takes: stats ``[2, C]``, gamma and beta ``[C]`` or None, eps, and the norm
    that it writes."""

    stats: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    eps: float
    norm: Tensor

    def run(self, operators: Operators) -> Tensor:
        """By an operator of its own. Returns the norm."""
        operators.norm_fold(*self)
        return self.norm


def norms_in(spec: BlockSpec, buffer: Tensor, rows: int = NORM_ROWS) -> list[tuple[Tensor, Tensor]]:
    """A table ``[rows, C]`` of norm1 and of norm2 of every layer, by default the folded norm, in a
    buffer of `norm_elements`."""
    found, place = [], 0
    for layer in spec.layers:
        pair = []
        for width in layer.norm_widths():
            pair.append(buffer[place : place + rows * width].view(rows, width))
            place += norm_length(width, rows)
        found.append((pair[0], pair[1]))
    return found


def are_together(device: torch.device) -> bool:
    """Whether one operator folds all norms of a block there."""
    return device.type == "cpu"


class Folds:
    """All of a call: from the statistics ``[2, C_total]`` of F and ``[2, K]`` of every b, or the
    norms' constant ones, into a buffer of `norm_elements`."""

    def __init__(
        self,
        spec: BlockSpec,
        stats: Tensor,
        bottleneck_stats: Sequence[Tensor],
        parameters: Sequence[Tensor | None],
        buffer: Tensor,
    ) -> None:
        self._spec, self._stats, self._bottleneck_stats = spec, stats, bottleneck_stats
        self._parameters = _cast(parameters, stats.dtype, len(spec.layers))
        self._norms, self._buffer = norms_in(spec, buffer), buffer

    def first(self, index: int) -> Fold:
        """Of a layer's norm1."""
        layer = self._spec.layers[index]
        return self._fold(layer.norm1, self._stats[:, self._spec.inputs(index)], index, 0)

    def second(self, index: int) -> Fold:
        """Of a layer's norm2."""
        norm = self._spec.layers[index].norm2
        assert norm is not None
        return self._fold(norm, self._bottleneck_stats[index], index, 1)

    def run_all(self, table: Tensor, together: bool) -> None:
        """Folds every norm. table: holds all statistics, those of F first. together: see
        `are_together`; by one operator where that takes the norms, which is compiled, of the
        batch's statistics, and of one eps."""
        each, first, column = [], [], self._spec.out_channels
        for index, layer in enumerate(self._spec.layers):
            each.append(self.first(index))
            first.append(self._spec.inputs(index).start or 0)
            if layer.bottleneck:
                each.append(self.second(index))
                first.append(column)
            column += layer.bottleneck
        affine = [(f.gamma, f.beta) for f in each if f.gamma is not None and f.beta is not None]
        batch = sum(len(layer.batch_norms()) for layer in self._spec.layers)
        same = len(affine) == batch == len(each) and len({fold.eps for fold in each}) == 1
        if together and same and self._spec.operators is compiled:
            gammas, betas = map(list, zip(*affine, strict=True))
            compiled.norm_fold_all(table, gammas, betas, first, each[0].eps, self._buffer)
            return
        for fold in each:
            fold.run(self._spec.operators)

    def _fold(self, norm: NormSpec, stats: Tensor, index: int, which: int) -> Fold:
        gamma, beta = self._parameters[index][2 * which : 2 * which + 2]
        source = stats if norm.running is None else norm.running
        return Fold(source, gamma, beta, norm.eps, self._norms[index][which])


def _cast(
    parameters: Sequence[Tensor | None], dtype: torch.dtype, layers: int
) -> list[list[Tensor | None]]:
    """gamma1, beta1, gamma2 and beta2 of every layer, in the dtype and contiguous; those of another
    dtype are cast together."""
    found: list[list[Tensor | None]] = []
    to_cast: list[tuple[int, int]] = []
    for index in range(layers):
        own = parameters[index * PARAMETERS_PER_LAYER : (index + 1) * PARAMETERS_PER_LAYER]
        found.append([None if p is None else p.contiguous() for p in (*own[:2], *own[4:6])])
        for place, parameter in enumerate(found[-1]):
            if parameter is not None and parameter.dtype != dtype:
                to_cast.append((index, place))
    if to_cast:
        sources = [found[index][place] for index, place in to_cast]
        casts = [torch.empty_like(one, dtype=dtype) for one in sources]  # type: ignore[arg-type]
        torch._foreach_copy_(casts, sources)  # type: ignore[arg-type]
        for (index, place), cast in zip(to_cast, casts, strict=True):
            found[index][place] = cast
    return found
