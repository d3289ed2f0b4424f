"""Training that begins with weights made elsewhere, and parts of a network that keep theirs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import nn

from ..models.networks import NetworkSpec
from ..models.pretrained import fetch_weights, load_weights, published_classes

__all__ = ["freeze", "start_from", "train_mode"]


def start_from(model: nn.Module, network: NetworkSpec, weights: str) -> bool:
    """Load weights into the model, all but a classifier for another number of classes, which stays
    as it was initialised. Returns whether the classifier was loaded.

    Args:
        weights: a file, URL, hf-hub:OWNER/NAME or the name of a torchvision entry.

    Raises:
        ValueError: there is no such file or entry, or it is of another network; nothing is changed.
    """
    state = fetch_weights(weights, network.name)
    classes = published_classes(state) or network.num_classes
    if classes == network.num_classes:
        load_weights(model, state, source=f"weights {weights}")
        return True
    other = dataclasses.replace(network, num_classes=classes).build("reference")
    loaded = load_weights(other, state, source=f"weights {weights}").state_dict()
    own = {name: loaded[name] for name in loaded if not name.startswith("classifier.")}
    model.load_state_dict(own, strict=False)
    return False


def freeze(model: nn.Module, names: Sequence[str]) -> None:
    """The modules of these names keep their parameters, and in `train_mode` their running
    statistics.

    Raises:
        ValueError: no module has the name, or nothing would be left to train; nothing is changed.
    """
    modules = dict(model.named_modules())
    for name in names:
        if not name or name not in modules:
            known = [name for name in modules if name and name.count(".") < 2]
            raise ValueError(
                f"freeze: expected names of modules such as {', '.join(known[:8])}, got {name!r}"
            )
    frozen = {id(p) for name in names for p in modules[name].parameters()}
    if all(id(parameter) in frozen for parameter in model.parameters()):
        raise ValueError(f"freeze: expected a part that is left to train, got {' '.join(names)}")
    for name in names:
        modules[name].requires_grad_(False)


def train_mode(model: nn.Module, frozen: Sequence[str]) -> None:
    """Train mode, but for what is frozen: eval mode, without dropout and with running statistics
    that stay."""
    model.train()
    for name in frozen:
        model.get_submodule(name).eval()
