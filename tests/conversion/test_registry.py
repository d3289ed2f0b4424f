"""Efficient networks in the registries of timm and torchvision."""

from __future__ import annotations

import torch

import densenet_efficient
from densenet_efficient.nn.dense_block import DenseBlockExecution
from tests.support.peer import torchvision


def test_names_are_registered_once_and_build_converted_networks() -> None:
    names = densenet_efficient.register_models()
    assert names == densenet_efficient.register_models()
    assert "torchvision.densenet121_efficient" in names
    model = torchvision.models.get_model("densenet121_efficient", weights=None, num_classes=5)
    assert isinstance(model.features.denseblock1, DenseBlockExecution)
    assert torchvision.models.get_model_weights("densenet121_efficient").__name__ == (
        "DenseNet121_Weights"
    )
    import timm

    model = timm.create_model("densenet121_efficient", num_classes=7, in_chans=1).eval()
    assert isinstance(model.features.denseblock4, DenseBlockExecution)
    with torch.no_grad():
        assert model(torch.randn(1, 1, 32, 32)).shape == (1, 7)
