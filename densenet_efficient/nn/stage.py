"""A dense block that begins inside its container: a Sequential whose first children are something
else, as a transition in front of the layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import graph, handover, watch
from .dense_block import DenseBlockExecution


class StageExecution(DenseBlockExecution):
    """The execution of a Sequential that ends with dense layers, each of which returns its input
    and its new channels: the children in front of them are called, the layers are executed."""

    def _adopt(self, *args: Any, **options: Any) -> None:
        """As of a dense block; only the layers are watched, the others are called."""
        super()._adopt(*args, **options)
        self._efficient.structure = watch.structure_of(self.dense_layers().items())

    def leading(self) -> Mapping[str, nn.Module]:
        """The children in front of the layers, by name."""
        layers = self.dense_layers()
        return {name: child for name, child in self.named_children() if name not in layers}

    def _watched(self) -> dict[str, nn.Module | None]:
        return dict(self.dense_layers())

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """[N, C, *spatial] -> what the last layer returns."""
        if torch.compiler.is_compiling():
            return graph.forward(self, input, input)
        asked = handover.asked_for()
        for child in self.leading().values():
            input = child(input)
        if asked.contiguous is None:
            return self._efficient_forward(input)
        with handover.asking_for(asked):
            return self._efficient_forward(input)

    def in_graph(
        self, x: Tensor, known: Tensor | None, contiguous: bool | None
    ) -> tuple[Tensor, Tensor | None]:
        """As `DenseBlockExecution.in_graph`."""
        for name in self._leading_names(id(self)):
            x, known = self._modules[name](x), None  # type: ignore[misc]
        return super().in_graph(x, known, contiguous)

    @torch.compiler.assume_constant_result
    def _leading_names(self, ident: int) -> tuple[str, ...]:
        """The children in front of the layers. ident: guards on this very module."""
        return tuple(self.leading())

    def _original(self, x: Any) -> Any:
        for layer in self.dense_layers().values():
            x = layer(x)
        return x
