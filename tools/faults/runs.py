"""Runs of `train` that are killed, interrupted or run out of disk space, and then resumed.

Every run ends, after one to three faults, as the uninterrupted run of the same command: checkpoint
(parameters, running statistics, momentum, schedule, scaler, generators, figures), weights and log
are compared bit by bit, except for what a clock or a memory meter says.

This process imports what the command needs and forks a child for each run, which takes a second
instead of ten. It must not have run a backward pass before: autograd's threads do not survive a
fork.
"""

from __future__ import annotations

import csv
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from densenet_efficient.cli.main import main
from densenet_efficient.train.checkpoint import read_checkpoint
from densenet_efficient.train.data import load_data

# Dropout and augmentation draw from the generators; 97 images leave a batch of one over.
COMMAND = (
    *("train", "--data", "digits", "--image-size", "8", "--limit", "97", "--batch", "32"),
    *("--depth", "10", "--growth-rate", "4", "--drop-rate", "0.2", "--epochs", "4", "--quiet"),
)
MEASURED = ("images_per_second", "seconds", "peak_memory_mb")
FILES = ("best.safetensors", "checkpoint.pt", "log.csv", "model.safetensors")


@dataclass
class Run:
    """One child: exit status (negative: the signal that ended it), what it printed to stderr, and
    how long it took."""

    status: int
    errors: str
    seconds: float


@dataclass
class Fault:
    """What happens to one run.

    ends: the exit statuses that it may have. inside: called in the child before the command begins.
    outside: called here with the child's pid, in a thread. space: bytes that the file system of the
    run has left.
    """

    name: str
    ends: tuple[int, ...]
    inside: Callable[[], None] | None = None
    outside: Callable[[int], None] | None = None
    space: int | None = None


def warm_up() -> None:
    """Imports here what the children would otherwise import one by one."""
    import tqdm  # noqa: F401

    load_data("digits", image_size=8)


def run(words: Sequence[str], fault: Fault | None = None) -> Run:
    """The command in a child of its own, whose session ends with it."""
    start = time.monotonic()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(list(words), writer, fault)
    os.close(writer)
    if fault is not None and fault.outside is not None:
        threading.Thread(target=fault.outside, args=(pid,), daemon=True).start()
    with open(reader, errors="replace") as file:
        # Workers that load data hold the pipe as well, for a while after the child.
        _, status = os.waitpid(pid, 0)
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        errors = file.read()
    return Run(os.waitstatus_to_exitcode(status), errors, time.monotonic() - start)


def _child(words: list[str], writer: int, fault: Fault | None) -> None:
    status = 70
    try:
        os.setsid()
        os.dup2(writer, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's & takes away
        if fault is not None and fault.inside is not None:
            fault.inside()
        status = main(words)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)


def contents(folder: Path) -> dict[str, Any]:
    """Everything in a finished run's folder, without what is measured and the words of the command
    line, which say that it was resumed."""
    state = read_checkpoint(folder / "checkpoint.pt")
    del state["arguments"]
    for row in state["history"]:
        for name in MEASURED:
            del row[name]
    with open(folder / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    log = [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]
    weights = {name: _weights(folder / name) for name in FILES if name.endswith("tensors")}
    return {
        "files": sorted(path.name for path in folder.iterdir()),
        "log": log,
        **state,
        **weights,
    }


def _weights(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        metadata, names = file.metadata(), list(file.keys())
        return {"metadata": metadata, **{name: file.get_tensor(name) for name in names}}


def difference(expected: Any, got: Any, where: str = "") -> str | None:
    """The first place in which two trees of values differ, None where they are equal bit by bit."""
    if type(expected) is not type(got):
        return f"{where}: {type(expected).__name__}, {type(got).__name__}"
    if isinstance(expected, torch.Tensor):
        same = expected.dtype == got.dtype and torch.equal(expected, got)
        return None if same else where
    if isinstance(expected, dict):
        if expected.keys() != got.keys():
            return f"{where}: keys"
        parts: Iterator[tuple[Any, Any, Any]] = ((k, v, got[k]) for k, v in expected.items())
    elif isinstance(expected, (list, tuple)):
        if len(expected) != len(got):
            return f"{where}: {len(expected)} values, {len(got)}"
        parts = ((i, a, b) for i, (a, b) in enumerate(zip(expected, got, strict=True)))
    else:
        return None if expected == got else f"{where}: {str(expected)[:40]}, {str(got)[:40]}"
    found = (difference(a, b, f"{where}/{key}") for key, a, b in parts)
    return next((one for one in found if one is not None), None)


def damage(folder: Path) -> str | None:
    """What is not whole in the folder of a run that a fault has ended."""
    for name in FILES:
        path = folder / name
        if not path.exists():
            continue
        try:
            if name == "checkpoint.pt":
                read_checkpoint(path)
            elif name == "log.csv":
                with open(path, newline="") as file:
                    assert all(None not in row.values() for row in csv.DictReader(file))
            else:
                _weights(path)
        except Exception as error:
            return f"{name} is damaged: {error}"
    return None
