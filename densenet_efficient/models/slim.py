"""DenseNets under TF-Slim's names and options; TensorFlow is not needed.

Where that library and the paper differ, these follow the paper: one growth rate in all blocks, the
input of a block is part of its output, and a transition goes on compressing where it stops pooling.
The same call order: `net, end_points = model.net_and_end_points(images)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..nn.architecture import CONFIGURATIONS
from ..nn.options import check_count
from .densenet import EfficientDenseNet

__all__ = ["SlimDenseNet", "densenet_121", "densenet_161", "densenet_169", "densenet_201"]
__all__ += ["densenet_X"]


class SlimDenseNet(EfficientDenseNet):
    """An `EfficientDenseNet`, with what TF-Slim's functions return."""

    def net_and_end_points(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Images [N, C, H, W] -> the network's output, as `forward` gives it, and all end points by
        name: "conv1" (the stem), "dense_block1", "transition_block1", ..., "final_block",
        "global_pool", "logits", "predictions"."""
        found = self.forward_end_points(images)
        names = {"stem": "conv1", "features": "final_block", "pooled": "global_pool"}
        points = {}
        for name, y in found.items():
            for ours, theirs in (("denseblock", "dense_block"), ("transition", "transition_block")):
                if name.startswith(ours):
                    names[name] = theirs + name.removeprefix(ours)
            points[names.get(name, name)] = y
        last = "logits" if "logits" in found else "pooled" if self.global_pool else "features"
        return found[last], points


def densenet_X(
    units_per_block: Sequence[int],
    growth_rate: int = 32,
    num_classes: int | None = 1000,
    *,
    reduction: float = 0.5,
    global_pool: bool = True,
    output_stride: int | None = None,
    initial_output_stride: int = 4,
    spatial_squeeze: bool = True,
    **options: Any,
) -> SlimDenseNet:
    """A DenseNet of any shape.

    Args:
        units_per_block: layers of every block. growth_rate: k; the stem has 2 k channels.
        num_classes: None: no logits, features come out.
        reduction: theta, the share of channels that a transition keeps.
        global_pool: False: logits at every place of the last map.
        output_stride: of the last map; later blocks dilate. initial_output_stride: 4, or 2 without
            the stem's max-pooling.
        spatial_squeeze: False: pooled logits are [N, num_classes, 1, 1].
        options: further ones of `EfficientDenseNet`.

    Raises:
        ValueError: an option out of its range, or strides that cannot be reached.
    """
    growth_rate = check_count("growth_rate", growth_rate)
    return SlimDenseNet(
        growth_rate,
        units_per_block,
        **{"num_init_features": 2 * growth_rate, **options},
        num_classes=num_classes,
        compression=reduction,
        global_pool=global_pool,
        output_stride=output_stride,
        initial_output_stride=initial_output_stride,
        spatial_squeeze=spatial_squeeze,
    )


def _named(name: str, options: dict[str, Any]) -> SlimDenseNet:
    shape = CONFIGURATIONS[name]
    return densenet_X(shape["block_config"], shape["growth_rate"], **options)


def densenet_121(**options: Any) -> SlimDenseNet:
    """DenseNet-121. options: of `densenet_X`."""
    return _named("densenet121", options)


def densenet_161(**options: Any) -> SlimDenseNet:
    """DenseNet-161 (k = 48). options: of `densenet_X`."""
    return _named("densenet161", options)


def densenet_169(**options: Any) -> SlimDenseNet:
    """DenseNet-169. options: of `densenet_X`."""
    return _named("densenet169", options)


def densenet_201(**options: Any) -> SlimDenseNet:
    """DenseNet-201. options: of `densenet_X`."""
    return _named("densenet201", options)
