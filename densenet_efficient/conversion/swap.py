"""Converting a model: find, build, check, and only then swap.

Phase one walks the model, builds every replacement around the source's own parameters and compares
the two numerically in eval mode; nothing of the model changes. Phase two puts the replacements in
place. So a model is either converted or untouched.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..nn.dense_block import EfficientDenseBlock
from . import torchvision_tree
from .adapters import Adapter, Unsupported, check_kinds, find_adapter, qualified_name
from .self_check import check_replacement

logger = logging.getLogger("densenet_efficient.convert")
MEMORY_MODES = ("recompute", "store")
_DENSE_NAME = re.compile(r"dense_?(block|layer|unit)", re.IGNORECASE)
_DENSE_CHILD = re.compile(r"dense_?layer_?\d+", re.IGNORECASE)
_SOURCE = "_converted_from"
_STRUCTURE = ("_modules", "_parameters", "_buffers")
_FLAGS = ("training", "_is_full_backward_hook")


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


@dataclass(frozen=True)
class _Source:
    """What a replacement came from: enough to make it again around the children of that moment."""

    cls: type[nn.Module]
    attributes: dict[str, Any]


class Conversion:
    """Phase one, done by the constructor. `apply` is phase two."""

    def __init__(self, model: nn.Module, memory: str = "recompute") -> None:
        if memory not in MEMORY_MODES:
            raise ValueError(f"memory must be 'recompute' or 'store', got {memory!r}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.report = Report()
        self._memory = memory
        self._visited: dict[int, nn.Module] = {}
        self._swaps: list[tuple[nn.Module, str, nn.Module]] = []
        self._replaced: list[tuple[nn.Module, nn.Module]] = []
        self._modes: list[EfficientDenseBlock] = []
        self._root = self._visit(model, "")

    def apply(self) -> nn.Module:
        """Puts the replacements in place and returns the model (the replacement, where the model
        itself is a block)."""
        for block in self._modes:
            block.memory = self._memory
        for source, replacement in self._replaced:
            _take_over(source, replacement)
        for parent, name, replacement in self._swaps:
            parent._modules[name] = replacement
        return self._root

    def _note(self, path: str, module: nn.Module, outcome: str, reason: str = "") -> None:
        self.report.entries.append(Entry(path, qualified_name(type(module)), outcome, reason))

    def _visit(self, module: nn.Module, path: str) -> nn.Module:
        """The module's replacement, or the module itself."""
        if id(module) not in self._visited:
            self._visited[id(module)] = self._convert(module, path)
        return self._visited[id(module)]

    def _convert(self, module: nn.Module, path: str) -> nn.Module:
        if isinstance(module, EfficientDenseBlock):
            self._note(path, module, "already")
            self._modes.append(module)
            return module
        adapter = find_adapter(module)
        if adapter is not None:
            return self._build(module, path, adapter)
        reason = _foreign(module)
        if reason:
            self._note(path, module, "refused", reason)
            return module
        return self._descend(module, path)

    def _descend(self, module: nn.Module, path: str) -> nn.Module:
        """Converts the children; the `features` Sequential itself, too, around converted ones."""
        changed = {}
        for name, child in module._modules.items():
            if child is not None:
                replacement = self._visit(child, f"{path}.{name}" if path else name)
                if replacement is not child:
                    changed[name] = replacement
        if changed and torchvision_tree.is_features(module):
            children = {**module._modules, **changed}

            def build(source: nn.Module, memory: str) -> nn.Module:
                inner = nn.Sequential()
                for name, child in children.items():
                    inner.add_module(name, child)
                inner.training = source.training
                return torchvision_tree.build_features(inner)

            adapter = Adapter(build, torchvision_tree.probe_features, required=False)
            replacement = self._build(module, path, adapter)
            if replacement is not module:
                return replacement
        self._swaps += [(module, name, replacement) for name, replacement in changed.items()]
        return module

    def _build(self, module: nn.Module, path: str, adapter: Adapter) -> nn.Module:
        try:
            check_kinds(module)
            if "forward" in module.__dict__:
                raise Unsupported("its forward was replaced")
            replacement = adapter.build(module, self._memory)
            remark = check_replacement(module, replacement, adapter.probe)
        except Unsupported as reason:
            self._note(path, module, "refused" if adapter.required else "left", str(reason))
            return module
        self._note(path, module, "converted", remark)
        self._replaced.append((module, replacement))
        return replacement


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


def _take_over(source: nn.Module, replacement: nn.Module) -> None:
    """Hooks (the very dictionaries, so that their handles still remove them), training flag and
    attributes of the source, and what is needed to bring it back."""
    own = replacement.__dict__
    for name, value in source.__dict__.items():
        if name in _STRUCTURE:
            continue
        if "_hooks" in name:
            value.update(own.get(name, {}))
        elif name in own and name not in _FLAGS:
            continue
        own[name] = value
    attributes = {k: v for k, v in source.__dict__.items() if k not in _STRUCTURE}
    own[_SOURCE] = _Source(type(source), attributes)


def convert(model: nn.Module, memory: str = "recompute", *, strict: bool = True) -> nn.Module:
    """Makes every dense block of a model run in the least memory; in place, same results.

    Parameters, buffers, their names, order and identity, hooks and training flags stay; optimisers
    made before go on working. Converting again only sets the memory mode. The report is logged to
    "densenet_efficient.convert" at level INFO.

    Args:
        model: torchvision's DenseNet, or any module that contains its blocks, or blocks that an
            adapter is registered for.
        memory: "recompute" keeps only each block's output for the backward pass, "store" the
            bottlenecks too.
        strict: False converts what can be converted and leaves the rest as it is.

    Returns:
        The model (where the model itself is a block: its replacement).

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
    converted = conversion.apply()
    logger.info("%s", report)
    return converted


def inspect_conversion(model: nn.Module, memory: str = "recompute") -> Report:
    """What `convert` would do, self-checks included; the model is not changed."""
    return Conversion(model, memory).report


def unconvert(model: nn.Module) -> nn.Module:
    """Puts the modules back that `convert` replaced, around their present children; in place,
    returning the model. Modules that were built efficient stay."""
    restored: dict[int, nn.Module] = {}

    def restore(module: nn.Module) -> nn.Module:
        if id(module) not in restored:
            restored[id(module)] = module
            for name, child in module._modules.items():
                if child is not None:
                    module._modules[name] = restore(child)
            source = module.__dict__.get(_SOURCE)
            if source is not None:
                restored[id(module)] = _make_again(module, source)
        return restored[id(module)]

    return restore(model)


def _make_again(module: nn.Module, source: _Source) -> nn.Module:
    original = source.cls.__new__(source.cls)
    original.__dict__.update(source.attributes)
    for name in _STRUCTURE:
        original.__dict__[name] = module.__dict__[name]
    original.__dict__["training"] = module.training
    return original
