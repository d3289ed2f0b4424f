"""Adapters: how the dense blocks of other libraries are recognised and mapped.

Names do not tell in which order a block concatenates, where it drops out, or whether its input is
in its output: that is written in `forward`. So a class is matched exactly, by module and qualified
name, or by a base class whose forward it did not change, and mapped by an adapter that somebody
wrote while reading it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..nn.classes import efficient_view
from ..nn.dense_block import DenseBlockExecution, EfficientDenseBlock
from ..nn.execution import Efficient
from ..nn.layers import LayerParts
from ..nn.options import check_function
from ..nn.transition import EfficientTransition, TransitionExecution, TransitionParts
from .checks import (
    Unsupported,
    check_batch_norm,
    check_convolution,
    check_layer_parts,
    convolution_dims,
    input_channels,
    random_probe,
)

Check = Callable[[str, nn.Module], None]


@dataclass(frozen=True)
class Adapter:
    """How modules of one class become efficient ones, in place.

    view: (source, memory) -> an efficient view of the source (`nn.classes.efficient_view`); it must
        not change the source, and raises `Unsupported` for one it cannot represent.
    probe: source -> a small random input on the CPU, float32, for the numerical self-check; dtype
        and device are adapted by the caller.
    required: whether a source that cannot be converted is an error (blocks), or is left as it is
        and reported (what is around them).
    """

    view: Callable[[nn.Module, str], Efficient]
    probe: Callable[[nn.Module], Tensor]
    required: bool = True


@dataclass(frozen=True)
class LayerAdapter:
    """How layers of one class are read that return their input together with their new channels:
    the layers at the end of a `torch.nn.Sequential` are executed as a dense block.

    parts, check, newest_first: as for `block_adapter`.
    """

    parts: Callable[[nn.Module], LayerParts]
    check: Check | None = None
    newest_first: bool = False


_ADAPTERS: dict[str, Adapter | LayerAdapter] = {}


def qualified_name(cls: type) -> str:
    """ "package.module.Class", as `register_adapter` takes it."""
    return f"{cls.__module__}.{cls.__qualname__}"


def register_adapter(source: str | type[nn.Module], adapter: Adapter | LayerAdapter) -> None:
    """Makes `convert` replace modules of exactly this class.

    Args:
        source: the class, or "package.module.Class" for one that need not be importable.
        adapter: what to do with it; a later registration replaces an earlier one.

    Raises:
        TypeError: source is not a module class or a dotted name, or adapter no Adapter.
    """
    if isinstance(source, type) and issubclass(source, nn.Module):
        name = qualified_name(source)
    elif isinstance(source, str) and "." in source:
        name = source
    else:
        raise TypeError(
            "source must be a subclass of torch.nn.Module or its name 'package.module.Class', "
            f"got {source!r}"
        )
    if not isinstance(adapter, (Adapter, LayerAdapter)):
        raise TypeError(
            f"adapter must be an Adapter or a LayerAdapter, got {type(adapter).__name__}"
        )
    _ADAPTERS[name] = adapter


def find_adapter(module: nn.Module) -> Adapter | LayerAdapter | None:
    """The adapter of the module's class, or of a base class whose forward it has."""
    for base in type(module).__mro__:
        if qualified_name(base) in _ADAPTERS:
            return _ADAPTERS[qualified_name(base)]
        if "forward" in base.__dict__:
            return None
    return None


def block_adapter(
    parts: Callable[[nn.Module], LayerParts],
    *,
    check: Check | None = None,
    layers: Callable[[nn.Module], Mapping[str, nn.Module]] | None = None,
    with_input: Callable[[nn.Module], bool] | None = None,
    newest_first: bool = False,
) -> Adapter:
    """The adapter of a dense block: every layer sees the block's input and all earlier layers' new
    channels.

    Args:
        parts: layer -> its norms and convolutions; a module-level function (it is pickled with the
            block) of what the layer and its class hold, called again where that has changed.
        check: (name, layer) -> None, or raises `Unsupported`: what must hold of a layer beyond its
            parts' kinds (`check_layer_parts`) and the numerical self-check, such as its activation.
        layers: block -> its layers by name, in order; a module-level function, too. The block's
            children by default.
        with_input: block -> whether its input is part of its output; a module-level function, too.
            Always by default.
        newest_first: whether a layer's new channels stand in front of all earlier ones instead of
            after them.
    """

    check_function("parts", parts)
    for name, function in (("check", check), ("layers", layers), ("with_input", with_input)):
        check_function(name, function, optional=True)

    def layers_of(block: nn.Module) -> Mapping[str, nn.Module]:
        found = dict(block.named_children()) if layers is None else layers(block)
        if not found:
            raise Unsupported("the block has no layers")
        return found

    def view(block: nn.Module, memory: str) -> Efficient:
        check_layers(layers_of(block), parts, check)
        whole = isinstance(block, nn.ModuleDict)
        found = efficient_view(block, EfficientDenseBlock if whole else DenseBlockExecution)
        found._adopt(parts, memory, layers, with_input, newest_first)
        return found

    def probe(block: nn.Module) -> Tensor:
        first = parts(next(iter(layers_of(block).values())))
        return random_probe(input_channels(first.norm1), convolution_dims(first.conv1))

    return Adapter(view, probe)


def check_layers(
    layers: Mapping[str, nn.Module],
    parts: Callable[[nn.Module], LayerParts],
    check: Check | None,
) -> None:
    """Raises `Unsupported` for a layer that the operators do not know."""
    for name, layer in layers.items():
        if check is not None:
            check(name, layer)
        check_layer_parts(name, parts(layer))


def transition_adapter(
    parts: Callable[[nn.Module], TransitionParts], *, check: Check | None = None
) -> Adapter:
    """The adapter of a transition: norm, ReLU, 1x1 convolution, average or maximum pooling by 2.
    One that is not so is left as it is, and reported.

    Args:
        parts: transition -> its modules; a module-level function.
        check: (name, transition) -> None, or raises `Unsupported`.
    """

    def view(transition: nn.Module, memory: str) -> Efficient:
        if check is not None:
            check("the transition", transition)
        found = parts(transition)
        check_batch_norm("norm", found.norm)
        check_convolution("conv", found.conv)
        whole = isinstance(transition, nn.Sequential)
        view = efficient_view(transition, EfficientTransition if whole else TransitionExecution)
        view._adopt(parts)
        problem = view._geometry_problem()
        if problem is not None:
            raise Unsupported(problem)
        return view

    def probe(transition: nn.Module) -> Tensor:
        found = parts(transition)
        return random_probe(input_channels(found.norm), convolution_dims(found.conv))

    return Adapter(view, probe, required=False)


def refusal(reason: str, *, required: bool = True) -> Adapter:
    """The adapter of a class that is known, and not converted; required: whether that is an error,
    or the class is left as it is."""

    def view(source: nn.Module, memory: str) -> Efficient:
        raise Unsupported(reason)

    return Adapter(view, lambda source: random_probe(1, 2), required)
