"""Weights made elsewhere: other key names, wrappers' prefixes, public checkpoints, files.

Our models have torchvision's keys (`features.denseblock1.denselayer1.norm1.weight`, ...). Files
written before torchvision 0.4 say `norm.1`; files of training frameworks carry a prefix such as
`module.`, or hide the state dict under a key.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import load_tensors
from ..nn.options import check_module
from ..torchvision_compat import import_torchvision

HUB = "hf-hub:"
SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".h5", ".hdf5", ".ckpt", ".tar")
_OLD_KEY = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..+)$")
_MONAI_LAYER = re.compile(r"^(.*denselayer\d+\.)layers\.(.+)$")
_MONAI_HEAD = re.compile(r"^(.*?)class_layers\.out\.(weight|bias)$")
_CONTAINERS = ("state_dict", "model_state_dict", "state_dict_ema", "model", "network", "net")


def modernise_keys(state: Mapping[str, Any]) -> dict[str, Any]:
    """Torchvision's keys for those of its old files (`denselayer1.norm.1.weight`) and of MONAI
    (`denselayer1.layers.norm1.weight`, `class_layers.out.weight`); other keys as they are."""

    def modern(key: str) -> str:
        key = _OLD_KEY.sub(r"\1\2", key)
        key = _MONAI_LAYER.sub(r"\1\2", key)
        return _MONAI_HEAD.sub(r"\1classifier.\2", key)

    return {modern(key): value for key, value in state.items()}


def match_prefix(state: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """Exchanges what is in front of the network's keys in a file (`module.`, `densenet121.`,
    `module.backbone.`, nothing) for what is in front of them in the model. Keys outside of the
    network lose the wrapper's prefix alone. Unless either holds exactly one network, the keys stay
    as they are."""
    anchor = "features.conv0.weight"
    found = [key[: -len(anchor)] for key in state if key.endswith(anchor)]
    wanted = [key[: -len(anchor)] for key in expected if key.endswith(anchor)]
    if len(found) != 1 or len(wanted) != 1 or found == wanted:
        return dict(state)
    (theirs,), (ours,) = found, wanted
    wrapper = theirs.removesuffix(ours) if theirs.endswith(ours) else ""

    def renamed(key: str) -> str:
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
        return key.removeprefix(wrapper)

    return {renamed(key): value for key, value in state.items()}


def load_weights(
    model: nn.Module, state: Mapping[str, Any], *, strict: bool = True, source: str = "state"
) -> nn.Module:
    """Loads a foreign state dict into a DenseNet with torchvision's keys and returns the model.

    Accepts the old `norm.1` keys, MONAI's, a prefix in the file or a wrapper around the model's
    network (CheXNet's `module.densenet121.`), files that keep the state dict under `state_dict` or
    `model`, and files without `num_batches_tracked`.

    Args:
        model: ours, torchvision's, or one that holds one of them.
        state: what torch.load gave.
        strict: every parameter must be there with its shape, and nothing else. Otherwise a
            classifier of another size, and keys that are missing or not known, are left out.
        source: what an error calls the state, such as its file.

    Raises:
        ValueError: naming the missing, unexpected and misshaped keys; the model is unchanged.
        TypeError: model is no module, or state no mapping with names as keys.
    """
    check_module("model", model)
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a mapping, as torch.load gives, got {type(state).__name__}")
    for container in _CONTAINERS:
        inner = state.get(container)
        if isinstance(inner, Mapping):
            state = inner
            break
    unnamed = [key for key in state if not isinstance(key, str)]
    if unnamed:
        raise TypeError(f"state must have names as keys, got {unnamed[0]!r}")
    own = model.state_dict()
    modern = modernise_keys(state)
    # A MONAI network as the model has MONAI's keys already.
    loaded = match_prefix(dict(state) if set(state) <= set(own) else modern, own)
    wrong = [
        f"{key}: expected shape {list(own[key].shape)}, got "
        + (str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__)
        for key, value in loaded.items()
        if key in own and not (isinstance(value, Tensor) and value.shape == own[key].shape)
    ]
    missing = [key for key in own if key not in loaded and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in loaded if key not in own]
    fatal_shapes = wrong if strict else [w for w in wrong if not w.startswith("classifier.")]
    if fatal_shapes or (strict and (missing or unexpected)) or len(missing) == len(own):
        parts = [("missing", missing), ("unexpected", unexpected), ("wrong", fatal_shapes)]
        raise ValueError(
            f"{source} does not fit {type(model).__name__}: "
            + "; ".join(f"{name} {_shortened(keys)}" for name, keys in parts if keys)
        )
    fitting = {
        key: value
        for key, value in loaded.items()
        if key in own and isinstance(value, Tensor) and value.shape == own[key].shape
    }
    model.load_state_dict(fitting, strict=False)
    return model


def published_classes(state: Mapping[str, Any]) -> int:
    """The number of classes that a state dict's classifier has; 0 without one."""
    for container in _CONTAINERS:
        if isinstance(state.get(container), Mapping):
            return published_classes(state[container])
    for key, value in modernise_keys(state).items():
        if key.endswith("classifier.weight") and isinstance(value, Tensor):
            return value.shape[0]
    return 0


def _shortened(keys: list[str], shown: int = 4) -> str:
    rest = len(keys) - shown
    return ", ".join(keys[:shown]) + (f" and {rest} more" if rest > 0 else "")


def fetch_weights(weights: Any, architecture: str, *, progress: bool = True) -> dict[str, Any]:
    """The state dict that `weights` names; what is downloaded is cached and its hash checked.

    Args:
        weights: a member of one of torchvision's weights enums, its name ("IMAGENET1K_V1",
            "DEFAULT"), the path of a file (see `read_weights`), the URL of a checkpoint named like
            torch.hub's, with its hash, or "hf-hub:OWNER/NAME[@REVISION]", the weights of a
            repository of the Hugging Face hub.
        architecture: "densenet121", ...: whose enum a name is looked up in.

    Raises:
        ValueError: there is no such entry or file. RuntimeError: the file's hash is wrong.
        ImportError: a library that is needed for it is missing.
    """
    if isinstance(weights, (str, os.PathLike)):
        text = os.fspath(weights)
        if text.startswith(HUB):
            return read_weights(_from_hub(text.removeprefix(HUB)))
        if "://" in text:
            return torch.hub.load_state_dict_from_url(
                text, map_location="cpu", check_hash=True, progress=progress
            )
        if isinstance(weights, os.PathLike) or Path(text).suffix in SUFFIXES:
            return read_weights(text)
        models = import_torchvision("torchvision.models")
        if architecture not in models.list_models():
            raise ValueError(f"weights: torchvision has none for {architecture}, got {weights!r}")
        entries = models.get_model_weights(architecture)
        if weights not in entries.__members__:
            raise ValueError(
                f"weights must be one of {', '.join(entries.__members__)} for {architecture}, a "
                f"file, a URL or {HUB}OWNER/NAME, got {weights!r}"
            )
        weights = entries[weights]
    if not hasattr(weights, "get_state_dict"):
        raise ValueError(
            "weights must be a torchvision weights entry, its name, a file or a URL, got "
            f"{weights!r}"
        )
    return weights.get_state_dict(progress=progress, check_hash=True)


def read_weights(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state dict of a file on the CPU: safetensors, an h5 file of Keras (with torchvision's
    keys then), or what `torch.save` wrote; nothing in it is executed.

    Raises:
        ValueError: there is no such file, or it cannot be read. ImportError: a library is missing.
    """
    if not Path(path).is_file():
        raise ValueError(f"weights: expected a file, got none at {path}")
    suffix = Path(path).suffix
    if suffix in (".h5", ".hdf5"):
        from .keras_weights import keras_state, read_h5

        return keras_state(read_h5(path))
    try:
        if suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = load_tensors(path)
    except ImportError:
        raise
    except Exception as error:  # damaged bytes lead the readers to errors of any kind
        first_line = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"weights {path}: expected weights, got: {first_line}; fetch or write the file anew"
        ) from error
    if not isinstance(state, Mapping):
        raise ValueError(f"weights {path}: expected a state dict, got {type(state).__name__}")
    return dict(state)


def _from_hub(name: str) -> str:
    """The downloaded file of a repository; huggingface_hub checks its hash and keeps it."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError as error:
        raise ImportError(f"weights {HUB}{name}: needs huggingface_hub: {error}") from error
    repository, _, revision = name.partition("@")
    for file in ("model.safetensors", "pytorch_model.bin"):
        try:
            return hf_hub_download(repository, file, revision=revision or None)
        except EntryNotFoundError:
            continue
    raise ValueError(f"weights: expected model.safetensors or pytorch_model.bin in {name}")
