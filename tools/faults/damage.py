"""Checkpoints and weights that are cut off, damaged, foreign or malicious: refused in one line that
names the file, nothing in them executed, nothing changed or written."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from densenet_efficient.cli.main import main
from densenet_efficient.models.densenet import densenet_cifar
from densenet_efficient.models.pretrained import load_weights, read_weights

from .runs import COMMAND

SMALL = dict(depth=10, growth_rate=4, in_channels=1)


class Malicious:
    """Pickled, it makes a file where it is executed."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.flag}'",)


def _silent(words: list[str]) -> tuple[int, list[str]]:
    """A command's exit status and lines on stderr."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        status = main(words)
    return status, errors.getvalue().strip().splitlines()


class Bench:
    """A folder with good files, and who reads them.

    folder: of the good files. flag: what a malicious file would make. cases, problems: so far.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.flag = folder, folder / "flag"
        self.cases, self.problems = 0, list[str]()
        status, errors = _silent([*COMMAND, "--epochs", "1", "--out", str(folder / "run")])
        assert status == 0, errors
        self.checkpoint = folder / "run" / "checkpoint.pt"
        self.model = densenet_cifar(**SMALL)
        self.pth, self.safetensors = folder / "good.pth", folder / "good.safetensors"
        torch.save(self.model.state_dict(), self.pth)
        shutil.copy(folder / "run" / "model.safetensors", self.safetensors)
        self.out = folder / "out"

    def readers(self, file: Path) -> dict[str, Callable[[], tuple[int, list[str]]]]:
        """Who is given a bad file; each answers with an exit status and lines."""
        resume = ["train", "--resume", str(file), "--out", str(self.out), "--quiet"]
        start = [*COMMAND, "--out", str(self.out), "--weights", str(file)]
        write = ["convert-weights", str(file), str(self.out / "new.safetensors")]
        commands = {"train --weights": start, "convert-weights": write}
        if file.suffix == ".pt":
            commands = {"train --resume": resume}
        found = {name: functools.partial(_silent, words) for name, words in commands.items()}
        if file.suffix != ".pt":
            found["load_weights"] = lambda: _raised(
                lambda: load_weights(self.model, read_weights(file))
            )
        return found

    def refused(self, file: Path, what: str, train: bool = True) -> None:
        """Holds every reader of a bad file to its duty; with train, also the one that first reads a
        data set."""
        for name, read in self.readers(file).items():
            if name == "train --weights" and not train:
                continue
            before = {key: value.clone() for key, value in self.model.state_dict().items()}
            status, lines = read()
            self.cases += 1
            wrong = []
            named = name == "load_weights" or file.name in "".join(lines)  # it is given no file
            if status != 2 or len(lines) != 1 or not named:
                wrong.append(f"exit status {status}, {lines}")
            if self.flag.exists():
                wrong.append("executed what was in the file")
                self.flag.unlink()
            if self.out.exists():
                wrong.append(f"wrote {[path.name for path in self.out.rglob('*')]}")
                shutil.rmtree(self.out)
            now = self.model.state_dict()
            if not all(torch.equal(before[key], now[key]) for key in before):
                wrong.append("changed the model")
            self.problems += [f"{name} of {file.name}, {what}: {text}" for text in wrong]

    def bytes_wrong(self, count: int, rng: random.Random) -> None:
        """Every kind of file cut off at so many places; and where it has checksums, one byte wrong
        in as many."""
        for good in (self.checkpoint, self.pth, self.safetensors):
            whole = good.read_bytes()
            bad = self.folder / f"bad{good.suffix}"
            for index in range(count):
                end = len(whole) * index // count
                bad.write_bytes(whole[:end])
                self.refused(bad, f"cut off after {end} bytes", index % 10 == 0)
            if good.suffix == ".safetensors":  # which has no checksums
                continue
            for index, place in enumerate(stored(good, count, rng)):
                bad.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
                self.refused(bad, f"byte {place} wrong", index % 10 == 0)

    def foreign(self) -> None:
        """Files of something else, and one that executes what it holds."""
        state = torch.load(self.checkpoint, weights_only=True)
        other = densenet_cifar(depth=16, growth_rate=4, in_channels=1).state_dict()
        contents = {
            "an empty file": b"",
            "text": b"epoch,loss\n1,2.3\n",
            "a list": [1, 2, 3],
            "nothing": None,
            "a module": nn.Linear(1, 1),
            "a command": Malicious(self.flag),
            "a command in a checkpoint": {**state, "history": Malicious(self.flag)},
            "a command among weights": {**other, "more": Malicious(self.flag)},
            "weights of another network": other,
            "a checkpoint of another program": {"epoch": 3, "state_dict": other, "best_acc1": 7.0},
        }
        torch.save(_described(state, "depth", 16), self.folder / "other.pt")
        self.refused(self.folder / "other.pt", "a checkpoint of another network")
        for name, content in contents.items():
            for suffix in (".pt", ".pth"):
                bad = self.folder / f"foreign{suffix}"
                if isinstance(content, bytes):
                    bad.write_bytes(content)
                else:
                    torch.save(content, bad)
                self.refused(bad, name)
        for suffix in (".pt", ".pth", ".safetensors"):
            self.refused(self.folder / f"missing{suffix}", "which does not exist")


def _raised(call: Callable[[], object]) -> tuple[int, list[str]]:
    """As a command that prints what the call raises; 70 for an error that is not announced."""
    try:
        call()
    except ValueError as error:
        return 2, str(error).splitlines()
    except Exception as error:
        return 70, [f"{type(error).__name__}: {error}"]
    return 0, []


def _described(state: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    network = {**state["description"]["network"], name: value}
    return {**state, "description": {**state["description"], "network": network}}


def stored(path: Path, count: int, rng: random.Random) -> Iterator[int]:
    """Random places in what an archive stores, which its checksums are of."""
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if member.file_size]
    for _ in range(count):
        member = rng.choice(members)
        with open(path, "rb") as file:
            file.seek(member.header_offset + 26)
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
        start = member.header_offset + 30 + name + extra
        yield start + rng.randrange(member.file_size)
