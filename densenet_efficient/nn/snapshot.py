"""What a decision about modules was made from, compared with what they are now.

Looking at every module of a block, its hooks and its options, and building the specification of a
call costs more than a short kernel takes. A snapshot holds all that such a decision can have read;
the next call compares it, at a fraction of the cost, and decides anew where anything differs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from operator import attrgetter, itemgetter
from types import FunctionType
from typing import Any, NamedTuple

from torch import Tensor, nn

from .watch import ORDINARY, own_members

_STANDARD = frozenset(vars(nn.Module())) - {"training"}
"""What every module has; of it hooks, children, parameters and buffers are compared one by one."""

OWN = "_efficient"
"""Where a module of ours keeps what is not compared."""

_METHODS = (FunctionType, staticmethod, classmethod)
_PLAIN = (bool, int, float, str, type(None))


class _Entry(NamedTuple):
    """One module: what is compared, and how its tensors are read."""

    module: nn.Module
    cls: type
    watches_hooks: bool
    attributes: int  # how many
    values_of: Callable[[Any], Any]
    values: Any
    children: tuple[tuple[str, nn.Module | None], ...]
    parameters_of: Callable[[Any], tuple[Tensor | None, ...]]
    parameters: int
    buffers_of: Callable[[Any], tuple[Tensor | None, ...]]
    buffers: int


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

    def __init__(self, entries: list[_Entry], shared: list[_Shared]) -> None:
        self._entries, self._shared = entries, shared
        places = (
            (entry.module, name)
            for entry in entries  # several of a module that stands in several places
            for name in (*entry.module._parameters, *entry.module._buffers)
        )
        self._place: dict[tuple[nn.Module | None, str], int] = {
            of: place for place, of in enumerate(places)
        }
        self._absent = [tensor is None for tensor in self._read() or ()]

    @classmethod
    def take(cls, root: nn.Module, watched: Iterable[nn.Module | None]) -> Snapshot | None:
        """Of a module, without its own hooks, and of those of its children that are watched, with
        all inside. None where one or its class has an attribute that cannot be compared, so that a
        decision may depend on what no snapshot shows."""
        entries: list[_Entry] = []

        def add(module: nn.Module, inside: Iterable[nn.Module | None], is_root: bool) -> bool:
            entry = _entry(module, is_root)
            if entry is None:
                return False
            entries.append(entry)
            return all(
                child is not None and add(child, child._modules.values(), False) for child in inside
            )

        if not add(root, watched, True):
            return None
        shared = list(filter(None, map(_shared_of, {entry.cls for entry in entries[1:]})))
        if not all(_is_plain(one.values) for one in shared):
            return None
        return cls(entries, copy.deepcopy(shared))

    def place(self, module: nn.Module | None, name: str) -> int:
        """Where `tensors` has a parameter or buffer; -1, where it has None, if there is no module,
        or a plain attribute of the name."""
        return self._place.get((module, name), -1)

    def tensors(self) -> list[Tensor | None] | None:
        """The parameters and buffers of all modules as they are now, and None at the end; None
        where anything that is compared is no longer what it was."""
        try:
            found = self._read()
        except (AttributeError, KeyError, RuntimeError, ValueError):  # gone, or an array now
            return None
        if found is None or [tensor is None for tensor in found] != self._absent:
            return None
        if not ORDINARY.issuperset(map(type, found)):
            return None
        return [*found, None]

    def _read(self) -> list[Tensor | None] | None:
        found: list[Tensor | None] = []
        for kind, shared_of, shared in self._shared:
            if shared_of(kind) != shared:
                return None
        for (
            module, cls, watches_hooks, attributes, values_of, values, children, parameters_of,
            parameters, buffers_of, buffers,
        ) in self._entries:  # fmt: skip
            own = module.__dict__
            if (
                type(module) is not cls
                or len(own) != attributes
                or "forward" in own
                or values_of(own) != values
                or (
                    watches_hooks
                    and (
                        own["_forward_hooks"]
                        or own["_forward_pre_hooks"]
                        or own["_backward_hooks"]
                        or own["_backward_pre_hooks"]
                    )
                )
            ):
                return None
            inside = own["_modules"]
            if (children or inside) and tuple(inside.items()) != children:
                return None
            if parameters or own["_parameters"]:
                if len(own["_parameters"]) != parameters:
                    return None
                found += parameters_of(own["_parameters"])
            if buffers or own["_buffers"]:
                if len(own["_buffers"]) != buffers:
                    return None
                found += buffers_of(own["_buffers"])
        return found


def _entry(module: nn.Module, is_root: bool) -> _Entry | None:
    own = module.__dict__
    names = [name for name in own if name not in _STANDARD and not (is_root and name == OWN)]
    if not all(_is_plain(own[name]) for name in names):
        return None
    values_of, parameters, buffers = _reader(names), module._parameters, module._buffers
    return _Entry(
        module,
        type(module),
        not is_root,
        len(own),
        values_of,
        copy.deepcopy(values_of(own)),
        tuple(module._modules.items()),
        _reader(parameters),
        len(parameters),
        _reader(buffers),
        len(buffers),
    )


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


def _reader(names: Iterable[str]) -> Callable[[Any], tuple[Any, ...]]:
    """What takes the values of some keys out of a dictionary."""
    first, *others = names = list(names) or [""]
    if others:
        return itemgetter(*names)
    return (lambda own: (own[first],)) if first else (lambda own: ())
