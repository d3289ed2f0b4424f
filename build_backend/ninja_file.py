"""Writing build.ninja."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class NinjaFile:
    """build.ninja, line by line; a file that has not changed is not written again."""

    def __init__(self) -> None:
        self.lines = ["ninja_required_version = 1.8"]

    def rule(self, name: str, command: str, **variables: str) -> None:
        """A rule; its command may name the variables that `build` gives."""
        self.lines += [f"rule {name}", f"  command = {command}"]
        self.lines += [f"  {key} = {value}" for key, value in variables.items()]

    def build(
        self,
        output: Path,
        rule: str,
        inputs: list[Path],
        needs: tuple[Path, ...] = (),
        **variables: str,
    ) -> Path:
        """An output, the inputs it is made of and other files it `needs`."""
        line = f"build {escape(output)}: {rule} {' '.join(map(escape, inputs))}"
        if needs:
            line += " | " + " ".join(map(escape, needs))
        self.lines.append(line)
        self.lines += [f"  {key} = {value}" for key, value in variables.items()]
        return output

    def phony(self, name: str, inputs: list[Path]) -> None:
        self.lines.append(f"build {name}: phony {' '.join(map(escape, inputs))}")

    def write(self, path: Path) -> None:
        write_if_changed(path, "\n".join(self.lines) + "\n")


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def quote(argument: object) -> str:
    """An argument for the shell inside a ninja command."""
    text = str(argument).replace("$", "$$")
    return text if all(c.isalnum() or c in "-_=+./,:$%" for c in text) else f"'{text}'"


def join(arguments: Sequence[object]) -> str:
    return " ".join(map(quote, arguments))


def write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)
