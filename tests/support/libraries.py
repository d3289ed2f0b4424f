"""The libraries whose DenseNets are converted, as they are installed.

Only the file with the network is wanted of each. Packages that would bring readers, registries and
trainers along are entered without running their `__init__`, and what the file takes of its
neighbours without using it in a network stands in for them.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

from densenet_efficient.torchvision_compat import import_torchvision


def load(name: str) -> ModuleType:
    """The module with the DenseNet of a library, "timm", "monai", ...; skips the test where it or
    torchvision is not installed, and fails where they are and cannot be imported."""
    for package in ("torchvision", name.partition(" ")[0]):
        try:
            version(package)
        except PackageNotFoundError:
            pytest.skip(f"{package} is missing")
    import_torchvision("torchvision")  # next to a torch that it was not built for, too
    return _LOADERS[name]()


def version_of(name: str) -> str:
    """As installed."""
    return version(name)


def _enter(package: str) -> None:
    """Makes a package's modules importable without its `__init__`."""
    parent, _, child = package.rpartition(".")
    if package in sys.modules:
        return
    if parent:
        _enter(parent)
        places = [str(Path(place) / child) for place in sys.modules[parent].__path__]
    else:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError(f"no module named {package}")
        places = list(spec.submodule_search_locations)
    module = ModuleType(package)
    module.__path__ = places
    sys.modules[package] = module


def _stand_in(name: str, **attributes: Any) -> None:
    if name not in sys.modules:
        module = ModuleType(name)
        module.__dict__.update(attributes)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], child, module)


def _torchxrayvision() -> ModuleType:
    _enter("torchxrayvision")
    _stand_in("torchxrayvision.datasets", default_pathologies=[str(i) for i in range(18)])
    _stand_in("torchxrayvision.utils")
    try:
        importlib.import_module("requests")
    except ImportError:
        _stand_in("requests")
    return importlib.import_module("torchxrayvision.models")


def _segmentation_models() -> ModuleType:
    """The whole library; only its up- and downloads need the hub."""

    class Mixin:
        save_pretrained = from_pretrained = push_to_hub = print

        def __new__(cls, *args: Any, **options: Any) -> Any:
            return super().__new__(cls)

    if "huggingface_hub" not in sys.modules and not importlib.util.find_spec("huggingface_hub"):
        names = ("ModelCard", "ModelCardData", "hf_hub_download")
        _stand_in("huggingface_hub", PyTorchModelHubMixin=Mixin, **dict.fromkeys(names))
    importlib.import_module("segmentation_models_pytorch")
    return importlib.import_module("segmentation_models_pytorch.encoders.densenet")


def _mmpretrain() -> ModuleType:
    """With PyTorch's norm and activation, which mmcv would build."""

    class Registry:
        @staticmethod
        def register_module() -> Any:
            return lambda cls: cls

    class Backbone(nn.Module):
        def __init__(self, init_cfg: Any = None) -> None:
            super().__init__()

    def build_norm_layer(options: Any, channels: int, postfix: str = "") -> tuple[str, nn.Module]:
        return f"bn{postfix}", nn.BatchNorm2d(channels)

    _enter("mmpretrain.models.backbones")
    for name in ("mmcv", "mmcv.cnn"):
        _stand_in(name)
    _stand_in(
        "mmcv.cnn.bricks",
        build_norm_layer=build_norm_layer,
        build_activation_layer=lambda options: nn.ReLU(inplace=True),
    )
    _stand_in("mmpretrain.registry", MODELS=Registry)
    _stand_in("mmpretrain.models.backbones.base_backbone", BaseBackbone=Backbone)
    return importlib.import_module("mmpretrain.models.backbones.densenet")


_LOADERS = {
    "torchvision": lambda: import_torchvision("torchvision.models.densenet"),
    "timm": lambda: importlib.import_module("timm"),
    "monai": lambda: importlib.import_module("monai.networks.nets.densenet"),
    "torchxrayvision": _torchxrayvision,
    "segmentation_models_pytorch": _segmentation_models,
    "mmpretrain": _mmpretrain,
    "pytorchcv": lambda: importlib.import_module("pytorchcv.models.densenet"),
    "pytorchcv cifar": lambda: importlib.import_module("pytorchcv.models.densenet_cifar"),
}
