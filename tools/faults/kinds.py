"""What can happen to a run of `train` from outside: killed, interrupted, or without space."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .runs import FILES, Fault

ANY_MOMENT, IN_A_FILE, AT_A_LINE = KILLS = (
    "killed at any moment",
    "killed while a file is written",
    "killed at a line that writes",
)
CTRL_C, SHORT_FILES, SMALL_DISK = OTHERS = (
    "interrupted by ctrl-C",
    "with files limited in size",
    "on a disk that is too small",
)
WRITING = ("files.py", "checkpoint.py", "outputs.py")


def trace_writing(at_line: Callable[[], None]) -> None:
    """Calls at_line at every line of the code that writes files."""

    def trace(frame: types.FrameType, event: str, argument: Any) -> Any:
        path = frame.f_code.co_filename
        if "densenet_efficient" not in path or not path.endswith(WRITING):
            return None
        if event == "line":
            at_line()
        return trace

    sys.settrace(trace)


def at_any_moment(rng: random.Random, seconds: float, number: int = signal.SIGKILL) -> Fault:
    """A signal at a moment of the run's usual duration."""
    delay = rng.uniform(0.05, 1.1 * seconds)  # not before the command has begun

    def send(pid: int) -> None:
        time.sleep(delay)
        _send(pid, number)

    if number == signal.SIGKILL:
        return Fault(f"SIGKILL after {delay:.3f} s", (-signal.SIGKILL,), outside=send)
    return Fault(f"ctrl-C after {delay:.3f} s", (130,), outside=send)


def while_a_file_is_written(rng: random.Random, folder: Path) -> Fault:
    """SIGKILL when the n-th temporary file of a kind is seen in the folder."""
    name = rng.choice(FILES)
    count, delay = (1 if name == "model.safetensors" else rng.randint(1, 3)), rng.uniform(0, 0.002)

    def watch(pid: int) -> None:
        seen: set[str] = set()
        while len(seen) < count:
            try:
                seen |= {e for e in os.listdir(folder) if e.startswith(f".{name}.{pid}.")}
                os.kill(pid, 0)
            except FileNotFoundError:
                pass
            except ProcessLookupError:
                return
        time.sleep(delay)
        _send(pid, signal.SIGKILL)

    return Fault(f"SIGKILL in writing of {name} number {count}", (-signal.SIGKILL,), outside=watch)


def at_a_line_that_writes(rng: random.Random, lines: int) -> Fault:
    """SIGKILL at one of the lines of the code that writes files."""
    wanted = rng.randrange(lines)

    def begin() -> None:
        left = wanted

        def at_line() -> None:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

        trace_writing(at_line)

    return Fault(f"SIGKILL at line {wanted} of those that write", (-signal.SIGKILL,), inside=begin)


def short_files(rng: random.Random) -> Fault:
    """No file of the run may grow past a limit, below the size of a checkpoint."""
    limit = rng.randrange(60_000)

    def begin() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return Fault(f"files may have {limit} bytes", (1, 2), inside=begin)


def small_disk(rng: random.Random) -> Fault:
    """A file system with room for a part of what the run writes."""
    size = rng.randrange(40, 170) * 1024
    return Fault(f"{size} bytes are left on the disk", (1, 2), space=size)


class Disk:
    """A file system in memory, whose size may change. PermissionError where none may be mounted."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._mount("-t", "tmpfs", "-o", "size=16m", "none")

    def leave(self, size: int) -> None:
        """Makes it as large as what it holds and so many bytes more."""
        now = os.statvfs(self.folder)
        used = (now.f_blocks - now.f_bfree) * now.f_frsize
        self._mount("-o", f"remount,size={used + size}")

    def close(self) -> None:
        """Takes it away."""
        subprocess.run(["umount", str(self.folder)], check=True)

    def _mount(self, *options: str) -> None:
        done = subprocess.run(
            ["mount", *options, str(self.folder)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise PermissionError(done.stderr.strip())


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
