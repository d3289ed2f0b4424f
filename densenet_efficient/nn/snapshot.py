"""What a decision about modules was made from, compared with what they are now.

Looking at every module of a block, its hooks and its options, and building the specification of a
call costs more than a short kernel takes. A snapshot holds all that such a decision can have read;
the next call compares it, at a fraction of the cost, and decides anew where anything differs.
"""

from __future__ import annotations

import copy
import enum
import functools
from collections.abc import Callable, Iterable
from operator import attrgetter
from types import FunctionType
from typing import Any, NamedTuple

from torch import Tensor, nn

from .watch import HOOKS, ORDINARY, own_members

_STANDARD = frozenset(vars(nn.Module())) - {"training"}
"""What every module has; of it hooks, children, parameters and buffers are compared one by one."""

OWN = "_efficient"
"""Where a module of ours keeps what is not compared."""

_METHODS = (FunctionType, staticmethod, classmethod)
_PLAIN = (bool, int, float, str, type(None))
_KINDS = tuple(ORDINARY - {type(None)})


class _Rule(enum.IntEnum):
    """How an attribute is compared; see ``csrc/snapshot.h``."""

    ANYTHING = 0
    EQUAL = 1
    EMPTY = 2
    VALUES = 3
    TENSORS = 4


_RULES = {
    **dict.fromkeys(_STANDARD, _Rule.ANYTHING),
    **dict.fromkeys(HOOKS, _Rule.EMPTY),
    "_modules": _Rule.VALUES,
    "_parameters": _Rule.TENSORS,
    "_buffers": _Rule.TENSORS,
}


_one_of_bytes = functools.cache(bytes)

_Pattern = tuple[tuple[Any, ...], tuple[Any, ...]]
"""What is compared of a module's attributes, and with what; see ``csrc/snapshot.h``."""


class _Shared(NamedTuple):
    """What a class holds for all of its instances."""

    cls: type
    values_of: Callable[[type], Any]
    values: Any


class Snapshot:
    """A module and those inside it, as they were when the snapshot was taken.

    Compared are classes, children, hooks, plain attributes (numbers, texts and sequences of them)
    of modules and their classes, names of parameters and buffers, and which of these are None.
    """

    def __init__(
        self,
        modules: list[nn.Module],
        patterns: list[_Pattern],
        shared: list[_Shared],
        compare: Callable[..., list[Tensor | None] | None],
    ) -> None:
        self._shared, self._compare = shared, compare
        self._entries = tuple(
            part
            for module, pattern in zip(modules, patterns, strict=True)
            for part in (module, type(module), *pattern)
        )
        places = (
            (module, name)
            for module in modules  # several of a module that stands in several places
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
            if tensor is not None
        )
        self._place: dict[tuple[nn.Module | None, str], int] = {
            of: place for place, of in enumerate(places)
        }

    @classmethod
    def take(cls, root: nn.Module, watched: Iterable[nn.Module | None]) -> Snapshot | None:
        """Of a module, without its own hooks, and of those of its children that are watched, with
        all inside. None where one or its class has an attribute that cannot be compared, so that a
        decision may depend on what no snapshot shows, and where nothing compiled compares."""
        compare = _comparison()
        modules: list[nn.Module] = []
        patterns: list[_Pattern] = []
        known: dict[tuple[int, ...], tuple[Any, ...]] = {}

        def one(parts: Iterable[Any]) -> tuple[Any, ...]:
            """A tuple, the same one for the same objects."""
            found = tuple(parts)
            return known.setdefault(tuple(map(id, found)), found)

        def add(module: nn.Module, inside: Iterable[nn.Module | None], is_root: bool) -> bool:
            pattern = _pattern(module, is_root, one)
            if pattern is None:
                return False
            modules.append(module)
            patterns.append(pattern)
            return all(
                child is not None and add(child, child._modules.values(), False) for child in inside
            )

        if compare is None or not add(root, watched, True):
            return None
        shared = list(filter(None, map(_shared_of, set(map(type, modules[1:])))))
        if not all(_is_plain(one.values) for one in shared):
            return None
        return cls(modules, patterns, copy.deepcopy(shared), compare)

    def place(self, module: nn.Module | None, name: str) -> int:
        """Where `tensors` has a parameter or buffer; -1, where it has None, if there is no module,
        or a plain attribute of the name."""
        return self._place.get((module, name), -1)

    def tensors(self) -> list[Tensor | None] | None:
        """The parameters and buffers of all modules as they are now, and None at the end; None
        where anything that is compared is no longer what it was."""
        try:
            if any(values_of(cls) != values for cls, values_of, values in self._shared):
                return None
            found = self._compare(self._entries, _KINDS)
        except (AttributeError, RuntimeError, ValueError):  # gone, or an array now
            return None
        if found is not None:
            found.append(None)
        return found


@functools.cache
def _comparison() -> Callable[..., list[Tensor | None] | None] | None:
    """The compiled comparison; None where it is not built."""
    try:
        from .. import _module
    except ImportError:
        return None
    return _module.tensors_if_unchanged


def _pattern(
    module: nn.Module, is_root: bool, one: Callable[[Iterable[Any]], tuple[Any, ...]]
) -> _Pattern | None:
    """What a module holds, as the comparison takes it; None where that cannot be compared. one:
    what makes the tuples."""
    rules: list[_Rule] = []
    values: list[Any] = []
    for name, value in module.__dict__.items():
        rule = _RULES.get(name, _Rule.EQUAL)
        if is_root and (name == OWN or rule is _Rule.EMPTY):
            rule = _Rule.ANYTHING
        rules.append(rule)
        if rule is _Rule.EQUAL:
            if not _is_plain(value):
                return None
            values.append(copy.deepcopy(value))
        elif rule is _Rule.VALUES:
            values.append(one(part for item in value.items() for part in item))
        elif rule is _Rule.TENSORS:
            held = ((key, tensor is not None) for key, tensor in value.items())
            values.append(one(part for item in held for part in item))
    return one((*module.__dict__, _one_of_bytes(tuple(rules)))), one(values)


def _is_plain(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    return type(value) in _PLAIN


def _shared_of(cls: type) -> _Shared | None:
    """What a class holds besides methods; None where it has nothing under a public name."""
    found = {
        name: None
        for name, value in own_members(cls)
        if not (name.startswith("_") or isinstance(value, _METHODS))
    }
    if not found:
        return None
    values_of = attrgetter(*found)
    return _Shared(cls, values_of, values_of(cls))
