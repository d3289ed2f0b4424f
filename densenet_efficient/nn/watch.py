"""Has anything changed inside a module since the kernels were found to compute what it does?

The kernels read parameters; they call no inner module. So whatever a user hangs on one, at any
depth (a hook, a forward of its own, a module put in its place, a parametrisation, a forward patched
on its class or in `torch.nn.functional`), must be seen before a call, and the original forward run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter, itemgetter
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Structure = tuple[tuple[str, type, "Structure"], ...]
"""Children by name, class and their own structure."""

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # a SyncBatchNorm replaces any
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_METHODS = ("forward", "__call__", "_conv_forward", "_check_input_dim")
_FORWARD = frozenset({"forward"})
_HELD = ("_parameters", "_buffers")
ORDINARY = frozenset({Tensor, nn.Parameter, type(None)})
"""What a module may hold: the kernels read its memory, whatever a subclass would make of it."""


class _Functions(NamedTuple):
    """Functions that a module of PyTorch's holds: all at once, as they were."""

    home: Any
    names: tuple[str, ...]
    look_up: Callable[[Any], Any]
    found: Any


class _Methods(NamedTuple):
    """The methods of a class that PyTorch calls, and those of classes of other libraries, which its
    forward may call: all at once, as they were. own: what an instance must not have of its own, all
    but `__call__`, which Python looks up in the class alone."""

    look_up: Callable[[type], Any]
    found: Any
    own: frozenset[str]


def _functions_of(home: Any, names: str) -> _Functions:
    look_up = itemgetter(*names.split())
    return _Functions(home, tuple(names.split()), look_up, look_up(vars(home)))


_functions = (
    _functions_of(
        F,
        "batch_norm relu leaky_relu dropout dropout2d dropout3d conv1d conv2d conv3d "
        "avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d",
    ),
    _functions_of(
        torch,
        "batch_norm relu relu_ dropout feature_dropout conv1d conv2d conv3d cat "
        "max_pool1d max_pool2d max_pool3d",
    ),
)
_methods: dict[type, _Methods] = {}
_compared: list[tuple[Callable[[Any], Any], Any, Any]] = [
    (functions.look_up, vars(functions.home), functions.found) for functions in _functions
]
"""All of it: how to look it up, where, and what was found."""


def own_members(cls: type) -> Iterator[tuple[str, Any]]:
    """What a class and those that it derives from define, as far as they are not PyTorch's."""
    for base in cls.__mro__:
        if base is not object and not base.__module__.startswith("torch."):
            yield from vars(base).items()


def _methods_of(cls: type) -> _Methods:
    own = [name for name, value in own_members(cls) if isinstance(value, FunctionType)]
    names = (*_METHODS, *own)
    look_up = attrgetter(*(name for name in names if hasattr(cls, name)))
    return _Methods(look_up, look_up(cls), frozenset(names) - {"__call__"})


_synchronised = _methods_of(nn.SyncBatchNorm)  # looked at where there is one


def know(cls: type) -> None:
    """Takes the methods of a class as they are now for its own."""
    if cls not in _methods:
        found = _synchronised if cls is nn.SyncBatchNorm else _methods_of(cls)
        _compared.append((found.look_up, cls, found.found))  # another thread's patch() goes over it
        _methods[cls] = found


for _kind in ("Conv{}d", "BatchNorm{}d", "AvgPool{}d", "MaxPool{}d", "ReLU"):
    for _name in {_kind.format(dims) for dims in (1, 2, 3)}:
        know(getattr(nn, _name))


def know_all(structure: Structure) -> None:
    """`know` of every class in a structure."""
    for _, cls, inner in structure:
        know(cls)
        know_all(inner)


def structure_of(children: Iterable[tuple[str, nn.Module]]) -> Structure:
    """What `change` compares with: the tree of modules as it is now."""
    found = []
    for name, child in children:
        know(type(child))
        found.append((name, type(child), structure_of(child.named_children())))
    return tuple(found)


def patch() -> str | None:
    """What somebody replaced in PyTorch, or in a class that a watched module has, and the kernels
    would not call; None where there is nothing."""
    try:
        for look_up, home, found in _compared:
            if look_up(home) != found:
                break
        else:
            return None
    except (AttributeError, KeyError):
        pass
    return _patch_in_words()


def _patch_in_words() -> str | None:
    for home, names, _, found in _functions:
        for name, function in zip(names, found, strict=True):
            if vars(home).get(name) is not function:
                return f"{home.__name__}.{name} was replaced"
    for cls, methods in list(_methods.items()):  # to which another thread may add
        try:
            if methods.look_up(cls) == methods.found:
                continue
        except AttributeError:
            pass
        return f"a method of {cls.__name__} was replaced"
    return None


def own_change(module: nn.Module) -> str | None:
    """What one module carries that the kernels would not call, in words that follow its name."""
    attributes = module.__dict__
    for name in HOOKS:
        if attributes.get(name):
            return "carries a hook"
    methods = _methods.get(type(module))
    names = _FORWARD if methods is None else methods.own
    if not attributes.keys().isdisjoint(names):
        return f"has a {next(name for name in attributes if name in names)} of its own"
    for held in _HELD:
        for name, tensor in attributes.get(held, {}).items():
            if type(tensor) not in ORDINARY:
                return f"has a {type(tensor).__name__} as its {name}"
    if attributes.get("_compiled_call_impl") is not None:
        return "was compiled by itself"
    return None


def change(
    children: dict[str, nn.Module | None], expected: Structure, where: str = ""
) -> str | None:
    """What differs from the expected structure, or is carried by a module of it, in words; None
    where nothing does. Reads no parameter."""
    if len(children) != len(expected):
        names = ", ".join(children)
        return (
            f"{where or 'the module'} has {len(children)} children ({names}), not {len(expected)}"
        )
    for (name, child), (known, cls, inner) in zip(children.items(), expected, strict=True):
        path = f"{where}.{name}" if where else name
        if name != known:
            return f"{path} is where {known} was"
        if type(child) is not cls:
            if type(child) is not nn.SyncBatchNorm or cls not in _BATCH_NORMS:
                return f"{path} was replaced by a {type(child).__name__}"
            know(nn.SyncBatchNorm)
        assert child is not None
        reason = own_change(child)
        if reason is not None:
            return f"{path} {reason}"
        if inner or child._modules:
            reason = change(child._modules, inner, path)
            if reason is not None:
                return reason
    return None
