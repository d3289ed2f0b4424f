"""torchvision, the peer that whole networks are compared with. Where it is missing, as on a GPU
machine that has torch and pytest only, importing this module skips the test module that does."""

from __future__ import annotations

import pytest

from densenet_efficient.torchvision_compat import import_torchvision

__all__ = [
    "DenseBlock",
    "DenseLayer",
    "Transition",
    "Weights",
    "WeightsEnum",
    "create_feature_extractor",
    "torchvision",
]

try:
    torchvision = import_torchvision("torchvision")
    extraction = import_torchvision("torchvision.models.feature_extraction")
except ImportError as error:
    pytest.skip(f"the peer is missing: {error}", allow_module_level=True)

create_feature_extractor = extraction.create_feature_extractor
Weights = torchvision.models.Weights
WeightsEnum = torchvision.models.WeightsEnum
DenseBlock = torchvision.models.densenet._DenseBlock
DenseLayer = torchvision.models.densenet._DenseLayer
Transition = torchvision.models.densenet._Transition
