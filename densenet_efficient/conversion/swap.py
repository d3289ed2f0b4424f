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
from torch import Tensor, nn

from ..nn.auto_memory import assign
from ..nn.classes import become, is_made, unmake
from ..nn.dense_block import DenseBlockExecution
from ..nn.execution import Efficient
from ..nn.options import check_memory, check_module
from .adapters import (
    Adapter,
    LayerAdapter,
    find_adapter,
    qualified_name,
)
from .checks import Unsupported, check_kinds
from .libraries import NAMED
from .self_check import check_view
from .sequences import (
    TRANSITION,
    find_run,
    is_features,
    is_transition,
    probe_features,
    run_adapter,
    view_features,
)

logger = logging.getLogger("densenet_efficient.convert")
_DENSE_NAME = re.compile(r"dense_?(tdnn_?)?(block|layer|unit)", re.IGNORECASE)
_PATHS_SHOWN = 4
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
        kinds: dict[tuple[str, str, str], list[str]] = {}
        for e in self.entries:
            kinds.setdefault((e.outcome, e.source, e.reason), []).append(e.path or "(the model)")
        lines = []
        for (outcome, source, reason), paths in kinds.items():
            shown = ", ".join(paths[:_PATHS_SHOWN])
            if len(paths) > _PATHS_SHOWN:
                shown += f" and {len(paths) - _PATHS_SHOWN} more"
            lines.append(f"{outcome:9}  {shown}: {source}" + (f" ({reason})" if reason else ""))
        return "\n".join(lines) or "no dense block found"

    def select(self, outcome: str) -> list[Entry]:
        """The entries with this outcome."""
        return [entry for entry in self.entries if entry.outcome == outcome]


class Conversion:
    """Phase one, done by the constructor. `apply` is phase two."""

    def __init__(self, model: nn.Module, memory: str = "auto") -> None:
        check_memory(memory)
        check_module("model", model)
        self.report = Report()
        self._model, self._memory = model, memory
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
        assign(self._model)

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
        if isinstance(adapter, Adapter):
            return self._view(module, path, adapter)
        run = find_run(module)
        if run is not None:
            first, layer_adapter = run
            children = self._children(module, path, first)
            return self._view(module, path, run_adapter(first, layer_adapter, children))
        if is_transition(module):
            return self._view(module, path, TRANSITION)
        if isinstance(adapter, LayerAdapter):
            self._note(path, module, "left", "it is no child of a torch.nn.Sequential of layers")
            return module
        reason = self._foreign(module)
        if reason:
            self._note(path, module, "refused", reason)
            return module
        return self._descend(module, path)

    def _descend(self, module: nn.Module, path: str) -> nn.Module:
        """Converts the children; the `features` Sequential itself, too, around converted ones."""
        children = self._children(module, path, len(module._modules))
        blocks = any(
            isinstance(children[name], DenseBlockExecution) and children[name] is not child
            for name, child in module._modules.items()
        )
        if not (blocks and is_features(module)):
            return module

        def view(features: nn.Module, memory: str) -> Efficient:
            return view_features(features, children)

        def probe(features: nn.Module) -> Tensor:
            return probe_features(children)

        return self._view(module, path, Adapter(view, probe, required=False))

    def _children(self, module: nn.Module, path: str, count: int) -> dict[str, nn.Module | None]:
        """The children by name, the first count of them as efficient views where they can be."""
        children = dict(module._modules)
        for name, child in list(module._modules.items())[:count]:
            if child is not None:
                children[name] = self._visit(child, f"{path}.{name}" if path else name)
        return children

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
        except (AttributeError, LookupError, TypeError) as error:
            problem = f"its adapter does not fit: {type(error).__name__}: {error}"
            self._note(path, module, "refused", problem)
            return module
        self._note(path, module, "converted", remark)
        self._found.append((module, view))
        return view

    def _foreign(self, module: nn.Module) -> str:
        """Why a module that looks like a dense block, but has no adapter, is refused; else ""."""
        if isinstance(module, torch.jit.ScriptModule):
            return "a script module; convert before scripting" if _looks_dense(module) else ""
        if isinstance(module, torch.fx.GraphModule):
            return "traced by torch.fx; convert before tracing" if _looks_dense(module) else ""
        named = _DENSE_NAME.search(type(module).__name__)
        if named or any(_DENSE_CHILD.fullmatch(name) for name in module._modules):
            kinds = [type(inner).__name__ for inner in module.modules()]
            if any("Conv" in kind for kind in kinds) and any("Norm" in kind for kind in kinds):
                return f"an unknown class; {self._advice(module)}"
        return ""

    def _advice(self, module: nn.Module) -> str:
        """Which adapter of ours the module would pass the self-check with, if any."""
        for name, adapter in NAMED.items():
            if isinstance(adapter, Adapter) and adapter.required:
                try:
                    check_kinds(module)
                    check_view(module, adapter.view(module, self._memory), adapter.probe)
                except Exception:  # whatever another library's module raises under a wrong name
                    continue
                return (
                    "it passes the self-check with densenet_efficient.conversion.libraries."
                    f"{name}: densenet_efficient.register_adapter({type(module).__name__}, {name})"
                )
        return "see densenet_efficient.register_adapter"


def _looks_dense(module: nn.Module) -> bool:
    return any(_DENSE_CHILD.search(name) for name, _ in module.named_modules())


def convert(model: nn.Module, memory: str = "auto", *, strict: bool = True) -> nn.Module:
    """Makes every dense block of a model run in the least memory; in place, same results.

    Every module stays the same object with the same children, parameters, buffers, hooks and flags;
    only its class becomes one derived from the class it had. Optimisers made before go on working.
    Converting again only sets the memory mode. The report is logged to "densenet_efficient.convert"
    at level INFO.

    Args:
        model: a DenseNet of a known library (docs/compatibility.md lists them), any module that
            contains its blocks, or blocks that an adapter is registered for.
        memory: "recompute" keeps only each block's output for the backward pass, "store" the
            bottlenecks too. "auto" keeps those bottlenecks for which a training step's peak has
            room where the model is a classifier of one chain of blocks and transitions, and none
            in others, whose peak may be elsewhere.
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
            f"nothing to convert in {type(model).__name__}: {report}; expected the "
            "dense blocks of a known library or a class with a registered adapter"
        )
    conversion.apply()
    logger.info("%s", report)
    return model


def inspect_conversion(model: nn.Module, memory: str = "auto") -> Report:
    """What `convert` would do, self-checks included; the model is not changed."""
    return Conversion(model, memory).report


def unconvert(model: nn.Module) -> nn.Module:
    """Makes every module that `convert` made efficient what it was, around its present children; in
    place, returning the model. Modules that were built efficient stay."""
    check_module("model", model)
    for module in list(model.modules()):
        if is_made(module):
            unmake(module)
    return model
