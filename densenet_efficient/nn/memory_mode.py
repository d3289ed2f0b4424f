"""What a dense block keeps for its backward pass, as an option of the module."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .execution import Efficient
from .options import AUTO, check_count, check_memory


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
        """Of how many layers, the last ones, the bottlenecks are kept. May be set, which sets the
        mode to "auto"; ValueError unless it is from 0 to the number of layers."""
        return len(self.dense_layers()) if self.memory == "store" else self._efficient.kept_layers

    @kept_layers.setter
    def kept_layers(self, value: int) -> None:
        layers = len(self.dense_layers())
        if (kept := check_count("kept_layers", value, 0)) > layers:
            raise ValueError(f"kept_layers must be at most the {layers} layers, got {kept}")
        self._efficient.memory, self._efficient.kept_layers = AUTO, kept

    def dense_layers(self) -> Mapping[str, nn.Module]:
        """The layers by name, in order."""
        layers = self._efficient.layers
        return self._modules if layers is None else layers(self)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        """The memory mode, and how many layers "auto" keeps the bottlenecks of."""
        kept = f", kept_layers={self.kept_layers}" if self.memory == AUTO else ""
        return f"memory={self.memory!r}{kept}"
