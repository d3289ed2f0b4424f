"""What mkdocs needs to make one site of the repository's documents, as its hooks (mkdocs.yml).

Pages stay where readers of the repository expect them: README.md and others are taken into the site
from outside of docs/ (`OUTSIDE`), and the stored results of the benchmarks as they are. Links lead
to the same files in both places: one to a page of the site is rewritten to its address there, one
to any other file of the repository becomes plain text. The page of the command line is filled in
from the parser, the list of results in the navigation from what is stored.
"""

from __future__ import annotations

import argparse
import functools
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "benchmarks/results"
# Page of the site: file of the repository.
OUTSIDE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "tests.md": "tests/README.md",
}
COMMANDS = "<!-- every command -->"
_FENCED = re.compile(r"^(```.*?^```)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
_EXTERNAL = re.compile(r"[a-z]+:")


def _results(suffix: str) -> list[str]:
    return [f"{RESULTS}/{path.name}" for path in sorted((ROOT / RESULTS).glob(f"*{suffix}"))]


def _outside() -> dict[str, str]:
    """Files of the site that lie outside of docs/, with their place in the repository."""
    found = dict(OUTSIDE)
    for suffix in (".md", ".png"):
        found |= {f"results/{posixpath.basename(path)}": path for path in _results(suffix)}
    return found


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replaces the entry "results" of the navigation by all stored results."""

    def filled(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {title: filled(value) for title, value in entry.items()}
        if isinstance(entry, list):
            return [filled(value) for value in entry]
        if entry == "results":
            return [f"results/{posixpath.basename(path)}" for path in _results(".md")]
        return entry

    config.nav = filled(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files outside of docs/."""
    for address, path in _outside().items():
        files.append(File.generated(config, address, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites the links of a page, but not inside of its code."""
    outside = _outside()
    address = page.file.src_uri
    source = outside.get(address, f"docs/{address}")
    pages = {path: name for name, path in outside.items()}

    def rewritten(match: re.Match[str]) -> str:
        image, label, target, anchor = match.groups()
        if not target or _EXTERNAL.match(target):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        found = pages.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(found) is None:
            # Not of the site. What is in the repository is named; the rest mkdocs complains about.
            return label if not image and (ROOT / path).exists() else match[0]
        relative = posixpath.relpath(found, posixpath.dirname(address) or ".")
        return f"{image}[{label}]({relative}{anchor or ''})"

    parts = _FENCED.split(
        markdown.replace(COMMANDS, commands()) if COMMANDS in markdown else markdown
    )
    return "".join(part if part.startswith("```") else _LINK.sub(rewritten, part) for part in parts)


def commands() -> str:
    """Every command of the program with its options, as its --help prints them."""
    from densenet_efficient.cli.main import _parser
    from densenet_efficient.cli.parser import Help

    lines = []
    for action in _parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                command.formatter_class = functools.partial(Help, width=90)
                lines += [f"## {name}", "", "```text", command.format_help().rstrip(), "```", ""]
    return "\n".join(lines)
