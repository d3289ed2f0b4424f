"""What an ordinary Sequential is: its forward is known, so its children say everything, whoever
owns them. The `features` from the first convolution over the blocks to the last norm; layers that
return their input with their new channels, one after the other; a transition."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..nn.classes import efficient_view
from ..nn.dense_block import DenseBlockExecution
from ..nn.execution import Efficient
from ..nn.features import EfficientFeatures
from ..nn.layers import CONVOLUTIONS, per_axis
from ..nn.norms import includes_relu, is_batch_norm
from ..nn.stage import StageExecution
from ..nn.transition import TransitionParts, is_pool_by_two
from .adapters import (
    Adapter,
    LayerAdapter,
    block_adapter,
    check_layers,
    find_adapter,
    transition_adapter,
)
from .checks import convolution_dims, input_channels, plain_type, random_probe


def is_ordinary(module: nn.Module) -> bool:
    """Whether the module's forward is that of a Sequential."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def is_features(module: nn.Module) -> bool:
    """Whether the module is an ordinary Sequential that begins with a convolution."""
    first: Any = next(iter(module._modules.values()), None)
    return type(module) is nn.Sequential and plain_type(first) in CONVOLUTIONS


def view_features(features: nn.Module, children: dict[str, nn.Module | None]) -> Efficient:
    """The executor over children that are already efficient where they can be."""
    view = efficient_view(features, EfficientFeatures)
    view.__dict__["_modules"] = children
    view._adopt()
    return view


def probe_features(children: dict[str, nn.Module | None]) -> Tensor:
    """An input large enough for every pooling: all children but blocks, norms and activations may
    halve the image."""
    first, *others = children.values()
    assert isinstance(first, CONVOLUTIONS)
    halvings = int(max(per_axis(first.stride, 1)) > 1) + sum(
        not isinstance(child, (DenseBlockExecution, nn.ReLU)) and not is_batch_norm(child)
        for child in others
    )
    return random_probe(input_channels(first), convolution_dims(first), 2**halvings + 1)


def find_run(sequence: nn.Module) -> tuple[int, LayerAdapter] | None:
    """Where in a Sequential the layers begin that end it, all of one adapter, and that adapter."""
    if not is_ordinary(sequence):
        return None
    assert isinstance(sequence, nn.Sequential)
    first, found = len(sequence), None
    for child in reversed(sequence):
        adapter = find_adapter(child)
        if not isinstance(adapter, LayerAdapter) or found not in (None, adapter):
            break
        first, found = first - 1, adapter
    return None if found is None else (first, found)


def run_adapter(
    first: int, adapter: LayerAdapter, children: dict[str, nn.Module | None]
) -> Adapter:
    """Of a Sequential whose layers begin at child ``first``; children: all of them, those in front
    of the layers converted already."""
    layers = functools.partial(_children_from, first)
    if first == 0:
        return block_adapter(
            adapter.parts, check=adapter.check, layers=layers, newest_first=adapter.newest_first
        )

    def view(sequence: nn.Module, memory: str) -> Efficient:
        check_layers(layers(sequence), adapter.parts, adapter.check)
        found = efficient_view(sequence, StageExecution)
        found.__dict__["_modules"] = children
        found._adopt(adapter.parts, memory, layers, newest_first=adapter.newest_first)
        return found

    def probe(sequence: nn.Module) -> Tensor:
        norm: Any = next(module for module in sequence.modules() if is_batch_norm(module))
        layer = adapter.parts(next(iter(layers(sequence).values())))
        return random_probe(input_channels(norm), convolution_dims(layer.conv1), 10)

    return Adapter(view, probe)


def _children_from(first: int, sequence: nn.Module) -> Mapping[str, nn.Module]:
    return dict(list(sequence.named_children())[first:])


def is_transition(sequence: nn.Module) -> bool:
    """Whether an ordinary Sequential is norm, ReLU (unless the norm includes it), 1x1 convolution
    and average pooling by 2, as the transitions that have no class of their own."""
    children: list[Any] = list(sequence.children())
    if not is_ordinary(sequence) or len(children) not in (3, 4):
        return False
    norm, *relu, conv, pool = children
    return (
        is_batch_norm(norm)
        and [type(module) for module in relu] == ([] if includes_relu(norm) else [nn.ReLU])
        and type(conv) in CONVOLUTIONS
        and is_pool_by_two(pool)
    )


def transition_parts(sequence: nn.Module) -> TransitionParts:
    """The parts of such a transition."""
    norm, *_, conv, pool = sequence.children()
    return TransitionParts(norm, conv, pool)  # type: ignore[arg-type]


TRANSITION = transition_adapter(transition_parts)
