"""Options and their checks: each is a value and its range, stated once.

Every check returns the value in its own type, or raises ValueError naming the option, what was
expected and what came; TypeError where it is no module, mapping or function at all.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

AUTO = "auto"
MEMORY_MODES = (AUTO, "recompute", "store")
"""What a dense block keeps for the backward pass: its output, or the bottlenecks, too, or as many
of these as the network's peak has room for, see `nn.auto_memory`."""


def check_memory(value: Any) -> str:
    """One of `MEMORY_MODES`."""
    if value not in MEMORY_MODES:
        raise ValueError(f"memory must be 'auto', 'recompute' or 'store', got {value!r}")
    return value


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def check_count(name: str, value: Any, minimum: int = 1) -> int:
    """value as an int of at least `minimum`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        raise ValueError(
            f"{name} must be an integer of at least {minimum}, got {value!r}"
        ) from None
    if count < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    return count


def check_number(name: str, value: Any, expected: str, low: float, high: float) -> float:
    """value as a finite float in [low, high]; `expected` says so in words."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and low <= number <= high):
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return number


def check_drop_rate(value: Any) -> float:
    """A dropout probability in [0, 1]."""
    return check_number("drop_rate", value, "a probability between 0 and 1", 0.0, 1.0)


def check_compression(value: Any) -> float:
    """The share of channels a transition keeps, theta in arXiv 1608.06993: in (0, 1]."""
    expected = "above 0 and at most 1"
    return check_number("compression", value, expected, math.nextafter(0.0, 1.0), 1.0)


def check_block_config(value: Any) -> tuple[int, ...]:
    """The number of layers of every block: a non-empty sequence of positive integers."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or len(value) == 0:
        raise ValueError(
            f"block_config must be a non-empty sequence with the number of layers of every block, "
            f"got {value!r}"
        )
    return tuple(check_count(f"block_config[{i}]", layers) for i, layers in enumerate(value))


def check_sizes(name: str, value: Any, expected: str) -> tuple[int, ...]:
    """A shape of positive sizes; `expected` says of what."""
    try:
        if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
            raise TypeError
        sizes = tuple(operator.index(size) for size in value)
    except TypeError:
        raise ValueError(f"{name} must be {expected}, got {value!r}") from None
    if not sizes or min(sizes) < 1:
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return sizes


def check_module(name: str, value: Any) -> None:
    """TypeError unless it is a module."""
    if not isinstance(value, nn.Module):
        kind = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise TypeError(f"{name} must be a torch.nn.Module, got {kind}")


def check_modules(name: str, value: Any, parts: Callable[[Any], object]) -> None:
    """TypeError unless it maps names to modules that `parts` can read, ValueError where it is
    empty."""
    if not isinstance(value, (Mapping, nn.ModuleDict)):
        raise TypeError(f"{name} must be modules by name, got {type(value).__name__}")
    if not value:
        raise ValueError(f"{name} must hold at least one dense layer, got none")
    for key, module in value.items():
        check_module(f"{name}[{key!r}]", module)
        try:
            parts(module)
        except AttributeError as error:
            raise TypeError(f"{name}[{key!r}] does not fit its parts: {error}") from error


def check_function(name: str, value: Any, optional: bool = False) -> None:
    """TypeError unless it can be called, or is None where that is optional."""
    if not callable(value) and not (optional and value is None):
        raise TypeError(f"{name} must be a function, got {value!r}")
