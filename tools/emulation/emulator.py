"""The emulation seen from Python: a worker process that runs one operator at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from .build import EmulationError, Mutation, build, sanitizer_runtime
from .report import Launch
from .worker import receive, send, tensors

WORKER = Path(__file__).with_name("worker.py")
# Fresh heap memory is NaN; the interpreter itself leaks at exit.
SANITIZER = (
    "detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255:malloc_context_size=4"
)


@dataclass(frozen=True)
class Device:
    """What launchers size their grids and tiles by: a small Hopper device, unless told otherwise.

    multiprocessors: positive. shared_bytes: the most that one block may ask for; launches that ask
    for more are refused.
    """

    multiprocessors: int = 4
    shared_bytes: int = 227 << 10


HOPPER = Device()


class Emulator:
    """Runs the CUDA launchers and kernels of some operators (default: all) on CPU tensors.

        with Emulator(["channel_stats"]) as emulator:
            launches = emulator.call("channel_stats", x, stats, seed=3)

    The worker starts with the first call, and anew after the sanitizer ended it. sanitize=False is
    faster and leaves out-of-bounds accesses to global memory unseen.

    Of the last call, workspace_bytes: the most bytes of workspaces that were live at a time;
    unused_workspace_bytes: those that no kernel stored to.
    """

    workspace_bytes = 0
    unused_workspace_bytes = 0

    def __init__(
        self,
        operators: Sequence[str] | None = None,
        *,
        mutations: Sequence[Mutation] = (),
        sanitize: bool = True,
    ) -> None:
        self.library = build(operators, mutations=mutations, sanitize=sanitize)
        self.sanitize = sanitize
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the emulator)

    def call(
        self, op: str, *arguments: Any, seed: int = 0, device: Device = HOPPER
    ) -> list[Launch]:
        """Calls torch.ops.densenet_efficient.`op`; tensors are written as the operator writes them.

        seed: the order in which threads run: 0 ascending, 1 descending, others shuffled; even ones
        delay asynchronous copies as long as they may be. device: what the launcher sees. Of meta
        tensors, however large, the launches are only listed: nothing runs or is counted. Returns
        the counters of every launch. Raises EmulationError with the message of whatever was broken.
        """
        process = self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            send(process.stdin, (op, list(arguments), seed, astuple(device)))
            reply = receive(process.stdout)
        except BrokenPipeError:
            reply = None
        if reply is None:
            raise EmulationError(self._last_words())
        after, report, error = reply
        if error is not None:
            raise EmulationError(error.splitlines()[0])
        if after:
            _copy_back(arguments, after)
        counted = json.loads(report)
        self.workspace_bytes = counted["workspace"]["peak"]
        self.unused_workspace_bytes = counted["workspace"]["unused"]
        return [Launch.from_json(launch) for launch in counted["launches"]]

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()
            self._process = None

    def __enter__(self) -> Emulator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        self._log.close()

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            environment = dict(os.environ)
            if self.sanitize:
                environment |= {"LD_PRELOAD": sanitizer_runtime(), "ASAN_OPTIONS": SANITIZER}
            self._process = subprocess.Popen(
                [sys.executable, str(WORKER), str(self.library)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=environment,
            )
        return self._process

    def _last_words(self) -> str:
        """What a worker that died wrote: the sanitizer's summary, or all of it."""
        self.close()
        self._log.seek(0)
        text = self._log.read().decode(errors="replace")
        self._log.seek(0)
        self._log.truncate()
        summaries = [line for line in text.splitlines() if line.startswith("SUMMARY")]
        return f"the worker ended: {summaries[-1]}\n{text}" if summaries else text


def _copy_back(before: Sequence[Any], after: Sequence[Any]) -> None:
    """Copies whole storages, so that a stray write outside a view is seen by the caller, too."""
    for old, new in zip(before, after, strict=True):
        for own, written in zip(tensors(old), tensors(new), strict=True):
            own.untyped_storage().copy_(written.untyped_storage())
