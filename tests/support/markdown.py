"""The code of a page, found and executed as a reader would: block after block, the Python blocks in
one namespace, the commands as `tests.support.commands` runs them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tests.support import commands

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "tests/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
# What a block may be: the first two are executed, the others are for reading.
EXECUTED = ("python", "sh")
LANGUAGES = (*EXECUTED, "text", "c++")


@dataclass(frozen=True)
class Block:
    """A fenced block. line: the number of its fence in the page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}, line {self.line}"


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text()
    return [
        Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2])
        for match in re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]


def run(of_a_page: Iterable[Block]) -> dict[str, object]:
    """Executes blocks in order, in the current folder; returns what the Python of them defined."""
    module = ModuleType("page")
    sys.modules[module.__name__] = module
    try:
        for block in of_a_page:
            if block.language == "python":
                code = "\n" * block.line + block.text  # a traceback names the line of the page
                exec(compile(code, str(block.page), "exec"), module.__dict__)
            elif block.language == "sh":
                for command in commands.of_script(block.text):
                    commands.run(command, str(block))
    finally:
        del sys.modules[module.__name__]
    return module.__dict__
