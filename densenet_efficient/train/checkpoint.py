"""Checkpoints: written atomically, read back whole or not at all.

Reading checks the file, its version and every tensor against the model, the optimiser and the
schedule *before* any of them is touched: a foreign or damaged file leaves all of them as they were.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..files import load_tensors, write_atomically
from .rng import check_random_state, random_state, restore_random_state

__all__ = [
    "COLUMNS",
    "CheckpointError",
    "evaluated_state",
    "export_safetensors",
    "read_checkpoint",
    "restore_checkpoint",
    "save_checkpoint",
]

FORMAT = "densenet-efficient checkpoint"
VERSION = 3
_ENTRIES = {
    "description": dict,
    "model": dict,
    "optimizer": dict,
    "schedule": dict,
    "scaler": dict,
    "average": dict,
    "random": dict,
    "epoch": int,
    "history": list,
    "arguments": list,
}
COLUMNS = (
    "epoch",
    "learning_rate",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "images_per_second",
    "seconds",
    "peak_memory_mb",
)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or that belongs to something else."""


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    average: AveragedModel | None,
    description: Mapping[str, Any],
    epoch: int,
    history: list[dict[str, Any]],
    arguments: Sequence[str] = (),
) -> None:
    """Write everything that the rest of a run depends on, atomically.

    Args:
        description: plain values saying what is trained (network, data, recipe); a checkpoint is
            resumed only where they are equal.
        epoch: epochs finished.
        history: one row of figures, `COLUMNS`, for each of them.
        arguments: of the command line that trains, if one does.
    """
    state = {
        "format": FORMAT,
        "version": VERSION,
        "description": dict(description),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "scaler": scaler.state_dict(),
        "average": {} if average is None else average.state_dict(),
        "random": random_state(),
        "epoch": epoch,
        "history": history,
        "arguments": list(arguments),
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
        state = load_tensors(path)
    except Exception as error:  # damaged bytes lead the unpickler to errors of any kind
        first_line = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"checkpoint {path} cannot be read, it is damaged or not a checkpoint: "
            f"{type(error).__name__}: {first_line}"
        ) from error
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if not isinstance(found, str) or found != FORMAT:
        raise CheckpointError(
            f"checkpoint {path}: expected a file with format {FORMAT!r}, got {found!r}"
        )
    version = state.get("version")
    if not isinstance(version, int) or version != VERSION:
        raise CheckpointError(f"checkpoint {path}: expected version {VERSION}, got {version!r}")
    for entry, kind in _ENTRIES.items():
        if not isinstance(state.get(entry), kind) or isinstance(state.get(entry), bool):
            raise CheckpointError(
                f"checkpoint {path}: expected entry {entry!r} of type {kind.__name__}, "
                f"got {type(state.get(entry)).__name__}"
            )
    _check_history(path, state["epoch"], state["history"])
    if not all(isinstance(word, str) for word in state["arguments"]):
        raise CheckpointError(f"checkpoint {path}: expected arguments to be words")
    return state


def _check_history(path: str | os.PathLike[str], epoch: int, history: list[Any]) -> None:
    if epoch != len(history):
        raise CheckpointError(
            f"checkpoint {path}: expected one row of figures for each of {epoch} epochs, got "
            f"{len(history)}"
        )
    for row in history:
        numbers = isinstance(row, dict) and all(map(_is_number, row.values()))
        if not numbers or tuple(row) != COLUMNS:
            raise CheckpointError(
                f"checkpoint {path}: expected rows of the figures {', '.join(COLUMNS)}, got {row!r}"
            )


def evaluated_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of the network that a checkpoint's run evaluates: the averaged one, if any."""
    prefix = "module."
    averaged = {
        name.removeprefix(prefix): tensor
        for name, tensor in state["average"].items()
        if name.startswith(prefix)
    }
    return averaged or state["model"]


def restore_checkpoint(
    state: Mapping[str, Any],
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler | None,
    scaler: torch.amp.GradScaler,
    average: AveragedModel | None,
    description: Mapping[str, Any],
) -> None:
    """Load what :func:`read_checkpoint` returned; random generators included.

    Args:
        schedule: None leaves out the checkpoint's, which is of another number of epochs.

    Raises:
        CheckpointError: it belongs to another network, data, recipe or optimiser, or holds values
            that these cannot have. Nothing has been changed then.
    """
    _check_equal("description", dict(description), state["description"])
    _check_tensors("model", model.state_dict(), state["model"])
    _check_optimizer(optimizer, state["optimizer"])
    if schedule is not None:
        _check_like("schedule", schedule.state_dict(), state["schedule"])
    _check_like("scaler", scaler.state_dict(), state["scaler"])
    _check_tensors("average", {} if average is None else average.state_dict(), state["average"])
    _check_equal("random generators", sorted(random_state()), sorted(map(str, state["random"])))
    try:
        check_random_state(state["random"])
    except ValueError as error:
        raise CheckpointError(f"checkpoint's {error}") from error
    model.load_state_dict(state["model"])
    pairs = zip(optimizer.param_groups, state["optimizer"]["param_groups"], strict=True)
    groups = [_with_own_fused(own, group) for own, group in pairs]
    optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
    if schedule is not None:
        schedule.load_state_dict(state["schedule"])
    scaler.load_state_dict(state["scaler"])
    if average is not None:
        average.load_state_dict(state["average"])
    restore_random_state(state["random"])


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _check_equal(what: str, expected: Any, got: Any) -> None:
    if isinstance(expected, dict) and isinstance(got, dict):
        for key in sorted({*expected, *got}, key=str):
            _check_equal(f"{what}: {key}", expected.get(key), got.get(key))
        return
    sequences = isinstance(expected, (list, tuple)) and isinstance(got, (list, tuple))
    if sequences and len(expected) == len(got):
        for one, other in zip(expected, got, strict=True):
            _check_equal(what, one, other)
        return
    alike = type(expected) is type(got) or (_is_number(expected) and _is_number(got))
    if alike and expected == got:
        return
    raise CheckpointError(f"checkpoint's {what}: expected {_text(expected)}, got {_text(got)}")


def _check_like(what: str, expected: Any, got: Any) -> None:
    """The same entries, and in each a value of the same type."""
    if type(expected) is not type(got) and not (_is_number(expected) and _is_number(got)):
        raise CheckpointError(
            f"checkpoint's {what}: expected {type(expected).__name__}, got {_text(got)}"
        )
    if isinstance(expected, dict):
        if expected.keys() != got.keys():
            raise CheckpointError(
                f"checkpoint's {what}'s entries: expected {sorted(map(str, expected))}, got "
                f"{sorted(map(str, got))}"
            )
        for key, value in expected.items():
            _check_like(f"{what}: {key}", value, got[key])
    elif isinstance(expected, (list, tuple)):
        if len(expected) != len(got):
            raise CheckpointError(
                f"checkpoint's {what}: expected {len(expected)} values, got {len(got)}"
            )
        for one, other in zip(expected, got, strict=True):
            _check_like(what, one, other)
    elif isinstance(expected, Tensor):
        _check_tensor(what, expected, got)


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
        _check_tensor(f"{what}: {name}", tensor, got[name])


def _check_tensor(what: str, expected: Tensor, got: Any) -> None:
    """A tensor on the CPU of the same shape and dtype."""
    if not isinstance(got, Tensor):
        raise CheckpointError(
            f"checkpoint's {what}: expected {tuple(expected.shape)}, got {type(got).__name__}"
        )
    if got.shape != expected.shape:
        raise CheckpointError(
            f"checkpoint's {what}: expected {tuple(expected.shape)}, got {tuple(got.shape)}"
        )
    if got.dtype != expected.dtype or got.layout != torch.strided or got.device.type != "cpu":
        raise CheckpointError(
            f"checkpoint's {what}: expected {expected.dtype} values, got {got.dtype}, "
            f"{got.layout}, {got.device}"
        )


def _with_own_fused(own: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's group as this run takes it: whether its steps are fused is its own affair."""
    return {name: own[name] if name == "fused" else value for name, value in group.items()}


def _check_optimizer(optimizer: torch.optim.Optimizer, got: Mapping[str, Any]) -> None:
    groups, parameters = got.get("param_groups"), got.get("state")
    if not isinstance(groups, list) or not isinstance(parameters, dict):
        raise CheckpointError(
            "checkpoint's optimizer: expected param_groups and state, got neither"
        )
    expected = optimizer.state_dict()["param_groups"]
    if len(groups) != len(expected) or not all(isinstance(group, dict) for group in groups):
        raise CheckpointError(
            f"checkpoint's optimizer: expected {len(expected)} groups of parameters, got "
            f"{_text(groups)}"
        )
    _check_equal(
        "optimizer: parameters in each group",
        [group["params"] for group in expected],
        [group.get("params") for group in groups],
    )
    for ours, group in zip(expected, groups, strict=True):
        fused = group.get("fused")
        if not (fused is None or isinstance(fused, bool)):
            raise CheckpointError(
                f"checkpoint's optimizer: fused: expected True, False or None, got {_text(fused)}"
            )
        theirs = _with_own_fused(ours, group)
        _check_like("optimizer", ours, theirs)
        fixed = {name: value for name, value in ours.items() if name != "lr"}
        _check_equal("optimizer", fixed, {name: theirs[name] for name in fixed})
        if not (math.isfinite(theirs["lr"]) and theirs["lr"] >= 0):
            raise CheckpointError(
                f"checkpoint's optimizer: lr: expected a number >= 0, got {theirs['lr']}"
            )
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entry in parameters.items():
        known = type(index) is int and 0 <= index < len(own) and isinstance(entry, dict)
        if not known or any(name != "momentum_buffer" for name in entry):
            raise CheckpointError(
                f"checkpoint's optimizer: expected momentum_buffer of {len(own)} parameters, got "
                f"{_text(entry)} of {_text(index)}"
            )
        for name, value in entry.items():
            if value is not None:  # of a parameter without a gradient
                _check_tensor(f"optimizer: {name} of parameter {index}", own[index], value)


def export_safetensors(
    model: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, Any]
) -> None:
    """Write the model's state dict as safetensors, atomically, with ``metadata`` as strings."""
    from safetensors.torch import save

    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    text = {key: str(value) for key, value in metadata.items()}
    # Not save_file, which has a temporary file of its own that a killed process would leave.
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(save(tensors, text)))
