"""Every wrong use of the public interface is refused as documented: the exception's class, a
message that names what is wrong, and the model, torch's random state and the files as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

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


def _hooked(model: nn.Module) -> None:
    model.register_full_backward_pre_hook(lambda module, gradient: None)


def _gradient(model: nn.Module) -> None:
    model.weight.grad = torch.zeros_like(model.weight)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hooked, "the model changed"),
        (_gradient, "the model changed"),
        (lambda m: setattr(m, "forward", abs), "the model changed"),
        (lambda m: nn.init.zeros_(m.weight), "the model changed"),
        (lambda m: m.requires_grad_(False), "the model changed"),
        (lambda m: torch.rand(1), "torch's random state changed"),
        (lambda m: Path("left").touch(), "files changed"),
    ],
)
def test_whatever_a_refusal_leaves_changed_is_noticed(
    change: Callable[[nn.Module], object],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)

    def call(model: nn.Module) -> None:
        change(model)
        raise ValueError("refused")

    with pytest.raises(AssertionError, match=reason):
        check(WrongUse("", "", call, ValueError, "refused", lambda: nn.Conv2d(1, 1, 1)), tmp_path)


@pytest.mark.parametrize("error", [None, KeyError("no"), UnicodeError("no"), ValueError("other")])
def test_another_answer_is_no_refusal(error: Exception | None, tmp_path: Path) -> None:
    def call() -> None:
        if error is not None:
            raise error

    with pytest.raises((AssertionError, KeyError, pytest.fail.Exception)):
        check(WrongUse("", "", call, ValueError, "^no"), tmp_path)
