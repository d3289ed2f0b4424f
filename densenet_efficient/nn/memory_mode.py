"""What a dense block keeps for its backward pass, as an option of the module."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .execution import Efficient
from .options import AUTO, check_memory


class KeepsBottlenecks(Efficient):
    """A module of dense layers, prepared by `_adopt` with ``memory`` and ``layers``."""

    @property
    def memory(self) -> str:
        """What is kept for the backward pass, one of `options.MEMORY_MODES`; may be set. "auto" is
        "recompute" until `auto_memory.assign` or who knows more sets `kept_layers`."""
        return self._efficient.memory

    @memory.setter
    def memory(self, value: str) -> None:
        self._efficient.memory, self._efficient.kept_layers = check_memory(value), 0

    @property
    def kept_layers(self) -> int:
        """Of how many layers, the last ones, the bottlenecks are kept; may be set with "auto"."""
        return len(self.dense_layers()) if self.memory == "store" else self._efficient.kept_layers

    @kept_layers.setter
    def kept_layers(self, value: int) -> None:
        self._efficient.memory, self._efficient.kept_layers = AUTO, value

    def dense_layers(self) -> Mapping[str, nn.Module]:
        """The layers by name, in order."""
        layers = self._efficient.layers
        return self._modules if layers is None else layers(self)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        """The memory mode."""
        return f"memory={self.memory!r}"
