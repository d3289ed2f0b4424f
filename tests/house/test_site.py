"""The documentation builds as a site, without a warning: every page is in the navigation, every
link and anchor leads somewhere, every docstring of the reference can be read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import densenet_efficient
from tests.support.markdown import ROOT

pytest.importorskip("mkdocs", reason="mkdocs is missing: it comes with requirements-dev.txt")
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

TAGS = {
    "a", "article", "aside", "b", "blockquote", "body", "br", "button", "code", "dd", "details",
    "div", "dl", "dt", "em", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "head", "header",
    "hr", "html", "i", "img", "input", "label", "li", "link", "main", "meta", "nav", "noscript",
    "ol", "p", "path", "pre", "script", "section", "small", "span",
    "strong", "style", "sub", "summary",
    "sup", "svg", "table", "tbody", "td", "th", "thead", "title", "tr", "ul",
}  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(
        [*command, "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


class _Page(HTMLParser):
    """What a page refers to, and its tags."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.tags: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.targets += [value or "" for name, value in attrs if name in ("href", "src")]
        self.tags.add(tag)


def test_the_reference_has_every_public_name() -> None:
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    listed = re.findall(r"^::: densenet_efficient\.(\w+)$", pages, re.MULTILINE)
    assert sorted([*listed, "__version__"]) == sorted(densenet_efficient.__all__)


@pytest.mark.slow
def test_it_builds_without_a_warning(site: Path) -> None:
    assert (site / "index.html").exists() and (site / "reference" / "conversion").exists()


@pytest.mark.slow
def test_a_page_outside_of_the_navigation_is_refused(tmp_path: Path) -> None:
    """It would be a warning, and not one when mkdocs is told to be quiet."""
    nav = ["index.md", "start.md"]
    config = load_config(str(ROOT / "mkdocs.yml"), nav=nav, plugins=[], strict=True)
    config.site_dir = str(tmp_path)
    with pytest.raises(Abort, match="strict mode"):
        build(config)


@pytest.mark.slow
def test_every_link_of_the_site_leads_into_it(site: Path) -> None:
    missing = []
    for page in site.rglob("*.html"):
        for target in _Page(page).targets:
            path = target.partition("#")[0].partition("?")[0]
            if path and ":" not in path and page.name != "404.html":
                found = page.parent / path
                found = found / "index.html" if found.is_dir() else found
                if not found.exists():
                    missing.append(f"{page.relative_to(site)}: {target}")
    assert not missing


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    """A reader without a network sees the whole site, and nobody sees the reader."""
    loaded = [
        f"{page.relative_to(site)}: {target}"
        for page in site.rglob("*.html")
        for target in _Page(page).targets
        if target.startswith("http") and target.endswith((".js", ".css", ".png", ".woff2"))
    ]
    assert not loaded


@pytest.mark.slow
def test_nothing_is_taken_for_a_tag(site: Path) -> None:
    """A reader would not see kernel<bf16, 32> outside of code."""
    for page in site.rglob("*.html"):
        assert _Page(page).tags - TAGS == set(), page.parent.name
