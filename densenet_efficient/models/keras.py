"""DenseNets under the names and options of Keras' libraries; Keras is not needed.

`DenseNet` and `DenseNetFCN` have the arguments of the widely used keras-contrib implementations,
`DenseNet121` to `DenseNet264` those of `keras.applications`. Images are [N, C, H, W] as everywhere
in PyTorch, and logits come out: the losses of PyTorch contain the softmax.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..nn.architecture import CONFIGURATIONS, cifar_block_config
from ..nn.fully_convolutional import UPSAMPLINGS
from ..nn.options import (
    check_block_config,
    check_choice,
    check_count,
    check_number,
)
from .densenet import EfficientDenseNet
from .fc_densenet import EfficientFCDenseNet

__all__ = ["DenseNet", "DenseNet121", "DenseNet161", "DenseNet169", "DenseNet201", "DenseNet264"]
__all__ += ["DenseNetFCN", "KerasDenseNet", "KerasDenseNetFCN"]

APPLICATIONS_EPSILON = 1.001e-5
CONTRIB_EPSILON = 1.1e-5
_BELOW_ONE = math.nextafter(1.0, 0.0)


class _WeightDecay(nn.Module):
    weight_decay: float = 0.0

    def parameter_groups(self) -> list[dict[str, Any]]:
        """For an optimiser of PyTorch: what Keras' l2 regulariser does to the kernels of the
        convolutions and the classifier, and to nothing else. A penalty w * |kernel|^2 has the
        gradient 2 w kernel, which PyTorch calls a weight decay of 2 w."""
        kernels = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() <= 1]
        return [
            {"params": kernels, "weight_decay": 2 * self.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]


class KerasDenseNet(_WeightDecay, EfficientDenseNet):
    """An `EfficientDenseNet` that knows its weight decay."""


class KerasDenseNetFCN(_WeightDecay, EfficientFCDenseNet):
    """An `EfficientFCDenseNet` that knows its weight decay."""


def DenseNet(
    depth: int | Sequence[int] = 40,
    nb_dense_block: int = 3,
    growth_rate: int = 12,
    nb_filter: int = -1,
    nb_layers_per_block: int | Sequence[int] = -1,
    bottleneck: bool = False,
    reduction: float = 0.0,
    dropout_rate: float = 0.0,
    weight_decay: float = 1e-4,
    subsample_initial_block: bool = False,
    include_top: bool = True,
    pooling: str | None = None,
    classes: int = 10,
    **options: Any,
) -> KerasDenseNet:
    """A DenseNet as keras-contrib builds it.

    Args:
        depth: 3 N + 4, or 6 N + 4 with bottlenecks, for N layers in each block; or the layers of
            every block, in a list.
        nb_dense_block: the number of blocks.
        growth_rate: k. nb_filter: channels of the first convolution; -1: 2 k.
        nb_layers_per_block: the same in every block, or a list; -1: by the depth.
        bottleneck: layers of a 1x1 and a 3x3 convolution.
        reduction: the share of channels that a transition drops: 1 - compression, 0 to below 1.
        dropout_rate: after the last convolution of every layer.
        weight_decay: kept on the model, for its `parameter_groups()`.
        subsample_initial_block: the ImageNet stem, a 7x7 convolution and max-pooling.
        include_top: False: no classifier; the last map comes out, or with pooling="avg" its mean.
        classes: of the classifier.
        options: further ones of `EfficientDenseNet`.

    Raises:
        ValueError: an option out of its range.
    """
    compression, dropout_rate, weight_decay = _rates(reduction, dropout_rate, weight_decay)
    nb_dense_block = check_count("nb_dense_block", nb_dense_block)
    growth_rate = check_count("growth_rate", growth_rate)
    if not isinstance(nb_layers_per_block, int):
        depth = nb_layers_per_block
    if not isinstance(depth, int):
        blocks = check_block_config(depth)
        if len(blocks) != nb_dense_block:
            raise ValueError(
                f"nb_dense_block must be the {len(blocks)} blocks listed, got {nb_dense_block}"
            )
    elif nb_layers_per_block != -1:
        blocks = (check_count("nb_layers_per_block", nb_layers_per_block),) * nb_dense_block
    else:
        blocks = cifar_block_config(depth, bottleneck)[:1] * nb_dense_block
    model = _build(
        include_top,
        pooling,
        classes,
        growth_rate=growth_rate,
        block_config=blocks,
        num_init_features=2 * growth_rate if nb_filter == -1 else nb_filter,
        bottleneck=bottleneck,
        compression=compression,
        drop_rate=dropout_rate,
        small_inputs=not subsample_initial_block,
        **{"eps": CONTRIB_EPSILON, "init_mode": "fan_in", **options},
    )
    model.weight_decay = weight_decay
    return model


def DenseNetFCN(
    nb_dense_block: int = 5,
    growth_rate: int = 16,
    nb_layers_per_block: int | Sequence[int] = 4,
    reduction: float = 0.0,
    dropout_rate: float = 0.0,
    weight_decay: float = 1e-4,
    init_conv_filters: int = 48,
    include_top: bool = True,
    classes: int = 1,
    upsampling_type: str = "deconv",
    early_transition: bool = False,
    transition_pooling: str = "max",
    **options: Any,
) -> KerasDenseNetFCN:
    """A fully convolutional DenseNet as keras-contrib builds it: logits for every pixel.

    Args:
        nb_dense_block: the number of blocks on the way down.
        growth_rate: k.
        nb_layers_per_block: the same in every block, or a list of those on the way down and the one
            after them; the way up mirrors it.
        reduction: the share of channels that a transition drops: 1 - compression, 0 to below 1.
        dropout_rate: after the convolution of every layer.
        weight_decay: kept on the model, for its `parameter_groups()`.
        init_conv_filters: channels of the first convolution, which norm and ReLU follow.
        include_top: False: the features come out.
        classes: of the logits.
        upsampling_type: "deconv", "upsampling" or "subpixel", with ReLU after the convolutions.
        early_transition: a transition in front of the first block, and an upsampling at the end.
        transition_pooling: "max" or "avg".
        options: further ones of `EfficientFCDenseNet`.

    Raises:
        ValueError: an option out of its range.
    """
    compression, dropout_rate, weight_decay = _rates(reduction, dropout_rate, weight_decay)
    check_choice("upsampling_type", upsampling_type, UPSAMPLINGS)
    down = check_count("nb_dense_block", nb_dense_block)
    pooling = check_choice("transition_pooling", transition_pooling, ("max", "avg"))
    if isinstance(nb_layers_per_block, int):
        blocks = (check_count("nb_layers_per_block", nb_layers_per_block),) * (2 * down + 1)
    else:
        given = check_block_config(nb_layers_per_block)
        if len(given) != down + 1:
            raise ValueError(
                f"nb_layers_per_block must list nb_dense_block + 1 = {down + 1} blocks, got "
                f"{len(given)}"
            )
        blocks = (*given, *given[-2::-1])
    theirs: dict[str, Any] = {
        "bias": False,
        "bias_up": upsampling_type == "deconv",
        "relu_up": upsampling_type != "upsampling",
        "norm_first": True,
        "drop_transitions": False,
        "eps": CONTRIB_EPSILON,
    }
    model = KerasDenseNetFCN(
        growth_rate,
        blocks,
        check_count("init_conv_filters", init_conv_filters),
        dropout_rate,
        check_count("classes", classes) if include_top else None,
        compression=compression,
        pooling="max" if pooling == "max" else "average",
        upsampling=upsampling_type,
        early_transition=early_transition,
        **{**theirs, **options},
    )
    model.weight_decay = weight_decay
    return model


def _rates(
    reduction: float, dropout_rate: float, weight_decay: float
) -> tuple[float, float, float]:
    """The compression, the dropout and the weight decay; ValueError under Keras' names."""
    reduction = check_number("reduction", reduction, "at least 0 and below 1", 0.0, _BELOW_ONE)
    expected = "a probability between 0 and 1"
    return (
        1.0 - reduction,
        check_number("dropout_rate", dropout_rate, expected, 0.0, 1.0),
        check_number("weight_decay", weight_decay, "finite and at least 0", 0.0, math.inf),
    )


def _build(include_top: bool, pooling: str | None, classes: int, **options: Any) -> KerasDenseNet:
    if pooling not in (None, "avg"):
        raise ValueError(f"pooling must be None or 'avg', got {pooling!r}")
    return KerasDenseNet(
        **options,
        num_classes=check_count("classes", classes) if include_top else None,
        global_pool=include_top or pooling == "avg",
    )


def _application(
    name: str,
    include_top: bool = True,
    weights: str | None = None,
    pooling: str | None = None,
    classes: int = 1000,
    **options: Any,
) -> KerasDenseNet:
    """As `keras.applications` has it: weights is None or the path of an h5 file of theirs, see
    `models.keras_weights`."""
    shape = CONFIGURATIONS[name]
    model = _build(
        include_top, pooling, classes, **shape, **{"eps": APPLICATIONS_EPSILON, **options}
    )
    if weights is not None:
        from .keras_weights import load_keras_weights

        load_keras_weights(model, weights, strict=include_top)
    return model


def DenseNet121(**options: Any) -> KerasDenseNet:
    """include_top, weights (None or an h5 file), pooling, classes, options of EfficientDenseNet."""
    return _application("densenet121", **options)


def DenseNet161(**options: Any) -> KerasDenseNet:
    """As `DenseNet121`."""
    return _application("densenet161", **options)


def DenseNet169(**options: Any) -> KerasDenseNet:
    """As `DenseNet121`."""
    return _application("densenet169", **options)


def DenseNet201(**options: Any) -> KerasDenseNet:
    """As `DenseNet121`."""
    return _application("densenet201", **options)


def DenseNet264(**options: Any) -> KerasDenseNet:
    """As `DenseNet121`."""
    return _application("densenet264", **options)
