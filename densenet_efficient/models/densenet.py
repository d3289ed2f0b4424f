"""DenseNets built of the efficient blocks, with torchvision's constructors, tree and keys.

Huang et al., arXiv 1608.06993: the ImageNet networks of table 1, the CIFAR networks of section 3.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..nn.architecture import CONFIGURATIONS, DenseNetBase, cifar_block_config
from ..nn.auto_memory import assign
from ..nn.dense_block import EfficientDenseBlock
from ..nn.features import EfficientFeatures
from ..nn.options import check_count, check_memory
from ..nn.transition import EfficientTransition
from .pretrained import fetch_weights, load_weights, published_classes

__all__ = [
    "EfficientDenseNet",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "densenet264_k48",
    "densenet_cifar",
]


class EfficientDenseNet(DenseNetBase):
    """A DenseNet that trains in (nearly) the least memory exact back-propagation allows.

    Args:
        growth_rate: k, the channels every layer adds.
        block_config: the number of layers of every block.
        num_init_features: channels of the first convolution.
        bn_size: width of a bottleneck, in growth rates.
        drop_rate: dropout after every layer's last convolution, 0 to 1.
        num_classes: None or 0: no classifier, the pooled features come out.
        memory_efficient: accepted for torchvision's sake; the blocks always are.
        small_inputs: the CIFAR stem, one 3x3 convolution of stride 1, instead of a 7x7 convolution
            of stride 2, norm, ReLU and max-pool.
        compression: theta, the share of channels a transition keeps, above 0 and at most 1.
        bottleneck: False: layers are one 3x3 convolution.
        in_channels: channels of the input.
        memory: "recompute" keeps only the feature buffers for the backward pass, "store" the
            bottlenecks too: more memory, a little less time. "auto" keeps those bottlenecks for
            which the step's peak has room, and none without a classifier, where more may follow.

    Keyword Args:
        global_pool (bool): False: logits (or features) at every place of the last map.
        spatial_squeeze (bool): False: pooled logits keep their two places, [N, num_classes, 1, 1].
        features_only (bool): no classifier; a list of maps comes out, one for each resolution
            (`feature_info` says which).
        output_stride (int): of the last map, reached by leaving later poolings out and dilating
            the 3x3 convolutions after them (x2 for each).
        initial_output_stride (int): of the stem, 4, or 2 without its max-pooling.
        drop_everywhere (bool): dropout after every convolution but the first, as in the paper, not
            only after the last of every layer, as in torchvision.
        bias (bool): of every convolution.
        eps (float): of every norm.
        init_mode (str): "fan_in" (torchvision) or "fan_out" (the paper's CIFAR code).

    Raises:
        ValueError: an option out of its range, named.
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int = 4,
        drop_rate: float = 0.0,
        num_classes: int | None = 1000,
        memory_efficient: bool = False,
        *,
        small_inputs: bool = False,
        compression: float = 0.5,
        bottleneck: bool = True,
        in_channels: int = 3,
        memory: str = "auto",
        **options: Any,
    ) -> None:
        self._memory = check_memory(memory)
        super().__init__(
            growth_rate,
            block_config,
            num_init_features,
            bn_size,
            drop_rate,
            num_classes,
            memory_efficient,
            small_inputs=small_inputs,
            compression=compression,
            bottleneck=bottleneck,
            in_channels=in_channels,
            **options,
        )
        assign(self)

    def _make_block(self, **options: Any) -> nn.Module:
        return EfficientDenseBlock(**options, memory=self._memory)

    def _make_transition(
        self, num_input_features: int, num_output_features: int, **options: Any
    ) -> nn.Module:
        return EfficientTransition(num_input_features, num_output_features, **options)

    def _make_features(self, children: OrderedDict[str, nn.Module]) -> nn.Module:
        return EfficientFeatures(children)


def _build(name: str, weights: Any, progress: bool, options: dict[str, Any]) -> EfficientDenseNet:
    pretrained = options.pop("pretrained", None)
    if pretrained is not None:
        if weights is not None:
            raise ValueError(f"pretrained: expected without weights, got {pretrained!r} with them")
        warnings.warn(
            f"pretrained is deprecated, as in torchvision: write weights="
            f"{'DEFAULT' if pretrained else None!r}",
            DeprecationWarning,
            stacklevel=3,
        )
        weights = "DEFAULT" if pretrained else None
    if weights is None:
        return EfficientDenseNet(**CONFIGURATIONS[name], **options)
    state = fetch_weights(weights, name, progress=progress)
    classes = options.pop("num_classes", None if options.get("features_only") else 1000)
    published = published_classes(state)
    model = EfficientDenseNet(**CONFIGURATIONS[name], num_classes=published, **options)
    load_weights(model, state, strict=not options.get("features_only"), source=f"weights {weights}")
    if classes != published:
        model.reset_classifier(classes)
    return model


def densenet121(*, weights: Any = None, progress: bool = True, **options: Any) -> EfficientDenseNet:
    """DenseNet-121, 8.0 M parameters. weights: None, or what `fetch_weights` takes: "DEFAULT", an
    entry of torchvision's weights enum, a file, a URL, a repository of the Hugging Face hub; with
    another `num_classes` than theirs the classifier is fresh. options: of EfficientDenseNet;
    pretrained=True is torchvision's old way to say weights="DEFAULT", and warns."""
    return _build("densenet121", weights, progress, options)


def densenet161(*, weights: Any = None, progress: bool = True, **options: Any) -> EfficientDenseNet:
    """DenseNet-161 (k = 48), 28.7 M parameters; arguments as `densenet121`."""
    return _build("densenet161", weights, progress, options)


def densenet169(*, weights: Any = None, progress: bool = True, **options: Any) -> EfficientDenseNet:
    """DenseNet-169, 14.1 M parameters; arguments as `densenet121`."""
    return _build("densenet169", weights, progress, options)


def densenet201(*, weights: Any = None, progress: bool = True, **options: Any) -> EfficientDenseNet:
    """DenseNet-201, 20.0 M parameters; arguments as `densenet121`."""
    return _build("densenet201", weights, progress, options)


def densenet264(*, weights: Any = None, progress: bool = True, **options: Any) -> EfficientDenseNet:
    """DenseNet-264 (k = 32), 33.3 M parameters; arguments as `densenet121`."""
    return _build("densenet264", weights, progress, options)


def densenet264_k48(
    *, weights: Any = None, progress: bool = True, **options: Any
) -> EfficientDenseNet:
    """DenseNet-264 (k = 48), 72.7 M parameters; arguments as `densenet121`."""
    return _build("densenet264_k48", weights, progress, options)


def densenet_cifar(
    depth: int,
    growth_rate: int,
    bottleneck: bool = True,
    compression: float | None = None,
    num_classes: int | None = 10,
    drop_rate: float = 0.0,
    memory: str = "auto",
    **options: Any,
) -> EfficientDenseNet:
    """The CIFAR networks: three blocks, a 3x3 stem, weights drawn with fan_out.

    Args:
        depth: 6 N + 4 with bottlenecks, 3 N + 4 without.
        bottleneck: True for DenseNet-BC, whose stem has 2k channels; False for the plain DenseNet,
            whose stem has 16.
        compression: None: 0.5 with bottlenecks, 1 without, as in the paper.
        options: further options of EfficientDenseNet.

    Raises:
        ValueError: a depth that no whole number of layers gives, or a bad option.
    """
    growth_rate = check_count("growth_rate", growth_rate)
    block_config = cifar_block_config(depth, bottleneck)
    if compression is None:
        compression = 0.5 if bottleneck else 1.0
    settings: dict[str, Any] = {
        "num_init_features": 2 * growth_rate if bottleneck else 16,
        "small_inputs": True,
        "init_mode": "fan_out",
        **options,
    }
    return EfficientDenseNet(
        growth_rate=growth_rate,
        block_config=block_config,
        bottleneck=bottleneck,
        compression=compression,
        num_classes=num_classes,
        drop_rate=drop_rate,
        memory=memory,
        **settings,
    )
