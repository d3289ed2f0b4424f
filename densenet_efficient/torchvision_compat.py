"""Import torchvision, also where its compiled operators do not fit the installed torch.

We need only torchvision's Python parts: data sets, transforms and its DenseNet as a peer. Its wheel
is built for one torch, and next to another build of the same release (the registry's CUDA wheel
next to a CPU-only torch) the compiled operators do not load; `import torchvision` then fails while
it describes `nms` and `qnms`, which nothing here uses. Declaring those two schemas first is enough.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

__all__ = ["import_torchvision"]

_SCHEMAS = ("nms", "qnms")
_ARGUMENTS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def import_torchvision(name: str = "torchvision") -> ModuleType:
    """Return torchvision or one of its submodules.

    Args:
        name: the module, such as "torchvision.models".

    Raises:
        ImportError: torchvision is not installed, or does not work with this torch; the message
            says which versions met.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name} is needed for this: expected an installed torchvision, got: {error}. "
            "Install it with `pip install torchvision`."
        ) from error
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for operator in _SCHEMAS:
        if not hasattr(torch.ops.torchvision, operator):
            torch.library.define(f"torchvision::{operator}", _ARGUMENTS)
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        from importlib.metadata import version

        raise ImportError(
            f"{name}: expected a torchvision that fits torch {torch.__version__}, "
            f"got torchvision {version('torchvision')}: {error}"
        ) from error
