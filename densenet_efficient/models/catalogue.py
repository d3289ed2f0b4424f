"""The published DenseNets by name: configuration, number of parameters, and published errors.

Errors in per cent. ImageNet: top-1, one crop of 224 px. CIFAR: without augmentation (dropout 0.2
after every convolution but the first) and, with a "+", with crops and flips. From arXiv 1608.06993,
table 2, and the results that its authors publish with their code (the wide and the cosine ones).
CamVid: the share of wrong pixels, 100 less the global accuracy in arXiv 1611.09326, table 3; not
listed for the smallest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .densenet import EfficientDenseNet
from .fc_densenet import EfficientFCDenseNet
from .networks import NetworkSpec

__all__ = ["CATALOGUE", "Published", "build"]


@dataclass(frozen=True)
class Published:
    """network: which. parameters: for the classes of the data it was published for. errors: data
    set -> per cent; "ImageNet", "ImageNet, cosine", "C10", "C10+", "C100", "C100+" or "CamVid"."""

    network: NetworkSpec
    parameters: int
    errors: dict[str, float] = field(default_factory=dict)


def _imagenet(name: str, parameters: int, **errors: float) -> Published:
    keys = {"step": "ImageNet", "cosine": "ImageNet, cosine"}
    return Published(NetworkSpec(name), parameters, {keys[k]: v for k, v in errors.items()})


def _cifar(
    depth: int, k: int, bottleneck: bool, parameters: int, *errors: float | None
) -> Published:
    network = NetworkSpec(
        "densenet_cifar", depth=depth, growth_rate=k, bottleneck=bottleneck, num_classes=10
    )
    keys = ("C10", "C10+", "C100", "C100+")
    found = {key: value for key, value in zip(keys, errors, strict=True) if value is not None}
    return Published(network, parameters, found)


def _camvid(name: str, parameters: int, error: float | None) -> Published:
    network = NetworkSpec(name, num_classes=11, drop_rate=0.2)
    return Published(network, parameters, {} if error is None else {"CamVid": error})


CATALOGUE: dict[str, Published] = {
    "densenet121": _imagenet("densenet121", 7_978_856, step=25.0),
    "densenet169": _imagenet("densenet169", 14_149_480, step=23.6),
    "densenet201": _imagenet("densenet201", 20_013_928, step=22.5),
    "densenet161": _imagenet("densenet161", 28_681_000, step=22.2),
    "densenet264": _imagenet("densenet264", 33_337_704, step=22.1, cosine=21.6),
    "densenet264_k48": _imagenet("densenet264_k48", 72_686_632, cosine=20.4),
    "densenet_40_12": _cifar(40, 12, False, 1_019_722, 7.00, 5.24, 27.55, 24.42),
    "densenet_100_12": _cifar(100, 12, False, 6_979_642, 5.77, 4.10, 23.79, 20.20),
    "densenet_100_24": _cifar(100, 24, False, 27_249_082, 5.83, 3.74, 23.42, 19.25),
    "densenet_bc_100_12": _cifar(100, 12, True, 769_162, 5.92, 4.51, 24.15, 22.27),
    "densenet_bc_250_24": _cifar(250, 24, True, 15_324_406, 5.19, 3.62, 19.64, 17.60),
    "densenet_bc_190_40": _cifar(190, 40, True, 25_624_430, None, 3.46, None, 17.18),
    "wide_densenet_bc_40_36": _cifar(40, 36, True, 1_542_682, None, 4.58, None, 22.30),
    "wide_densenet_bc_40_48": _cifar(40, 48, True, 2_733_130, None, 3.99, None, 20.29),
    "wide_densenet_bc_40_60": _cifar(40, 60, True, 4_261_690, None, 4.01, None, 19.99),
    "fc_densenet56": _camvid("fc_densenet56", 1_376_795, None),
    "fc_densenet67": _camvid("fc_densenet67", 3_463_243, 9.2),
    "fc_densenet103": _camvid("fc_densenet103", 9_322_091, 8.5),
}


def build(name: str, **options: Any) -> nn.Module:
    """The published network of that name, freshly initialised.

    Args:
        name: one of `CATALOGUE`.
        options: of `EfficientDenseNet` or `EfficientFCDenseNet`, in the place of the published
            ones.

    Raises:
        ValueError: an unknown name; a bad option.
    """
    if name not in CATALOGUE:
        raise ValueError(f"name: expected one of {', '.join(CATALOGUE)}, got {name!r}")
    network = CATALOGUE[name].network
    kind = EfficientFCDenseNet if network.dense else EfficientDenseNet
    return kind(**{**network.options(), **options})
