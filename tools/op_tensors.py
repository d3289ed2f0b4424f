"""The tensors of one call of an operator: slices of wider buffers, weights and tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from densenet_efficient import reference

EPS = 1e-5


@dataclass
class Case:
    """Arguments in the operator's order, by name; `written` names those that it writes."""

    op: str
    arguments: dict[str, Any]
    written: tuple[str, ...]
    buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # whole, slice

    @property
    def outputs(self) -> dict[str, Tensor]:
        return {name: self.arguments[name] for name in self.written}

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor argument's own elements."""
        tensors = {k: v for k, v in self.arguments.items() if isinstance(v, Tensor)}
        return {name: value.numel() * value.element_size() for name, value in tensors.items()}

    def inputs(self, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Copies of what the operator reads; floating-point tensors as `dtype`, if given."""
        return {
            name: value.to(dtype or value.dtype).clone() if isinstance(value, Tensor) else value
            for name, value in self.arguments.items()
        }

    def check_outside(self) -> None:
        """Fails if anything outside the slices was written."""
        for whole, part in self.buffers:
            copy = whole.clone()
            first = (part.data_ptr() - whole.data_ptr()) // whole.element_size()
            copy[..., first : first + part.shape[-1]] = math.nan
            if not copy.isnan().all():
                raise AssertionError(f"{self.op} wrote outside a slice")


@dataclass
class Maker:
    """Makes a case's tensors; see `op_cases.make`."""

    dtype: torch.dtype
    before: int
    table_margin: int
    widths: Mapping[str, int]
    device: torch.device
    buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def wide(self) -> torch.dtype:
        return reference.wide_dtype(self.dtype)

    def draw(self, *shape: int) -> Tensor:
        """Normal values, with all the digits that the case's dtype may hold."""
        return torch.randn(shape, dtype=self.wide, device=self.device)

    def slice(self, dtype: torch.dtype, shape: tuple[int, ...], before: int, width: int) -> Tensor:
        """`shape`, `before` channels into a buffer of `width` channels, everything NaN."""
        whole = torch.full((*shape[:-1], width), math.nan, dtype=dtype, device=self.device)
        part = whole[..., before : before + shape[-1]]
        self.buffers.append((whole, part))
        return part

    def empty(self, name: str, *shape: int) -> Tensor:
        """An activation; rows begin at a sector of 32 bytes unless `widths` says otherwise."""
        channels = self.before + shape[-1]
        width = self.widths.get(name, channels + 16 - channels % 16)
        if width < channels:
            raise ValueError(f"widths: expected at least {channels} for {name}, got {width}")
        return self.slice(self.dtype, shape, self.before, width)

    def random(self, name: str, *shape: int) -> Tensor:
        return self.empty(name, *shape).copy_(self.draw(*shape) * 1.5 + 0.5)

    def weight(self, *shape: int) -> Tensor:
        fan_in = max(1, math.prod(shape[1:]))
        return (self.draw(*shape) / math.sqrt(fan_in)).to(self.dtype)

    def table(self, rows: int, channels: int) -> Tensor:
        """A table of per-channel vectors that the operator fills."""
        margin = self.table_margin
        if margin:
            return self.slice(self.wide, (rows, channels), margin, channels + 2 * margin)
        return self.sums(rows, channels)

    def sums(self, *shape: int) -> Tensor:
        """A weight gradient."""
        return torch.full(shape, math.nan, dtype=self.wide, device=self.device)

    def norm(self, x: Tensor) -> Tensor:
        """A norm with x's own statistics; gamma and beta of both signs."""
        gamma, beta = self.draw(2, x.shape[-1])
        stats = reference.channel_stats(x.flatten(0, -2))
        return reference.norm_fold(stats, gamma, beta, EPS)

    def correction(self, y: Tensor) -> Tensor:
        dnorm = self.draw(2, y.shape[-1])
        return reference.norm_correction(dnorm, self.norm(y), y.numel() // max(1, y.shape[-1]))
