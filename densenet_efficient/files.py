"""Files that are the old one or the new one at any moment, whatever is killed.

A file is written next to its destination, flushed to the disk and then renamed over it. What is
read is compared with its checksums, and nothing in it is executed. Imports nothing of the package.
"""

from __future__ import annotations

import os
import pickle
import re
import secrets
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["load_tensors", "remove_leftovers", "write_atomically"]

# .NAME.PID.TOKEN; not tempfile's names and modes, which only the owner may read.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.[0-9a-f]{8}")


def load_tensors(path: str | os.PathLike[str]) -> Any:
    """What `torch.save` wrote, on the CPU. Nothing in the file is executed, and its checksums are
    compared, which torch leaves out.

    Raises:
        ValueError, OSError, or whatever else damaged bytes lead the readers to.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            "it is damaged, or holds more than tensors, numbers and words, which is not executed"
        ) from error


def write_atomically(path: str | os.PathLike[str], write: Callable[[str], object]) -> None:
    """Let ``write`` fill a temporary file in the folder of ``path``, then put it in its place.

    Args:
        path: the destination; its folder is made where it is missing.
        write: called with the name of the temporary file, which exists and is empty.

    The file has the mode that the umask gives a new file, whatever ``write`` sets.

    Raises:
        OSError: it cannot be written; the temporary file is removed and an older ``path`` stays, as
            after an interruption. A full disk comes from torch.save as a RuntimeError, from
            safetensors as an error of its own: both are put into an OSError that names ``path``.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        temporary.touch(exist_ok=False)
        mode = stat.S_IMODE(temporary.stat().st_mode)
        _fill(temporary, write, target)
        temporary.chmod(mode)
        _sync(temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself lives in the folder
        _sync(target.parent)


def _fill(temporary: Path, write: Callable[[str], object], target: Path) -> None:
    try:
        write(str(temporary))
    except (OSError, MemoryError):
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        free = shutil.disk_usage(target.parent).free / 1e6
        raise OSError(
            f"{target} could not be written: {type(error).__name__}: {reason}; {free:,.1f} MB are "
            "free there"
        ) from error


def remove_leftovers(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove the temporary files of processes that were killed while they wrote into ``folder``;
    returns their paths. Files of processes that are alive stay."""
    removed = []
    for path in sorted(Path(folder).glob(".*")):
        found = _TEMPORARY.fullmatch(path.name)
        if found and not _is_alive(int(found["pid"])):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _is_alive(pid: int) -> bool:
    if os.name != "posix":  # there signal 0 is not a question
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is somebody else's, or cannot be told
        return True
    return True


def _sync(path: Path) -> None:
    # A folder can only be opened for reading; Windows syncs only what is open for writing.
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
