"""Converting a model: find, view, check, and only then change.

Phase one walks the model, makes an efficient view of every block around the block's own children
and compares the two numerically; nothing of the model changes. Phase two makes every block what its
view is: the module stays the same object, its class becomes one derived from the class it had. So a
model is either converted or untouched.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field

import torch
from torch import nn

from ..nn.classes import become, is_made, unmake
from ..nn.dense_block import DenseBlockExecution
from ..nn.execution import Efficient
from ..nn.options import check_memory
from . import torchvision_tree
from .adapters import Adapter, Unsupported, check_kinds, find_adapter, qualified_name
from .self_check import check_view

logger = logging.getLogger("densenet_efficient.convert")
_DENSE_NAME = re.compile(r"dense_?(block|layer|unit)", re.IGNORECASE)
_DENSE_CHILD = re.compile(r"dense_?layer_?\d+", re.IGNORECASE)


class ConversionError(ValueError):
    """The model was not converted, and not changed; the message lists every reason."""


@dataclass(frozen=True)
class Entry:
    """What became of one module. outcome: "converted", "already", "left" or "refused"."""

    path: str
    source: str
    outcome: str
    reason: str = ""


@dataclass
class Report:
    """Every module that is a dense block, or looks like one, and what became of it."""

    entries: list[Entry] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{e.outcome:9}  {e.path or '(the model)'}: {e.source}"
            + (f" ({e.reason})" if e.reason else "")
            for e in self.entries
        ]
        return "\n".join(lines) or "no dense block found"

    def select(self, outcome: str) -> list[Entry]:
        """The entries with this outcome."""
        return [entry for entry in self.entries if entry.outcome == outcome]


class Conversion:
    """Phase one, done by the constructor. `apply` is phase two."""

    def __init__(self, model: nn.Module, memory: str = "recompute") -> None:
        check_memory(memory)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.report = Report()
        self._memory = memory
        self._views: dict[int, nn.Module] = {}
        self._found: list[tuple[nn.Module, Efficient]] = []
        self._modes: list[DenseBlockExecution] = []
        self._visit(model, "")

    def apply(self) -> None:
        """Makes every block what its view is."""
        for block in self._modes:
            block.memory = self._memory
        for source, view in self._found:
            become(source, view)

    def _note(self, path: str, module: nn.Module, outcome: str, reason: str = "") -> None:
        self.report.entries.append(Entry(path, qualified_name(type(module)), outcome, reason))

    def _visit(self, module: nn.Module, path: str) -> nn.Module:
        """The module's efficient view, or the module itself."""
        if id(module) not in self._views:
            self._views[id(module)] = self._convert(module, path)
        return self._views[id(module)]

    def _convert(self, module: nn.Module, path: str) -> nn.Module:
        if isinstance(module, DenseBlockExecution):
            self._note(path, module, "already")
            self._modes.append(module)
            return module
        adapter = find_adapter(module)
        if adapter is not None:
            return self._view(module, path, adapter)
        reason = _foreign(module)
        if reason:
            self._note(path, module, "refused", reason)
            return module
        return self._descend(module, path)

    def _descend(self, module: nn.Module, path: str) -> nn.Module:
        """Converts the children; the `features` Sequential itself, too, around converted ones."""
        children: dict[str, nn.Module | None] = {}
        for name, child in module._modules.items():
            inner = f"{path}.{name}" if path else name
            children[name] = None if child is None else self._visit(child, inner)
        changed = any(children[name] is not child for name, child in module._modules.items())
        if not (changed and torchvision_tree.is_features(module)):
            return module

        def view(features: nn.Module, memory: str) -> Efficient:
            return torchvision_tree.view_features(features, children)

        adapter = Adapter(view, torchvision_tree.probe_features, required=False)
        return self._view(module, path, adapter)

    def _view(self, module: nn.Module, path: str, adapter: Adapter) -> nn.Module:
        try:
            check_kinds(module)
            if "forward" in module.__dict__:
                raise Unsupported("its forward was replaced")
            view = adapter.view(module, self._memory)
            remark = check_view(module, view, adapter.probe)
        except Unsupported as reason:
            self._note(path, module, "refused" if adapter.required else "left", str(reason))
            return module
        self._note(path, module, "converted", remark)
        self._found.append((module, view))
        return view


def _foreign(module: nn.Module) -> str:
    """Why a module that looks like a dense block, but has no adapter, is refused; else ""."""
    if isinstance(module, torch.jit.ScriptModule):
        return "a script module; convert before scripting" if _looks_dense(module) else ""
    if isinstance(module, torch.fx.GraphModule):
        return "traced by torch.fx; convert before tracing" if _looks_dense(module) else ""
    named = _DENSE_NAME.search(type(module).__name__)
    if named or any(_DENSE_CHILD.fullmatch(name) for name in module._modules):
        kinds = [type(inner).__name__ for inner in module.modules()]
        if any("Conv" in kind for kind in kinds) and any("Norm" in kind for kind in kinds):
            return "an unknown class; see densenet_efficient.register_adapter"
    return ""


def _looks_dense(module: nn.Module) -> bool:
    return any(_DENSE_CHILD.search(name) for name, _ in module.named_modules())


def convert(model: nn.Module, memory: str = "recompute", *, strict: bool = True) -> nn.Module:
    """Makes every dense block of a model run in the least memory; in place, same results.

    Every module stays the same object with the same children, parameters, buffers, hooks and flags;
    only its class becomes one derived from the class it had. Optimisers made before go on working.
    Converting again only sets the memory mode. The report is logged to "densenet_efficient.convert"
    at level INFO.

    Args:
        model: torchvision's DenseNet, or any module that contains its blocks, or blocks that an
            adapter is registered for.
        memory: "recompute" keeps only each block's output for the backward pass, "store" the
            bottlenecks too.
        strict: False converts what can be converted and leaves the rest as it is.

    Returns:
        The model.

    Raises:
        ConversionError: nothing to convert, or a dense block that cannot be converted (quantised,
            lazy, scripted, another activation or norm, an unknown class, a failed self-check). The
            model is unchanged.
    """
    conversion = Conversion(model, memory)
    report = conversion.report
    refused = report.select("refused")
    if refused and strict:
        raise ConversionError("the model was not converted:\n" + str(Report(refused)))
    if not report.select("converted") and not report.select("already"):
        raise ConversionError(
            f"nothing to convert in {type(model).__name__}: {report}; expected torchvision's "
            "dense blocks or a class with a registered adapter"
        )
    conversion.apply()
    logger.info("%s", report)
    return model


def inspect_conversion(model: nn.Module, memory: str = "recompute") -> Report:
    """What `convert` would do, self-checks included; the model is not changed."""
    return Conversion(model, memory).report


def unconvert(model: nn.Module) -> nn.Module:
    """Makes every module that `convert` made efficient what it was, around its present children; in
    place, returning the model. Modules that were built efficient stay."""
    for module in list(model.modules()):
        if is_made(module):
            unmake(module)
    return model
