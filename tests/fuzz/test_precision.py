"""In low precision ours is no further from float64 than the plain module, whatever the channels'
statistics are."""

from __future__ import annotations

import copy
import functools

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


def draw_of(seed: int, *, factor: float, share: float = 1.0) -> Draw:
    """One tensor with errors of PyTorch's whose size varies tenfold, and ours, independent of them,
    by `factor` larger in `share` of the draws."""
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(50, generator=generator, dtype=torch.float64)
    sizes = 1e-3 * 10 ** torch.rand(2, generator=generator, dtype=torch.float64)
    if torch.rand((), generator=generator) < share:
        sizes[0] *= factor
    ours, eager = (exact + s * torch.randn(50, generator=generator) for s in sizes)
    values = ({"y": y} for y in (ours, eager, exact, exact))
    return Draw(*values, alike=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(("factor", "share"), [(1.0, 1.0), (20.0, 0.3)])
def test_chance_is_no_larger_error(factor: float, share: float) -> None:
    assert_errs_no_more(functools.partial(draw_of, factor=factor, share=share), 0)


@pytest.mark.parametrize(("factor", "share"), [(3.0, 1.0), (20.0, 0.8)])
def test_a_larger_error_in_most_draws_is_found(factor: float, share: float) -> None:
    with pytest.raises(AssertionError, match=r"y: in \d+ of 243 draws more than 2\.0 times"):
        assert_errs_no_more(functools.partial(draw_of, factor=factor, share=share), 0)
