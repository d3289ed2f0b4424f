"""The source distribution holds what the repository holds: it can be built, tested and read."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_file_but_the_hidden_ones_is_in_the_source_distribution(tmp_path: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no clone: only git knows what should be in it")
    files = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    for name in files:  # a copy, because setuptools leaves its traces in the sources
        target = tmp_path / "clone" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    code = "import backend; backend.build_sdist('..')"
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, 'build_backend'); {code}"],
        cwd=tmp_path / "clone",
        check=True,
        capture_output=True,
    )
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in files if not name.startswith(".")} <= held
    assert not [name for name in held if name.endswith((".so", ".pyc"))]
