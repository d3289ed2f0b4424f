"""Adapters for torchvision's DenseNet and everything built of its blocks, and for our reference.

    _DenseBlock (ModuleDict)  denselayer{i}: norm1 relu1 conv1 norm2 relu2 conv2, F.dropout; a layer
                              takes all earlier outputs and returns its new channels
    _Transition (Sequential)  norm relu conv pool
    features (Sequential)     conv0 norm0 relu0 pool0 denseblock1 transition1 ... norm5

torchvision's own memory flag, per-layer checkpointing, is subsumed by the conversion.
"""

from __future__ import annotations

import re

from torch import Tensor, nn

from ..nn.classes import efficient_view
from ..nn.dense_block import DenseBlockExecution
from ..nn.execution import Efficient
from ..nn.features import EfficientFeatures
from ..nn.layers import standard_parts
from ..nn.transition import EfficientTransition, is_pool_by_two
from .adapters import (
    Adapter,
    Unsupported,
    block_adapter,
    check_batch_norm,
    check_convolution,
    check_relu,
    plain_type,
    random_probe,
    register_adapter,
)

_STAGE = re.compile(r"(denseblock|transition)\d+")
_STEM = ("norm0", "relu0", "pool0")


def _check_layer(name: str, layer: nn.Module) -> None:
    found = list(layer._modules)
    bottleneck = ["norm1", "relu1", "conv1", "norm2", "relu2", "conv2"]
    if found not in (bottleneck, bottleneck[:3]):
        raise Unsupported(
            f"{name} has children {', '.join(found)}; expected {', '.join(bottleneck)}"
        )
    for child in ("relu1", "relu2"):
        if child in found:
            check_relu(f"{name}: {child}", layer.get_submodule(child))


def _check_torchvision_layer(name: str, layer: nn.Module) -> None:
    if type(layer).__name__ != "_DenseLayer" or len(layer._modules) != 6:
        raise Unsupported(f"{name} is {type(layer).__name__}; expected torchvision's _DenseLayer")
    _check_layer(name, layer)


def _check_reference_layer(name: str, layer: nn.Module) -> None:
    if type(layer).__name__ != "DenseLayer":
        raise Unsupported(f"{name} is {type(layer).__name__}; expected DenseLayer")
    _check_layer(name, layer)


def _view_transition(transition: nn.Module, memory: str) -> Efficient:
    assert isinstance(transition, nn.Sequential)
    found = list(transition._modules)
    if found != ["norm", "relu", "conv", "pool"]:
        raise Unsupported(f"the transition has children {', '.join(found)}")
    norm, relu, conv, pool = transition
    check_batch_norm("norm", norm)
    check_relu("relu", relu)
    check_convolution("conv", conv)
    if not is_pool_by_two(pool):
        raise Unsupported(f"pool is {pool}; only an average over 2 x 2 pixels is supported")
    view = efficient_view(transition, EfficientTransition)
    view._adopt()
    return view


def _probe_transition(transition: nn.Module) -> Tensor:
    norm = transition.get_submodule("norm")
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    return random_probe(norm.num_features, 2)


def is_features(module: nn.Module) -> bool:
    """Whether the module is the `features` Sequential of a torchvision DenseNet: its forward is
    Sequential's, so the children say everything, whoever owns them."""
    names = list(module._modules)
    if type(module) is not nn.Sequential or names[:1] != ["conv0"]:
        return False
    body = names[1:]
    if tuple(body[:3]) == _STEM:
        body = body[3:]
    if body[-1:] == ["norm5"]:
        body = body[:-1]
    return bool(body) and all(_STAGE.fullmatch(name) for name in body)


def view_features(features: nn.Module, children: dict[str, nn.Module | None]) -> Efficient:
    """The executor over children that are already efficient where they can be."""
    if not any(isinstance(child, DenseBlockExecution) for child in children.values()):
        raise Unsupported("none of its blocks is converted")
    conv0 = children["conv0"]
    if conv0 is None or plain_type(conv0) is not nn.Conv2d:
        raise Unsupported(f"conv0 is {type(conv0).__name__}; expected Conv2d")
    view = efficient_view(features, EfficientFeatures)
    view.__dict__["_modules"] = children
    view._adopt()
    return view


def probe_features(features: nn.Module) -> Tensor:
    """An input just large enough for every pooling."""
    conv0 = features.get_submodule("conv0")
    assert isinstance(conv0, nn.Conv2d)
    halvings = sum(name.startswith("transition") for name in features._modules)
    size = 2 ** (halvings + (2 if "pool0" in features._modules else 0)) + 1
    return random_probe(conv0.in_channels, 2, size)


def register() -> None:
    """Registers every adapter of this file."""
    transition = Adapter(_view_transition, _probe_transition, required=False)
    blocks = {
        "torchvision.models.densenet": ("_DenseBlock", "_Transition", _check_torchvision_layer),
        "densenet_efficient.reference.modules": (
            "DenseBlock",
            "Transition",
            _check_reference_layer,
        ),
    }
    for home, (block_name, transition_name, check) in blocks.items():
        register_adapter(f"{home}.{block_name}", block_adapter(standard_parts, check=check))
        register_adapter(f"{home}.{transition_name}", transition)
