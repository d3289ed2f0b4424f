"""Every Python block of README and docs runs, and every link to a file leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.markdown import ROOT, python_blocks, run_blocks
from tests.support.peer import torchvision

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Each of its examples is compared with the plain model in tests/conversion.
ELSEWHERE = {ROOT / "docs" / "compatibility.md"}
WITH_CODE = [page for page in PAGES if python_blocks(page) and page not in ELSEWHERE]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert torchvision.models  # imported once, so that a page can import it
    monkeypatch.chdir(tmp_path)
    run_blocks(page)


def test_there_is_a_page_for_every_library() -> None:
    names = {page.stem for page in WITH_CODE if page.parent.name == "coming_from"}
    assert names >= {"torchvision", "tf_slim", "keras", "d2l", "efficient_densenet_pytorch"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)", page.read_text())
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing
