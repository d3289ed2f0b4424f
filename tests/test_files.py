"""Atomic writes: old file or new, the umask's mode, nothing left of killed processes."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from densenet_efficient.files import remove_leftovers, write_atomically


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda name: Path(name).write_text("old"))

    def fail(name: str) -> None:
        Path(name).write_text("half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_writer_s_own_error_names_the_file(tmp_path: Path) -> None:
    """torch.save says of a full disk: RuntimeError: unexpected pos 48192 vs 48120."""

    def fail(name: str) -> None:
        raise RuntimeError("unexpected pos\nat a line of C++")

    expected = r"/file could not be written: RuntimeError: unexpected pos; .* MB are free there\Z"
    with pytest.raises(OSError, match=expected):
        write_atomically(tmp_path / "file", fail)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_has_the_mode_of_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    """Also where the writer makes it private, as safetensors does."""

    def private(name: str) -> None:
        Path(name).unlink()
        Path(name).touch(mode=0o600)

    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file", private)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


@pytest.mark.slow
def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    code = """if True:
        import os, signal, sys
        from densenet_efficient.files import write_atomically
        write_atomically(sys.argv[1], lambda name: os.kill(os.getpid(), signal.SIGKILL))
    """
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")])
    assert killed.returncode < 0
    (left,) = tmp_path.iterdir()
    others = [f".file.{os.getpid()}.0123abcd", ".file.swp", "file.99.0123abcd"]
    for name in others:
        (tmp_path / name).touch()
    assert remove_leftovers(tmp_path) == [left]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
