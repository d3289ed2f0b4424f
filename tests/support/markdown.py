"""The Python blocks of a page, run in order as a reader would: one after the other, in one
namespace."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def python_blocks(page: Path) -> list[str]:
    """The text of every block that is marked as Python."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def run_blocks(page: Path) -> dict[str, object]:
    """Executes the blocks of a page; returns what they defined."""
    name = f"page_{page.stem}"
    module = sys.modules[name] = ModuleType(name)
    try:
        for number, block in enumerate(python_blocks(page), start=1):
            exec(compile(block, f"{page.name}, block {number}", "exec"), module.__dict__)
    finally:
        del sys.modules[name]
    return module.__dict__
