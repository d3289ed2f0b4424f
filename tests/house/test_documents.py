"""Every block of code in README and docs runs, and every link to a file leads somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.support import commands
from tests.support.markdown import EXECUTED, LANGUAGES, PAGES, ROOT, blocks, run
from tests.support.peer import torchvision

WITH_CODE = [page for page in PAGES if any(b.language in EXECUTED for b in blocks(page))]


def name(page: Path) -> str:
    """Of a page, from the top of the repository."""
    return str(page.relative_to(ROOT).with_suffix(""))


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert torchvision.models  # imported once, so that a page can import it
    monkeypatch.chdir(tmp_path)
    run(blocks(page))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_all_code_is_fenced_and_says_its_language(page: Path) -> None:
    """Otherwise it would not be found, and not be run."""
    outside = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert "```" not in outside
    assert not re.findall(r"\n\n {4,}\S.*", outside)
    assert {block.language for block in blocks(page)} <= set(LANGUAGES)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_in_the_text_can_be_given(page: Path) -> None:
    for line in re.findall(r"`python -m densenet_efficient ([a-z][^`]*)`", page.read_text()):
        commands.parse(shlex.split(line.replace("\n", " ")), page.name)


def test_there_is_a_page_for_every_library() -> None:
    names = {page.stem for page in WITH_CODE if page.parent.name == "coming_from"}
    assert names >= {"torchvision", "tf_slim", "keras", "d2l", "efficient_densenet_pytorch"}
    assert names >= {"timm", "monai", "esrgan"}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)", page.read_text())
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing
