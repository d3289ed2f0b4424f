"""Efficient classes of other libraries' modules: made at run time, from an execution and the class
of the module, and pickled by those two."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, TypeVar, cast

from torch import nn

from .execution import Efficient

E = TypeVar("E", bound=Efficient)


class _Made(Efficient):
    """What made classes add: they are pickled, and copied, by what they are made of."""

    execution: type[Efficient]

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = tuple(super().__reduce_ex__(protocol))
        return _new, (self.execution, self.original_class), *state


def _children(self: Any, index: Any) -> nn.Module:
    """Children of a Sequential by index; several as a Sequential of the class it was."""
    if isinstance(index, slice):
        return self.original_class(OrderedDict(list(self._modules.items())[index]))
    return nn.Sequential.__getitem__(self, index)


_CLASSES: dict[tuple[type, type], type[Efficient]] = {}


def efficient_class(execution: type[Efficient], source: type[nn.Module]) -> type[Efficient]:
    """The class of a module of class ``source`` that runs by ``execution``.

    It derives from both: an instance is still a ``source``, whose forward it runs where it must.
    """
    if (execution, source) in _CLASSES:
        return _CLASSES[execution, source]
    name = f"Efficient{source.__name__.lstrip('_')}"
    if source.__name__ == "Sequential":
        name = execution.__name__
    attributes: dict[str, Any] = {
        "original_class": source,
        "execution": execution,
        "__module__": __name__,
    }
    if getattr(source, "__getitem__", None) is nn.Sequential.__getitem__:
        attributes["__getitem__"] = _children
    made = type(name, (_Made, execution, source), attributes)
    return _CLASSES.setdefault((execution, source), made)


def _new(execution: type[Efficient], source: type[nn.Module]) -> nn.Module:
    cls = efficient_class(execution, source)
    return cls.__new__(cls)


def efficient_view(source: nn.Module, execution: type[E]) -> E:
    """The module once more, with the efficient class and the source's very children, parameters,
    buffers and attributes; the source is untouched, and `become` makes it what the view is."""
    cls = efficient_class(execution, type(source))
    view = cls.__new__(cls)
    view.__dict__.update(source.__dict__)
    return cast(E, view)


def become(source: nn.Module, view: Efficient) -> None:
    """Makes the source what its view is, in place: it stays the same object."""
    source.__dict__["_efficient"] = view._efficient
    source.__class__ = type(view)


def is_made(module: nn.Module) -> bool:
    """Whether the module was made efficient in place (and not built so)."""
    return isinstance(module, _Made) and type(module).__module__ == __name__


def unmake(module: nn.Module) -> None:
    """Undoes `become`."""
    cls = module.original_class
    del module.__dict__["_efficient"]
    module.__class__ = cls  # type: ignore[assignment]
