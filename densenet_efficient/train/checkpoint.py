"""Checkpoints: written atomically, read back whole or not at all.

Reading checks the file, its version and every tensor against the model, the optimiser and the
schedule *before* any of them is touched: a foreign or damaged file leaves all of them as they were.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import write_atomically
from .rng import random_state, restore_random_state

__all__ = [
    "CheckpointError",
    "export_safetensors",
    "read_checkpoint",
    "restore_checkpoint",
    "save_checkpoint",
]

FORMAT = "densenet-efficient checkpoint"
VERSION = 1
_ENTRIES = {
    "description": dict,
    "model": dict,
    "optimizer": dict,
    "schedule": dict,
    "scaler": dict,
    "random": dict,
    "epoch": int,
    "history": list,
}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or that belongs to something else."""


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    description: Mapping[str, Any],
    epoch: int,
    history: list[dict[str, Any]],
) -> None:
    """Write everything that the rest of a run depends on, atomically.

    Args:
        description: plain values saying what is trained (network, data, recipe); a checkpoint is
            resumed only where they are equal.
        epoch: epochs finished.
        history: one row of figures for each of them.
    """
    state = {
        "format": FORMAT,
        "version": VERSION,
        "description": dict(description),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "scaler": scaler.state_dict(),
        "random": random_state(),
        "epoch": epoch,
        "history": history,
    }
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in it is executed (``weights_only``).

    Raises:
        CheckpointError: missing, damaged, not ours, or of another version; the message names the
            file and what was found.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"checkpoint {path}: expected a file, got none there")
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not compare the checksums it writes
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes lead the unpickler to errors of any kind
        first_line = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"checkpoint {path} cannot be read, it is damaged or not a checkpoint: "
            f"{type(error).__name__}: {first_line}"
        ) from error
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if found != FORMAT:
        raise CheckpointError(
            f"checkpoint {path}: expected a file with format {FORMAT!r}, got {found!r}"
        )
    if state.get("version") != VERSION:
        raise CheckpointError(
            f"checkpoint {path}: expected version {VERSION}, got {state.get('version')!r}"
        )
    for entry, kind in _ENTRIES.items():
        if not isinstance(state.get(entry), kind):
            raise CheckpointError(
                f"checkpoint {path}: expected entry {entry!r} of type {kind.__name__}, "
                f"got {type(state.get(entry)).__name__}"
            )
    return state


def restore_checkpoint(
    state: Mapping[str, Any],
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    description: Mapping[str, Any],
) -> None:
    """Load what :func:`read_checkpoint` returned; random generators included.

    Raises:
        CheckpointError: it belongs to another network, data, recipe or optimiser. Nothing has been
            changed then.
    """
    _check_equal("description", dict(description), state["description"])
    _check_tensors("model", model.state_dict(), state["model"])
    _check_optimizer(optimizer, state["optimizer"])
    _check_equal("schedule's entries", sorted(schedule.state_dict()), sorted(state["schedule"]))
    _check_equal("scaler's entries", sorted(scaler.state_dict()), sorted(state["scaler"]))
    _check_equal("random generators", sorted(random_state()), sorted(state["random"]))
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    scaler.load_state_dict(state["scaler"])
    restore_random_state(state["random"])


def _check_equal(what: str, expected: Any, got: Any) -> None:
    if isinstance(expected, dict) and isinstance(got, dict):
        for key in sorted({*expected, *got}):
            _check_equal(f"{what}: {key}", expected.get(key), got.get(key))
    elif expected != got:
        raise CheckpointError(f"checkpoint's {what}: expected {expected!r}, got {got!r}")


def _check_tensors(what: str, expected: Mapping[str, Tensor], got: Mapping[str, Any]) -> None:
    missing = [name for name in expected if name not in got]
    unknown = [name for name in got if name not in expected]
    if missing or unknown:
        name = (missing or unknown)[0]
        raise CheckpointError(
            f"checkpoint's {what}: expected the {len(expected)} tensors of this network, got "
            f"{len(missing)} missing and {len(unknown)} unknown, such as {name!r}"
        )
    for name, tensor in expected.items():
        other = got[name]
        if not isinstance(other, Tensor) or other.shape != tensor.shape:
            shape = tuple(other.shape) if isinstance(other, Tensor) else type(other).__name__
            raise CheckpointError(
                f"checkpoint's {what}: {name}: expected {tuple(tensor.shape)}, got {shape}"
            )


def _check_optimizer(optimizer: torch.optim.Optimizer, got: Mapping[str, Any]) -> None:
    groups, parameters = got.get("param_groups"), got.get("state")
    if not isinstance(groups, list) or not isinstance(parameters, dict):
        raise CheckpointError(
            "checkpoint's optimizer: expected param_groups and state, got neither"
        )
    expected = optimizer.state_dict()["param_groups"]
    _check_equal(
        "optimizer: parameters in each group",
        [group["params"] for group in expected],
        [group.get("params") for group in groups],
    )
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entry in parameters.items():
        for name, value in entry.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != own[index].shape:
                raise CheckpointError(
                    f"checkpoint's optimizer: {name} of parameter {index}: expected "
                    f"{tuple(own[index].shape)}, got {tuple(value.shape)}"
                )


def export_safetensors(
    model: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, Any]
) -> None:
    """Write the model's state dict as safetensors, atomically, with ``metadata`` as strings.

    Raises:
        ImportError: safetensors is not installed.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("exporting weights needs `pip install safetensors`") from error
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    text = {key: str(value) for key, value in metadata.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=text))
