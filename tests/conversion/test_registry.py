"""Efficient networks in the registries of timm, torchvision and segmentation_models_pytorch."""

from __future__ import annotations

import torch

import densenet_efficient
from densenet_efficient.nn.dense_block import DenseBlockExecution
from tests.support.conversion_comparison import largest_error, step
from tests.support.libraries import load
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


def test_encoders_for_segmentation_are_registered() -> None:
    load("segmentation_models_pytorch")
    import segmentation_models_pytorch as smp

    names = densenet_efficient.register_models()
    assert "segmentation_models_pytorch.densenet161_efficient" in names
    entries = dict(smp.encoders.encoders)
    assert densenet_efficient.register_models() == names
    assert all(smp.encoders.encoders[name] is entry for name, entry in entries.items())
    plain, ours = (
        smp.Unet(name, encoder_weights=None, in_channels=1, classes=3).double()
        for name in ("densenet121", "densenet121_efficient")
    )
    assert isinstance(ours.encoder.features.denseblock4, DenseBlockExecution)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 1, 64, 64, dtype=torch.float64)
    assert largest_error(step(plain, x), step(ours, x)) < 1e-9
    assert densenet_efficient.explain(ours, x).kinds == {"kernels"}
