"""A network by name and options, in each of its executions.

Training, benchmarks and the command line all say which network they mean by a `NetworkSpec`, and
how it is to run by an execution: ours in its memory modes, the plain reference, or
torchvision's own. All executions of one spec have the same parameters and state dict keys.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn

from .. import reference
from ..nn.architecture import CONFIGURATIONS, cifar_block_config
from ..nn.fully_convolutional import FC_CONFIGURATIONS
from ..nn.options import MEMORY_MODES
from ..torchvision_compat import import_torchvision

__all__ = ["DENSE_NETWORKS", "EXECUTIONS", "NETWORKS", "NetworkSpec", "check_image_size"]

CIFAR = "densenet_cifar"
NETWORKS = (*CONFIGURATIONS, CIFAR)
DENSE_NETWORKS = tuple(FC_CONFIGURATIONS)
EXECUTIONS = {
    "auto": "ours; bottlenecks are kept where the step's peak has room for them",
    "recompute": "ours; bottlenecks are computed again in backward",
    "store": "ours; bottlenecks are kept for backward",
    "reference": "the plain PyTorch reference",
    "reference-checkpoint": "the plain PyTorch reference, every layer checkpointed",
    "torchvision": "torchvision's DenseNet",
    "torchvision-checkpoint": "torchvision's DenseNet with memory_efficient=True",
}


@dataclass(frozen=True)
class NetworkSpec:
    """Which DenseNet.

    name: one of `NETWORKS` or `DENSE_NETWORKS`. depth, growth_rate, bottleneck, compression: of
    `densenet_cifar` only (None: 100, 12, True, and 0.5 with bottlenecks or 1 without, as in the
    paper).
    drop_rate: 0..1. drop_everywhere: see `EfficientDenseNet`. num_classes, in_channels: positive.
    """

    name: str = "densenet121"
    depth: int | None = None
    growth_rate: int | None = None
    bottleneck: bool | None = None
    compression: float | None = None
    drop_rate: float = 0.0
    num_classes: int = 1000
    in_channels: int = 3
    drop_everywhere: bool = False

    def __post_init__(self) -> None:
        names = (*NETWORKS, *DENSE_NETWORKS)
        if self.name not in names:
            raise ValueError(f"model: expected one of {', '.join(names)}, got {self.name!r}")
        if self.dense and self.drop_everywhere:
            raise ValueError(
                f"drop_everywhere: expected only with a classifier, got it with {self.name}, which "
                "drops out after every convolution in any case"
            )
        if self.name != CIFAR:
            for option in ("depth", "growth_rate", "bottleneck", "compression"):
                if getattr(self, option) is not None:
                    raise ValueError(
                        f"{option}: expected only with model {CIFAR}, got "
                        f"{getattr(self, option)!r} with {self.name}"
                    )

    @property
    def small_inputs(self) -> bool:
        """Whether the stem keeps the resolution (CIFAR)."""
        return self.name == CIFAR

    @property
    def dense(self) -> bool:
        """Whether logits come out for every pixel."""
        return self.name in DENSE_NETWORKS

    @property
    def in_torchvision(self) -> bool:
        """Whether torchvision's DenseNet can express it."""
        others = self.small_inputs or self.dense
        return not (others or self.in_channels != 3 or self.drop_everywhere)

    @property
    def default_image_size(self) -> int:
        """Pixels a side that the papers use it at."""
        return 32 if self.small_inputs else 224

    @property
    def title(self) -> str:
        """Name and what distinguishes it, such as "densenet_cifar BC-100-12"."""
        if not self.small_inputs:
            return self.name
        options = self._cifar()
        kind = "BC-" if options["bottleneck"] else ""
        return f"{self.name} {kind}{options['depth']}-{options['growth_rate']}"

    def _cifar(self) -> dict[str, Any]:
        bottleneck = True if self.bottleneck is None else self.bottleneck
        compression = (0.5 if bottleneck else 1.0) if self.compression is None else self.compression
        return {
            "depth": 100 if self.depth is None else self.depth,
            "growth_rate": 12 if self.growth_rate is None else self.growth_rate,
            "bottleneck": bottleneck,
            "compression": compression,
        }

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `reference.DenseNet` and `EfficientDenseNet`, or of the
        FC-DenseNets. ValueError where an option is out of its range."""
        common: dict[str, Any] = {
            "drop_rate": self.drop_rate,
            "num_classes": self.num_classes,
            "in_channels": self.in_channels,
        }
        if self.dense:
            return {**FC_CONFIGURATIONS[self.name], **common}
        common["drop_everywhere"] = self.drop_everywhere
        if not self.small_inputs:
            return {**CONFIGURATIONS[self.name], **common}
        cifar = self._cifar()
        k = cifar["growth_rate"]
        return {
            "growth_rate": k,
            "block_config": cifar_block_config(cifar["depth"], cifar["bottleneck"]),
            "num_init_features": 2 * k if cifar["bottleneck"] else 16,
            "bottleneck": cifar["bottleneck"],
            "compression": cifar["compression"],
            "small_inputs": True,
            "init_mode": "fan_out",
            **common,
        }

    def build(self, execution: str) -> nn.Module:
        """The network, freshly initialised from torch's generator: the same seed gives the same
        weights in ours and in the reference.

        Raises:
            ValueError: an unknown execution, an option out of its range, or a network that
                torchvision's DenseNet cannot express.
        """
        if execution not in EXECUTIONS:
            raise ValueError(
                f"execution: expected one of {', '.join(EXECUTIONS)}, got {execution!r}"
            )
        options = self.options()
        if execution in MEMORY_MODES:
            from .densenet import EfficientDenseNet
            from .fc_densenet import EfficientFCDenseNet

            ours = EfficientFCDenseNet if self.dense else EfficientDenseNet
            return ours(**options, memory=execution)
        source, _, checkpointed = execution.partition("-")
        options["memory_efficient"] = bool(checkpointed)
        if source == "reference":
            return (reference.FCDenseNet if self.dense else reference.DenseNet)(**options)
        if not self.in_torchvision:
            raise ValueError(
                "execution: expected 'reference' for networks with a CIFAR stem or other than 3 "
                "input channels, dropout after every convolution or logits for every pixel, which "
                f"torchvision does not have, got {execution!r}"
            )
        del options["in_channels"], options["drop_everywhere"]
        return import_torchvision("torchvision.models").DenseNet(**options)

    def describe(self) -> dict[str, Any]:
        """All fields as plain values."""
        return dataclasses.asdict(self)


def check_image_size(model: nn.Module, image_size: int) -> None:
    """ValueError where images of so many pixels a side are too small for the network."""
    least = getattr(model, "min_input_size", 1)
    if image_size < least:
        raise ValueError(
            f"image_size: expected at least {least} pixels a side for this network, got "
            f"{image_size}"
        )
