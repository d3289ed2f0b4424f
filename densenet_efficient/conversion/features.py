"""The `features` of a DenseNet: an ordinary Sequential from the first convolution over the blocks
to the last norm. Its forward is Sequential's, so the children say everything, whoever owns them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..nn.classes import efficient_view
from ..nn.dense_block import DenseBlockExecution
from ..nn.execution import Efficient
from ..nn.features import EfficientFeatures
from ..nn.layers import CONVOLUTIONS
from ..nn.norms import is_batch_norm
from .checks import convolution_dims, plain_type, random_probe


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
    halvings = int(max(first.stride) > 1) + sum(
        not isinstance(child, (DenseBlockExecution, nn.ReLU)) and not is_batch_norm(child)
        for child in others
    )
    return random_probe(first.in_channels, convolution_dims(first), 2**halvings + 1)
