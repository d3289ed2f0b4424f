"""The folder of a run: checked before anything is trained, then its logs and weights.

checkpoint.pt        everything that the rest of the run depends on (see `checkpoint`)
log.csv              one row of figures an epoch
best.safetensors     the weights after the epoch with the highest held-out accuracy
model.safetensors    the weights after the last epoch
tensorboard/         where it is asked for
trace.json, ...      likewise (see `profiling`)
"""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..files import remove_leftovers, write_atomically
from ..models.networks import NetworkSpec
from .checkpoint import COLUMNS, export_safetensors
from .data import Data

__all__ = [
    "check_installed",
    "check_unused",
    "open_tensorboard",
    "prepare_folder",
    "write_log",
    "write_weights",
]


def check_installed(*modules: str) -> None:
    """ImportError that names the extra to install, where one of the modules is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"training needs {' and '.join(missing)}: pip install 'densenet-efficient[train]'"
        )


def check_unused(checkpoint: Path) -> None:
    """ValueError where the folder holds a run, which a new one would overwrite."""
    if checkpoint.exists():
        raise ValueError(
            f"out: expected a folder without a run, or resume or overwrite, got {checkpoint}"
        )


def prepare_folder(folder: Path, model: nn.Module, copies: int) -> None:
    """Make the folder, try to write into it and remove what a killed run left half written.

    Raises:
        ValueError: it cannot be written, or a first checkpoint and the best weights, `copies` of
            the model together, do not fit.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        remove_leftovers(folder)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ValueError(
            f"out: expected a folder that can be written, got {folder}: {error.strerror}"
        ) from error
    needed = copies * sum(tensor.nbytes for tensor in model.state_dict().values())
    if free < needed:
        raise ValueError(
            f"out: expected {needed / 1e6:,.0f} MB of free space for a checkpoint and weights, got "
            f"{free / 1e6:,.0f} MB in {folder}"
        )


def write_weights(
    model: nn.Module, path: Path, network: NetworkSpec, data: Data, row: Mapping[str, Any]
) -> None:
    """Weights, and as metadata what they are of: network (as NetworkSpec's fields), data, names of
    the classes, image size, epoch and held-out accuracy."""
    metadata = {
        "format": "pt",
        "model": network.title,
        "network": json.dumps(network.describe()),
        "data": data.name,
        "classes": json.dumps(data.classes),
        "image_size": data.image_size,
        "epochs": row["epoch"],
        "test_accuracy": row["test_accuracy"],
    }
    export_safetensors(model, path, metadata)


def write_log(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """One row an epoch, as CSV."""

    def write(temporary: str) -> None:
        with open(temporary, "w", newline="") as file:
            table = csv.DictWriter(file, fieldnames=COLUMNS)
            table.writeheader()
            table.writerows(history)

    write_atomically(path, write)


def open_tensorboard(folder: Path, first_epoch: int) -> Any:
    """A writer of TensorBoard's log, in which steps from `first_epoch` on are written anew."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=first_epoch)
