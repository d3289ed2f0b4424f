"""A wrong use of the public interface, and what must hold of it: the documented exception, a
message that names the cause, and nothing changed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import densenet_efficient as de
from tests.support.networks import network

NOT_MODELS: tuple[Any, ...] = (None, "densenet121", 3, {"state": 1}, nn.Conv2d)
"""The last is a class."""

Call = Callable[..., object]
Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class WrongUse:
    """group and what name it. call: does it, with a model where `model` builds one. error: the
    exact class that is documented; message: a pattern that what it says must match."""

    group: str
    what: str
    call: Call
    error: type[BaseException]
    message: str
    model: Build | None = None

    def __str__(self) -> str:
        return f"{self.group}: {self.what}"


def check(use: WrongUse, folder: Path) -> None:
    """Fails unless the use is refused as documented and leaves the model, torch's random state and
    the files in `folder`, the current one, as they were."""
    arguments = () if use.model is None else (use.model(),)
    before = [_state(model) for model in arguments], torch.get_rng_state(), _files(folder)
    with pytest.raises(use.error, match=use.message) as caught:
        use.call(*arguments)
    assert type(caught.value) is use.error, repr(caught.value)
    after = [_state(model) for model in arguments], torch.get_rng_state(), _files(folder)
    assert before[0] == after[0], "the model changed"
    assert torch.equal(before[1], after[1]), "torch's random state changed"
    assert before[2] == after[2], "files changed"


def _state(model: nn.Module) -> list[Any]:
    """Every module's class, attributes and hooks; every parameter, buffer and gradient, bit by
    bit."""
    modules: list[Any] = []
    for name, m in model.named_modules():
        held = sorted((key, id(value)) for key, value in vars(m).items())
        hooks = [list(value) for key, value in vars(m).items() if key.endswith("_hooks")]
        modules.append((name, type(m), held, hooks))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in tensors.items():
        modules.append((name, id(value), value.requires_grad, _bits(value), _bits(value.grad)))
    return modules


def _bits(value: Tensor | None) -> Any:
    if value is None or torch.nn.parameter.is_lazy(value) or value.is_meta:
        return None
    return value.dtype, value.shape, value.detach().contiguous().numpy().tobytes()


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@functools.cache
def _plain() -> nn.Module:
    return network()


def plain() -> nn.Module:
    """torchvision's network, small."""
    return copy.deepcopy(_plain())


@functools.cache
def _converted() -> nn.Module:
    return de.convert(network())


def converted() -> nn.Module:
    """The same, converted."""
    return copy.deepcopy(_converted())


def block() -> nn.Module:
    """A block of two layers, from 8 to 16 channels."""
    return de.EfficientDenseBlock(2, 8, 4, 4, 0.0)


def each(
    group: str,
    name: str,
    call: Call,
    values: Iterable[Any],
    error: type[BaseException],
    message: str,
    model: Build | None = None,
) -> Iterator[WrongUse]:
    """call(value), or call(model, value), with each value, which `name` has a place for."""
    for value in values:

        def use(*models: nn.Module, value: Any = value) -> object:
            return call(*models, value)

        yield WrongUse(group, name.format(value), use, error, message, model)


def options(
    group: str, name: str, call: Call, base: dict[str, Any], wrong: dict[str, tuple[Any, ...]]
) -> Iterator[WrongUse]:
    """call(**base) with one option at a time set to what it must not be; ValueError names it."""
    for option, values in wrong.items():
        for value in values:
            yield WrongUse(
                group,
                f"{name}({option}={value!r})",
                functools.partial(call, **{**base, option: value}),
                ValueError,
                rf"{option}(\[\d\])?( must|:)",
            )
