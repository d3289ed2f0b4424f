"""Which path every efficient module of a model takes on an input, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn.dense_block import EfficientDenseBlock
from ..nn.features import EfficientFeatures, EfficientTransition
from ..ops.dispatch import Path
from .tables import table


@dataclass(frozen=True)
class Explanation:
    """One line per efficient module, in the order of the forward pass.

    entries: (module name, path). ``str()`` is the table.
    """

    entries: tuple[tuple[str, Path], ...]

    def __str__(self) -> str:
        if not self.entries:
            return "no efficient modules ran; call densenet_efficient.convert(model) first"
        rows = [(name, path.kind, path.reason) for name, path in self.entries]
        return table(["module", "path", "reason"], rows, left=("path", "reason"))

    @property
    def kinds(self) -> set[str]:
        """The kinds of path taken: ``kernels``, ``general``, ``original``."""
        return {path.kind for _, path in self.entries}


def explain(module: nn.Module, input: Tensor) -> Explanation:
    """Run ``module`` on ``input`` as it is and report every efficient module's path.

    The run is a forward pass under ``no_grad`` with every module in eval mode for its length, so no
    running statistic changes. The module's own errors pass through.
    """
    entries: list[tuple[str, Path]] = []
    modes = {child: child.training for child in module.modules()}
    handles = []

    def watch(name: str, child: nn.Module) -> None:
        def note(_: nn.Module, args: tuple) -> None:
            x = args[0] if isinstance(args[0], Tensor) else args[0][0]
            dtype = x.dtype
            if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
                dtype = torch.get_autocast_dtype(x.device.type)
            seen = x.detach().to(dtype)
            if isinstance(child, EfficientFeatures):
                entries.append((f"{name}.stem".lstrip("."), child.stem_path(seen)))
            elif isinstance(child, (EfficientDenseBlock, EfficientTransition)):
                entries.append((name or type(child).__name__, child.path(seen)))

        handles.append(child.register_forward_pre_hook(note))

    for name, child in module.named_modules():
        if isinstance(child, (EfficientDenseBlock, EfficientTransition, EfficientFeatures)):
            watch(name, child)
    try:
        with torch.no_grad():
            module.eval()
            module(input)
    finally:
        for handle in handles:
            handle.remove()
        for child, mode in modes.items():
            child.training = mode
    return Explanation(tuple(entries))
