"""Runs of `train` that meet one to three faults and are resumed: their ends are the uninterrupted
run's."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import kinds
from .runs import COMMAND, Fault, Run, contents, damage, difference, run

VARIANTS = (
    (),
    ("--memory", "store", "--accumulate", "2"),
    ("--amp", "bf16", "--ema-decay", "0.9"),
    ("--reference", "--clip-norm", "1"),
    ("--mixup", "0.4", "--cutmix", "1"),
    ("--workers", "1"),
)


@dataclass
class Uninterrupted:
    """What a command's run gives that nothing disturbs. lines: of the code that writes files."""

    contents: dict[str, Any]
    seconds: float
    lines: int


@dataclass
class Campaign:
    """Runs with faults, each from a seed of its own.

    variants: options added to the command, one lot drawn for each run. faults: met, by kind.
    failures: what was not as expected.
    """

    seed: int
    variants: Sequence[tuple[str, ...]] = VARIANTS
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="faults-")))
    faults: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    _disk: kinds.Disk | None = None
    _whole: dict[tuple[str, ...], Uninterrupted] = field(default_factory=dict)

    def uninterrupted(self, variant: tuple[str, ...]) -> Uninterrupted:
        """The run of a variant of the command that nothing disturbs; made once."""
        if variant not in self._whole:
            folder = self.folder / "uninterrupted" / "_".join(["run", *variant])
            counted = folder.with_suffix(".lines")

            def count() -> None:
                lines = os.open(counted, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
                kinds.trace_writing(lambda: bool(os.write(lines, b".")) or None)

            folder.parent.mkdir(parents=True, exist_ok=True)
            first = run([*COMMAND, *variant, "--out", str(folder)], Fault("", (0,), inside=count))
            again = run([*COMMAND, *variant, "--out", str(folder), "--overwrite"])
            if first.status or again.status:
                raise RuntimeError(f"{' '.join(variant)}: {first.errors}{again.errors}")
            self._whole[variant] = Uninterrupted(
                contents(folder), again.seconds, counted.stat().st_size
            )
        return self._whole[variant]

    def one(self, kind: str, index: int) -> int:
        """A run with up to three faults of a kind, and its end compared. Returns the faults."""
        rng = random.Random(f"{self.seed} {kind} {index}")
        # Shared memory, in which workers hand over images, is limited as files are.
        limited = kind == kinds.SHORT_FILES
        variant = rng.choice([v for v in self.variants if not (limited and "--workers" in v)])
        whole = self.uninterrupted(variant)
        folder = self.folder / "run"
        if kind == kinds.SMALL_DISK:
            self._disk = self._disk or kinds.Disk(self.folder / "disk")
            folder = self._disk.folder / "run"
        shutil.rmtree(folder, ignore_errors=True)
        wanted, met = rng.choice((1, 1, 2, 3)), 0
        story, problem = [f"seed {self.seed}, {kind} {index}, {' '.join(variant)}"], None
        for _ in range(10):
            words = [*COMMAND, *variant, "--out", str(folder)]
            if (folder / "checkpoint.pt").exists():
                words = ["train", "--resume", "--out", str(folder), "--quiet"]
            fault = self._fault(kind, rng, folder, whole) if met < wanted else None
            if self._disk is not None and fault is not None and fault.space is not None:
                self._disk.leave(fault.space)
            done = run(words, fault)
            if self._disk is not None:
                self._disk.leave(2**24)
            if done.status == 0:
                problem = None
                break
            story.append(fault.name if fault is not None else "resumed")
            problem = damage(folder)
            if fault is None or done.status not in fault.ends:
                problem = f"exit status {done.status}: {done.errors[-400:]}"
            elif done.status > 0:
                problem = problem or self._clean_end(done, folder)
            met += 1
            if problem is not None:
                break
        else:
            problem = "it does not come to an end"
        if problem is None:
            found = difference(whole.contents, contents(folder))
            problem = None if found is None else f"the end differs in {found}"
        if problem is not None:
            self.failures.append("; ".join([*story, problem]))
        self.faults[kind] = self.faults.get(kind, 0) + met
        return met

    @staticmethod
    def _clean_end(done: Run, folder: Path) -> str | None:
        """What an end that the program itself announced leaves to be desired."""
        lines = done.errors.strip().splitlines()
        if len(lines) != 1 or (done.status != 130 and str(folder) not in lines[0]):
            return f"expected one line that names the folder, got {done.errors[-400:]!r}"
        left = [path.name for path in folder.glob(".*")] if folder.exists() else []
        return f"left {left}" if left else None

    def _fault(self, kind: str, rng: random.Random, folder: Path, whole: Uninterrupted) -> Fault:
        faults = {
            kinds.ANY_MOMENT: lambda: kinds.at_any_moment(rng, whole.seconds),
            kinds.IN_A_FILE: lambda: kinds.while_a_file_is_written(rng, folder),
            kinds.AT_A_LINE: lambda: kinds.at_a_line_that_writes(rng, whole.lines),
            kinds.CTRL_C: lambda: kinds.at_any_moment(rng, whole.seconds, signal.SIGINT),
            kinds.SHORT_FILES: lambda: kinds.short_files(rng),
            kinds.SMALL_DISK: lambda: kinds.small_disk(rng),
        }
        return faults[kind]()

    def several(self, kind: str, count: int) -> None:
        """Runs until so many faults of a kind have been met."""
        index = met = 0
        while met < count and len(self.failures) < 20:
            met += self.one(kind, index)
            index += 1

    def close(self) -> None:
        """Removes the folders."""
        if self._disk is not None:
            self._disk.close()
        shutil.rmtree(self.folder, ignore_errors=True)
