"""Weights made elsewhere: old key names, wrappers' prefixes, torchvision's public checkpoints.

Our models have torchvision's keys (`features.denseblock1.denselayer1.norm1.weight`, ...). Files
written before torchvision 0.4 say `norm.1`; files of training frameworks carry a prefix such as
`module.`, or hide the state dict under a key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..torchvision_compat import import_torchvision

_OLD_KEY = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..+)$")
_CONTAINERS = ("state_dict", "model_state_dict", "model")


def modernise_keys(state: Mapping[str, Any]) -> dict[str, Any]:
    """`denselayer1.norm.1.weight` -> `denselayer1.norm1.weight`, other keys as they are."""
    return {_OLD_KEY.sub(r"\1\2", key): value for key, value in state.items()}


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


def load_weights(model: nn.Module, state: Mapping[str, Any], *, strict: bool = True) -> nn.Module:
    """Loads a foreign state dict into a DenseNet with torchvision's keys and returns the model.

    Accepts the old `norm.1` keys, a prefix in the file or a wrapper around the model's network
    (CheXNet's `module.densenet121.`), files that keep the state dict under `state_dict` or `model`,
    and files without `num_batches_tracked`.

    Args:
        model: ours, torchvision's, or one that holds one of them.
        state: what torch.load gave.
        strict: every parameter must be there with its shape, and nothing else. Otherwise a
            classifier of another size, and keys that are missing or not known, are left out.

    Raises:
        ValueError: naming the missing, unexpected and misshaped keys; the model is unchanged.
    """
    for container in _CONTAINERS:
        inner = state.get(container)
        if isinstance(inner, Mapping):
            state = inner
            break
    own = model.state_dict()
    loaded = match_prefix(modernise_keys(state), own)
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
            f"state does not fit {type(model).__name__}: "
            + "; ".join(f"{name} {_shortened(keys)}" for name, keys in parts if keys)
        )
    fitting = {
        key: value
        for key, value in loaded.items()
        if key in own and isinstance(value, Tensor) and value.shape == own[key].shape
    }
    model.load_state_dict(fitting, strict=False)
    return model


def _shortened(keys: list[str], shown: int = 4) -> str:
    rest = len(keys) - shown
    return ", ".join(keys[:shown]) + (f" and {rest} more" if rest > 0 else "")


def fetch_weights(weights: Any, architecture: str, *, progress: bool = True) -> dict[str, Any]:
    """The state dict of a torchvision weights entry, downloaded once with its hash checked.

    Args:
        weights: a member of one of torchvision's weights enums, its name ("IMAGENET1K_V1",
            "DEFAULT"), or the URL of a checkpoint named like torch.hub's, with its hash.
        architecture: "densenet121", ...: whose enum a name is looked up in.

    Raises:
        ValueError: there is no such entry. RuntimeError: the file's hash is wrong.
    """
    if isinstance(weights, str) and "://" in weights:
        return torch.hub.load_state_dict_from_url(
            weights, map_location="cpu", check_hash=True, progress=progress
        )
    if isinstance(weights, str):
        models = import_torchvision("torchvision.models")
        if architecture not in models.list_models():
            raise ValueError(f"weights: torchvision has none for {architecture}, got {weights!r}")
        entries = models.get_model_weights(architecture)
        if weights not in entries.__members__:
            raise ValueError(
                f"weights must be one of {', '.join(entries.__members__)} for {architecture}, "
                f"got {weights!r}"
            )
        weights = entries[weights]
    if not hasattr(weights, "get_state_dict"):
        raise ValueError(
            f"weights must be a torchvision weights entry, its name or a URL, got {weights!r}"
        )
    return weights.get_state_dict(progress=progress, check_hash=True)
