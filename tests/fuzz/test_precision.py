"""In low precision ours is no further from float64 than the plain module, whatever the channels'
statistics are."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.fuzzing.precision import (
    PRECISIONS,
    Draw,
    Precision,
    Sides,
    assert_errs_no_more,
    disturb,
)
from tests.support.fuzzing.profile import fuzz
from tests.support.fuzzing.statistics import CHANNELS, GAMMAS, batch, set_gammas
from tests.support.fuzzing.structures import (
    TRANSITIONS,
    Subject,
    blocks,
    set_mode,
)
from tests.support.fuzzing.surroundings import Results, backward, collected

pytestmark = pytest.mark.filterwarnings("ignore")

COMMON = {
    "precision": st.sampled_from(PRECISIONS),
    "channels": st.lists(st.sampled_from(CHANNELS), min_size=1, max_size=4),
    "gammas": st.lists(st.sampled_from(GAMMAS), min_size=1, max_size=3),
    "training": st.sampled_from([True, True, False]),
    "seed": st.integers(0, 2**31),
}


def check(
    subject: Subject,
    *,
    precision: Precision,
    channels: list[str],
    gammas: list[str],
    training: bool,
    seed: int,
) -> None:
    def step(model: nn.Module, x: Tensor, autocast: bool, seed: int) -> Results:
        set_mode(model, training, getattr(subject, "norms", ()))
        x = x.clone().requires_grad_()
        with torch.autocast("cpu", precision.dtype, enabled=autocast):
            y = model(x)
        backward(y, seed)
        return collected(model, y=y, x=x.grad)

    def draw(seed: int) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(seed)
        plain = subject.plain()
        set_gammas(plain, gammas)
        return precision.module(plain), precision.input(batch(subject.shape, channels, seed))

    def run(seed: int) -> Draw:
        plain, x = draw(seed)
        ours, exact = subject.ours(plain), copy.deepcopy(plain).double()
        disturbed = copy.deepcopy(exact)
        near = disturb(disturbed, x.double())
        sides, exact_sides = Sides(plain), Sides(exact)
        return Draw(
            step(ours, x, precision.autocast, seed),
            step(plain, x, precision.autocast, seed),
            step(exact, x.double(), False, seed),
            step(disturbed, near, False, seed),
            sides.alike(exact_sides),
        )

    try:
        step(*draw(seed), precision.autocast, seed)
    except (ValueError, RuntimeError):
        return  # what PyTorch refuses is no matter of precision
    assert_errs_no_more(run, seed)


@fuzz(0.12, subject=blocks(smallest=1), **COMMON)
def test_blocks_in_low_precision(subject: Subject, **options: object) -> None:
    check(subject, **options)  # type: ignore[arg-type]


@fuzz(0.08, subject=TRANSITIONS, **COMMON)
def test_transitions_in_low_precision(subject: Subject, **options: object) -> None:
    check(subject, **options)  # type: ignore[arg-type]
