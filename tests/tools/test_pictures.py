"""The pictures of the documentation show what the stored results and the package say today."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.markdown import ROOT

pytest.importorskip("matplotlib")
from tests.support.peer import torchvision
from tools.pictures import style
from tools.pictures.__main__ import PICTURES
from tools.pictures.computed import plain_step
from tools.pictures.measured import stored

assert torchvision


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_a_stored_picture_is_the_one_drawn_now(name: str, tmp_path: Path) -> None:
    """If not: python -m tools.pictures, and look at it."""
    PICTURES[name](tmp_path / "picture.png")
    now, then = (style.shown_by(path) for path in (tmp_path / "picture.png", ROOT / name))
    assert now == pytest.approx(then, rel=0.01, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["eager", "checkpoint"])
def test_followed_storages_add_up_to_the_measured_peak(peer: str) -> None:
    (row,) = [row for row in stored("memory-cpu")["table"]["rows"] if row["peer"] == peer]
    history, _ = plain_step(peer)
    peak = max(sum(live.values()) for _, live in history)
    assert peak == pytest.approx(row["allocator_peak"], rel=1e-3)
