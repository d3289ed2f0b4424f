"""Where the classes of a library keep a layer's modules: all that differs between most of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..nn.layers import LayerParts
from ..nn.transition import TransitionParts
from .adapters import Adapter, block_adapter, qualified_name, transition_adapter
from .checks import Unsupported, check_relu

_ELEMENTWISE = (nn.Dropout,)
_CHANNELWISE = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def find(module: Any, path: str) -> Any:
    """The attribute at a dotted path, such as "layers.norm1" or "net.0"; None where there is
    none."""
    for name in path.split("."):
        children = module._modules
        module = children[name] if name in children else getattr(module, name, None)
        if module is None:
            return None
    return module


@dataclass(frozen=True)
class LayerNames:
    """The paths of a layer's modules; called with a layer, its parts.

    norm2, conv2: of a bottleneck layer; a layer without them is a plain one. relus: of the ReLU
    modules; none where forward or the norms rectify. drop: a dropout module behind the last
    convolution, or its rate as a number; may be absent. bottleneck_drop: likewise, behind conv1.
    tail: of what stands in the place of conv2, and tail_convolution of the convolution in it that
    has as many outputs.
    """

    norm1: str
    conv1: str
    norm2: str = ""
    conv2: str = ""
    relus: tuple[str, ...] = ()
    drop: str = ""
    bottleneck_drop: str = ""
    tail: str = ""
    tail_convolution: str = ""

    def __call__(self, layer: nn.Module) -> LayerParts:
        """The layer's parts. AttributeError where norm1 or conv1 is missing."""
        norm2 = find(layer, self.norm2) if self.norm2 else None
        conv2 = find(layer, self.conv2) if self.conv2 else None
        drop = find(layer, self.drop) if self.drop else None
        inner = find(layer, self.bottleneck_drop) if self.bottleneck_drop else None
        modules = [found for found in (drop, inner) if isinstance(found, nn.Module)]
        return LayerParts(
            find(layer, self.norm1),
            find(layer, self.conv1),
            norm2,
            conv2,
            _rate(drop),
            any(isinstance(module, _CHANNELWISE) for module in modules),
            0.0 if norm2 is None else _rate(inner),
            modules[0].training if modules else None,
            find(layer, self.tail) if self.tail else None,
            find(layer, self.tail_convolution).out_channels if self.tail else 0,
        )

    def check(self, name: str, layer: nn.Module) -> None:
        """Raises `Unsupported` unless the layer holds these modules and no others, its activations
        are ReLU and its dropouts PyTorch's."""
        paths = [self.norm1, self.conv1, *self.relus[:1]]
        if self.norm2 and find(layer, self.norm2) is not None:
            paths += [self.norm2, self.conv2 or self.tail, *self.relus[1:]]
        expected = _modules_at(name, layer, paths)
        for path in self.relus:
            if path in paths:
                check_relu(f"{name}: {path}", expected[path])
        for path in filter(None, (self.drop, self.bottleneck_drop)):
            found = find(layer, path)
            if isinstance(found, nn.Module):
                expected[path] = found
                if type(found) not in _ELEMENTWISE + _CHANNELWISE:
                    kind = type(found).__name__
                    raise Unsupported(f"{name}: {path} is {kind}; only Dropout is supported")
        _check_no_others(name, layer, expected)


@dataclass(frozen=True)
class TransitionNames:
    """The paths of a transition's modules; called with a transition, its parts.

    relu: "" where forward or the norm rectifies. pool: "" where forward pools. drop: a dropout's
    rate, or its module; may be absent.
    """

    norm: str
    conv: str
    pool: str = ""
    relu: str = ""
    drop: str = ""

    def __call__(self, transition: nn.Module) -> TransitionParts:
        """The transition's parts."""
        pool = find(transition, self.pool) if self.pool else None
        drop = _rate(find(transition, self.drop)) if self.drop else 0.0
        return TransitionParts(find(transition, self.norm), find(transition, self.conv), pool, drop)

    def check(self, name: str, transition: nn.Module) -> None:
        """Raises `Unsupported` unless the transition holds these modules and no others, and its
        activation is ReLU."""
        paths = list(filter(None, (self.norm, self.relu, self.conv, self.pool)))
        expected = _modules_at(name, transition, paths)
        if self.relu:
            check_relu(self.relu, expected[self.relu])
        drop = find(transition, self.drop) if self.drop else None
        if isinstance(drop, nn.Module):
            expected[self.drop] = drop
        _check_no_others(name, transition, expected)


def _rate(dropout: Any) -> float:
    """Of a dropout module, a number, or None."""
    return float(getattr(dropout, "p", dropout) or 0.0)


def _modules_at(name: str, module: nn.Module, paths: list[str]) -> dict[str, nn.Module]:
    found = {path: find(module, path) for path in paths}
    missing = [path for path, inner in found.items() if not isinstance(inner, nn.Module)]
    if missing:
        raise Unsupported(
            f"{name} is {type(module).__name__} without {', '.join(missing)}; expected "
            f"{', '.join(paths)}"
        )
    return found


def _check_no_others(name: str, module: nn.Module, expected: dict[str, nn.Module]) -> None:
    known = {id(inner) for part in expected.values() for inner in part.modules()}
    for path, inner in module.named_modules():
        if not inner._modules and id(inner) not in known:
            raise Unsupported(
                f"{name} has children that are no part of a dense layer or transition: {path} is "
                f"{type(inner).__name__}"
            )


def named_block(names: LayerNames, layer_class: str = "", **options: Any) -> Adapter:
    """`block_adapter` for layers with these names; of one class, or derived from it without another
    forward, where layer_class is given as "package.module.Class"."""
    check = functools.partial(_check_layer, names, layer_class)
    return block_adapter(names, check=check, **options)


def named_transition(names: TransitionNames) -> Adapter:
    """`transition_adapter` for transitions with these names."""
    return transition_adapter(names, check=names.check)


def _check_layer(names: LayerNames, layer_class: str, name: str, layer: nn.Module) -> None:
    owners = [cls for cls in type(layer).__mro__ if "forward" in cls.__dict__]
    if layer_class and qualified_name(owners[0]) != layer_class:
        raise Unsupported(f"{name} is {type(layer).__name__}; expected {layer_class}")
    names.check(name, layer)
