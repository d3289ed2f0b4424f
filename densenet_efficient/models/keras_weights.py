"""Weights of Keras' DenseNets: the h5 files of `keras.applications` and others of that layout.

    conv1_conv, conv1_bn                   features.conv0, norm0      (also written conv1/conv)
    conv{b}_block{i}_0_bn, _1_conv         features.denseblock{b-1}.denselayer{i}.norm1, conv1
    conv{b}_block{i}_1_bn, _2_conv                                             norm2, conv2
    pool{b}_bn, pool{b}_conv               features.transition{b-1}.norm, conv
    bn, predictions (or fc1000)            features.norm5, classifier

Kernels are [height, width, in, out] there and [out, in, height, width] here. Both concatenate new
channels behind earlier ones, so channels keep their order. Epsilon is 1.001e-5 there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .pretrained import load_weights

__all__ = ["EPSILON", "keras_state", "load_keras_weights", "read_h5"]

EPSILON = 1.001e-5
_ENTRY = re.compile(
    r"(?:^|/)(?P<layer>conv\d+_block\d+_\d_(?:bn|conv)|conv1[/_](?:bn|conv)|pool\d+_(?:bn|conv)|bn|"
    r"predictions|fc1000)/(?P<kind>kernel|bias|gamma|beta|moving_mean|moving_variance)(?::0)?$"
)
_BLOCK = re.compile(r"conv(\d+)_block(\d+)_(\d)_(bn|conv)")
_POOL = re.compile(r"pool(\d+)_(bn|conv)")
_PARTS = {
    ("0", "bn"): "norm1",
    ("1", "conv"): "conv1",
    ("1", "bn"): "norm2",
    ("2", "conv"): "conv2",
}
_KINDS = {
    "kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
_OTHERS = {
    "conv1_conv": "features.conv0",
    "conv1_bn": "features.norm0",
    "bn": "features.norm5",
    "predictions": "classifier",
    "fc1000": "classifier",
}


def read_h5(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Every array of an h5 file by its path in it.

    Raises:
        ImportError: h5py is missing. ValueError: the file cannot be read.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            f"weights {path}: reading h5 needs h5py: pip install 'densenet-efficient[keras]'"
        ) from error
    arrays: dict[str, Any] = {}

    def collect(name: str, entry: Any) -> None:
        if hasattr(entry, "shape"):
            arrays[name] = entry[()]

    try:
        with h5py.File(path, "r") as file:
            file.visititems(collect)
    except OSError as error:
        raise ValueError(f"weights {path}: expected an h5 file, got: {error}") from error
    return arrays


def keras_state(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """Arrays by their path in an h5 file -> a state dict with torchvision's keys.

    Raises:
        ValueError: none of the layers of a DenseNet is there.
    """
    state: dict[str, Tensor] = {}
    for path, array in arrays.items():
        found = _ENTRY.search(path)
        if found is None:
            continue
        value = torch.as_tensor(array)
        if found["kind"] == "kernel":
            value = value.permute(3, 2, 0, 1) if value.dim() == 4 else value.t()
        state[f"{_module_of(found['layer'])}.{_KINDS[found['kind']]}"] = value.contiguous()
    if not any(key.startswith("features.") for key in state):
        raise ValueError(
            "weights: expected the layers conv1_conv, conv2_block1_0_bn, ... of a Keras DenseNet, "
            f"got {', '.join(list(arrays)[:3]) or 'no array'}"
        )
    return state


def _module_of(layer: str) -> str:
    layer = layer.replace("/", "_")
    block, pool = _BLOCK.fullmatch(layer), _POOL.fullmatch(layer)
    if block is not None:
        number, index, place, kind = block.groups()
        part = _PARTS.get((place, kind), f"{place}_{kind}")
        return f"features.denseblock{int(number) - 1}.denselayer{index}.{part}"
    if pool is not None:
        part = "norm" if pool[2] == "bn" else "conv"
        return f"features.transition{int(pool[1]) - 1}.{part}"
    return _OTHERS[layer]


def load_keras_weights(
    model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Any], *, strict: bool = True
) -> nn.Module:
    """Loads the weights of a Keras DenseNet into a model with torchvision's keys, and gives its
    norms Keras' epsilon.

    Args:
        source: an h5 file, or its arrays by their path.
        strict: see `load_weights`; False leaves a classifier of another size, or a missing one, as
            it is.

    Raises:
        ValueError: the weights do not fit; the model is unchanged. ImportError: h5py is missing.
    """
    arrays = source if isinstance(source, Mapping) else read_h5(source)
    load_weights(model, keras_state(arrays), strict=strict)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = EPSILON
    return model
