"""Adapters: how the dense blocks of other libraries are recognised and mapped.

Names do not tell in which order a block concatenates, where it drops out, or whether its input is
in its output: that is written in `forward`. So a class is matched exactly, by module and qualified
name, or by a base class whose forward it did not change, and mapped by an adapter that somebody
wrote while reading it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import type_before_parametrizations as plain_type

from ..nn.classes import efficient_view
from ..nn.dense_block import DenseBlockExecution, EfficientDenseBlock
from ..nn.execution import Efficient
from ..nn.layers import CONVOLUTIONS, LayerParts
from ..nn.norms import BATCH_NORMS


class Unsupported(ValueError):
    """Why one module cannot be converted; the message starts with a module's name."""


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


_ADAPTERS: dict[str, Adapter] = {}


def qualified_name(cls: type) -> str:
    """ "package.module.Class", as `register_adapter` takes it."""
    return f"{cls.__module__}.{cls.__qualname__}"


def register_adapter(source: str | type[nn.Module], adapter: Adapter) -> None:
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
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapter must be an Adapter, got {type(adapter).__name__}")
    _ADAPTERS[name] = adapter


def find_adapter(module: nn.Module) -> Adapter | None:
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
    check: Callable[[str, nn.Module], None] | None = None,
    layers: Callable[[nn.Module], Mapping[str, nn.Module]] | None = None,
) -> Adapter:
    """The adapter of a block that appends each layer's new channels after all earlier ones.

    Args:
        parts: layer -> its norms and convolutions; a module-level function (it is pickled with the
            block), called again whenever the layer may have changed.
        check: (name, layer) -> None, or raises `Unsupported`: what must hold of a layer beyond its
            parts' kinds (`check_layer_parts`) and the numerical self-check, such as its activation.
        layers: block -> its layers by name, in order; a module-level function, too. The block's
            children by default.
    """

    def layers_of(block: nn.Module) -> Mapping[str, nn.Module]:
        found = dict(block.named_children()) if layers is None else layers(block)
        if not found:
            raise Unsupported("the block has no layers")
        return found

    def view(block: nn.Module, memory: str) -> Efficient:
        for name, layer in layers_of(block).items():
            if check is not None:
                check(name, layer)
            check_layer_parts(name, parts(layer))
        whole = isinstance(block, nn.ModuleDict)
        found = efficient_view(block, EfficientDenseBlock if whole else DenseBlockExecution)
        assert isinstance(found, DenseBlockExecution)
        found._adopt(parts, memory, layers)
        return found

    def probe(block: nn.Module) -> Tensor:
        first = parts(next(iter(layers_of(block).values())))
        return random_probe(first.norm1.num_features, convolution_dims(first.conv1))

    return Adapter(view, probe)


def convolution_dims(convolution: nn.Module) -> int:
    """1, 2 or 3."""
    return CONVOLUTIONS.index(plain_type(convolution)) + 1


def random_probe(channels: int, dims: int, size: int = 5) -> Tensor:
    """[2, channels, size, size + 1, ...], the same numbers every time, torch's own random state
    untouched. Odd and uneven sides tell edges and axes apart."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, channels, *range(size, size + dims), generator=generator)


def check_relu(name: str, module: nn.Module) -> None:
    """Raises `Unsupported` unless the module is exactly torch's ReLU."""
    if plain_type(module) is not nn.ReLU:
        raise Unsupported(f"{name} is {type(module).__name__}; only ReLU is supported")


def check_batch_norm(name: str, module: nn.Module) -> None:
    """Raises `Unsupported` unless the module is one of torch's own batch norms."""
    if plain_type(module) not in (*BATCH_NORMS, SyncBatchNorm):
        raise Unsupported(f"{name} is {type(module).__name__}; only batch norms are supported")


def check_convolution(name: str, module: nn.Module) -> None:
    """Raises `Unsupported` unless the module is torch's own convolution, ungrouped, of stride 1."""
    if plain_type(module) not in CONVOLUTIONS:
        raise Unsupported(f"{name} is {type(module).__name__}; only convolutions are supported")
    assert isinstance(module, CONVOLUTIONS)
    if module.groups != 1 or set(module.stride) != {1} or module.padding_mode != "zeros":
        raise Unsupported(
            f"{name} has groups {module.groups}, stride {tuple(module.stride)} and padding mode "
            f"{module.padding_mode!r}; supported are 1, 1 and 'zeros'"
        )


def check_layer_parts(name: str, parts: LayerParts) -> None:
    """Raises `Unsupported`, naming the part, unless norms and convolutions are torch's own."""
    check_batch_norm(f"{name}: norm1", parts.norm1)
    check_convolution(f"{name}: conv1", parts.conv1)
    if (parts.norm2 is None) != (parts.conv2 is None):
        raise Unsupported(f"{name} has only one of norm2 and conv2")
    if parts.norm2 is not None and parts.conv2 is not None:
        check_batch_norm(f"{name}: norm2", parts.norm2)
        check_convolution(f"{name}: conv2", parts.conv2)


def check_kinds(module: nn.Module) -> None:
    """Raises `Unsupported` for what no adapter can convert: scripted, quantised or
    quantisation-aware, and uninitialised lazy modules, inside or at the top."""
    for name, inner in module.named_modules():
        where = name or type(inner).__name__
        if isinstance(inner, torch.jit.ScriptModule):
            raise Unsupported(f"{where} is a script module; convert before scripting")
        home = type(inner).__module__
        if home.startswith(("torch.ao.", "torch.nn.quantized", "torch.nn.intrinsic")) or (
            getattr(inner, "qconfig", None) is not None
        ):
            raise Unsupported(f"{where} is quantised or prepared for quantisation")
        for tensor in (*inner._parameters.values(), *inner._buffers.values()):
            if tensor is not None and is_lazy(tensor):
                raise Unsupported(f"{where} is lazy and not initialised; run one batch first")
