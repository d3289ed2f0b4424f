"""Which path every efficient module of a model takes on an input, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn.execution import check_is_tensor, recording
from ..nn.options import check_module
from ..ops.dispatch import Dispatch
from .tables import table


@dataclass(frozen=True)
class Explanation:
    """One line for each efficient module, in the order of the forward pass.

    entries: (module name, dispatch). ``str()`` is the table.
    """

    entries: tuple[tuple[str, Dispatch], ...]

    def __str__(self) -> str:
        if not self.entries:
            return "no efficient modules ran; call densenet_efficient.convert(model) first"
        rows = [(name, chosen.kind, chosen.reason) for name, chosen in self.entries]
        return table(["module", "path", "reason"], rows, left=("path", "reason"))

    def describe(self) -> list[dict[str, str]]:
        """A row of plain values for each module: module, path, reason."""
        return [
            {"module": name, "path": chosen.kind, "reason": chosen.reason}
            for name, chosen in self.entries
        ]

    @property
    def kinds(self) -> set[str]:
        """The kinds of dispatch: ``kernels``, ``fallback``, ``original``."""
        return {chosen.kind for _, chosen in self.entries}


def explain(module: nn.Module, input: Tensor) -> Explanation:
    """Runs ``module`` on ``input`` as it is and reports how every efficient module ran.

    The run is a forward pass under ``no_grad`` with every module in eval mode for its length, so no
    running statistic changes. A compiled module is run uncompiled, which is how its graph runs. The
    module's own errors pass through. TypeError where module is no module or input no tensor.
    """
    check_module("module", module)
    check_is_tensor(input)
    names = {id(child): name for name, child in module.named_modules()}
    modes = {child: child.training for child in module.modules()}
    try:
        eagerly = torch.compiler.set_stance("force_eager")
        with torch.no_grad(), eagerly, recording() as entries:
            module.eval()
            module(input)
    finally:
        for child, mode in modes.items():
            child.training = mode
    return Explanation(
        tuple(
            (".".join(filter(None, (names.get(id(m), ""), part))) or type(m).__name__, chosen)
            for m, part, chosen in entries
        )
    )
