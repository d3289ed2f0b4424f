"""What a plain PyTorch model keeps alive during a training step, operator by operator.

On the meta device: shapes and lifetimes are the real ones, and nothing is computed. What an
operator needs for itself while it runs is not seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

CONCATENATED = "concatenations"
NORMALISED = "normalised and rectified copies"
CONVOLVED = "outputs of convolutions"
OTHER = "everything else"
_KINDS = {"cat": CONCATENATED, "native_batch_norm": NORMALISED, "convolution": CONVOLVED}


class Live(TorchDispatchMode):
    """Follows every storage that an operator makes, until it is gone.

    history: (name of the part of the network, bytes by kind) after each operator that makes one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.history: list[tuple[str, Counter[str]]] = []
        self.part = ""
        self._storages: Any = WeakIdKeyDictionary()

    def known(self, tensors: Any) -> None:
        """Leaves out what was there before the step."""
        for tensor in tensors:
            self._storages[tensor.untyped_storage()] = (OTHER, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        kind = _KINDS.get(func.overloadpacket.__name__, OTHER)
        new = False
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._storages:
                storage = tensor.untyped_storage()
                self._storages[storage] = (kind, storage.nbytes())
                new = True
        if new:
            live: Counter[str] = Counter()
            for kind, size in self._storages.values():
                live[kind] += size
            self.history.append((self.part, live))
        return result


@contextmanager
def _parts_named(model: nn.Module, live: Live) -> Iterator[None]:
    """Lets `live.part` say "forward NAME" or "backward NAME" of the children of the features."""
    hooks = []
    for name, child in model.features.named_children():  # type: ignore[union-attr,operator]

        def before(module: nn.Module, inputs: Any, name: str = name) -> None:
            live.part = f"forward {name}"

        def after(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
            def arrives(gradient: Tensor) -> None:
                live.part = f"backward {name}"

            output.register_hook(arrives)

        hooks += [child.register_forward_pre_hook(before), child.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def step(model: nn.Module, images: Tensor) -> tuple[list[tuple[str, Counter[str]]], int]:
    """The history of a training step of a model on the meta device, and the index in it of the
    last entry of the forward pass."""
    live = Live()
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    live.known((*model.parameters(), *model.buffers(), images, labels))
    with _parts_named(model, live), live:
        loss = nn.functional.cross_entropy(model(images), labels)
        forward = len(live.history) - 1
        live.part = "backward classifier"
        loss.backward()
    return live.history, forward
