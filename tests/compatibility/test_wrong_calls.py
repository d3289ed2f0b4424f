"""Every wrong use of the public interface is refused as documented: the exception's class, a
message that names what is wrong, and the model, torch's random state and the files as they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.wrong_calls import WRONG_USES, WrongUse, check


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use", WRONG_USES, ids=str)
def test_refused_by_name_and_untouched(
    use: WrongUse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check(use, tmp_path)


def test_there_are_enough_of_them() -> None:
    """The bars: 200 calls, 40 of them about conversion and weights; and none is listed twice."""
    names = [str(use) for use in WRONG_USES]
    assert len(names) >= 200 and len(set(names)) == len(names)
    assert sum(use.group == "conversion and weights" for use in WRONG_USES) >= 40
