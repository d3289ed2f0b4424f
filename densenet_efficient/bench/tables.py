"""Results on paper: what ran where, tables in markdown, and both written next to the raw figures.

A figure without its command does not exist: every stored table carries command, device, versions,
commit and date.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..files import write_atomically
from ..version import __version__

__all__ = ["environment", "markdown_table", "megabytes", "write_results"]

ROOT = Path(__file__).resolve().parents[2]


def _command_line() -> str:
    """This process' command as a person would type it in the repository."""
    program, arguments = Path(sys.argv[0]), sys.argv[1:]
    if program.name == "__main__.py":
        words = ["python", "-m", program.parent.name]
    elif program.suffix == ".py":
        words = ["python", "/".join(program.parts[-2:])]
    else:
        words = [program.name]
    return shlex.join([*words, *arguments])


def _output_of(command: list[str], folder: Path | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _commit(folder: Path = ROOT) -> str:
    named = os.environ.get("DENSENET_EFFICIENT_COMMIT")
    if named:  # a copy of the tree without its history
        return named
    commit = _output_of(["git", "rev-parse", "--short=12", "HEAD"], folder)
    # What an earlier benchmark wrote is no change of what is measured.
    measured = ["--", ".", ":!benchmarks/results"]
    status = ["git", "status", "--porcelain", "--untracked-files=no"]
    changed = _output_of([*status, *measured], folder)
    return (commit + (" with local changes" if changed else "")) or "not in a git repository"


def _processor() -> str:
    cpu_information = Path("/proc/cpuinfo")
    if cpu_information.exists():
        for line in cpu_information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def environment(device: str | torch.device) -> dict[str, str]:
    """Command, device, versions, commit and date, as text."""
    found = {"command": _command_line()}
    if torch.device(device).type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = (_output_of(query).splitlines() or ["unknown"])[0]
        found["cuda"] = f"{torch.version.cuda}, cudnn {torch.backends.cudnn.version()}"
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        threads = f"{torch.get_num_threads()} threads"
        found["device"] = f"{_processor()}, {capability}, {threads}"
    found["torch"] = torch.__version__
    found["torchvision"] = _version("torchvision")
    found["densenet_efficient"] = __version__
    found["python"] = platform.python_version()
    found["commit"] = _commit()
    found["date"] = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return found


def megabytes(size: float) -> str:
    """Bytes as text in MB (10^6 bytes)."""
    return f"{size / 1e6:,.1f}"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table with aligned columns; all but the first are set to the right."""
    cells = [[str(value) for value in row] for row in rows]
    widths = [
        max(len(column), 3, *(len(row[i]) for row in cells)) if cells else max(len(column), 3)
        for i, column in enumerate(columns)
    ]

    def line(values: Sequence[str]) -> str:
        padded = [
            value.ljust(width) if i == 0 else value.rjust(width)
            for i, (value, width) in enumerate(zip(values, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(columns), line(rule), *(line(row) for row in cells)])


def _write_text(path: Path, text: str) -> None:
    def write(temporary: str) -> None:
        Path(temporary).write_text(text)

    write_atomically(path, write)


def write_results(
    folder: Path, name: str, title: str, figures: Mapping[str, Any], text: str, device: str
) -> Path:
    """Write `name.json` (environment and figures) and `name.md` (title, `text`, environment) into
    `folder`; returns the path of the latter."""
    where = environment(device)
    document = json.dumps({"title": title, "environment": where, **figures}, indent=1)
    lines = [f"# {title}", "", text, "", *(f"- {key}: {value}" for key, value in where.items())]
    for suffix, content in ((".json", document), (".md", "\n".join(lines))):
        _write_text(folder / (name + suffix), content + "\n")
    return folder / (name + ".md")
