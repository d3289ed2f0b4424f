"""Programs that a test writes, in place of those that the build would find."""

from __future__ import annotations

from pathlib import Path


def executable(path: Path, text: str) -> Path:
    """A shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path
