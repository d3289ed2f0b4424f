"""In low precision ours is no further from float64 than the plain module, whatever the channels'
statistics are."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.fuzzing.precision import PRECISIONS, Comparison, Precision, assert_errs_no_more
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
    torch.manual_seed(seed)
    plain = subject.plain()
    set_gammas(plain, gammas)
    plain = precision.module(plain)
    ours = subject.ours(plain)
    exact = copy.deepcopy(plain).double()
    for model in (plain, ours, exact):
        set_mode(model, training, getattr(subject, "norms", ()))
    # On which side of the ReLU's zero a constant channel's shift falls is chance; in float32
    # PyTorch sums in float64 on the CPU. There, only NaN and infinity are looked for.
    comparable = "constant" not in channels and precision.dtype != torch.float32

    def step(model: nn.Module, x: Tensor, autocast: bool, seed: int) -> Results:
        model = copy.deepcopy(model)
        x = x.clone().requires_grad_()
        with torch.autocast("cpu", precision.dtype, enabled=autocast):
            y = model(x)
        backward(y, seed)
        return collected(model, y=y, x=x.grad)

    def run(seed: int) -> tuple[Results, Results, Results]:
        x = precision.input(batch(subject.shape, channels, seed))
        both = (step(model, x, precision.autocast, seed) for model in (ours, plain))
        return *both, step(exact, x.double(), False, seed)  # type: ignore[return-value]

    try:
        x = precision.input(batch(subject.shape, channels, seed))
        step(plain, x, precision.autocast, seed)
    except (ValueError, RuntimeError):
        return  # what PyTorch refuses is no matter of precision
    if comparable:
        assert_errs_no_more(run, seed)
    else:
        Comparison().add(*run(seed))


@fuzz(0.12, subject=blocks(smallest=1), **COMMON)
def test_blocks_in_low_precision(subject: Subject, **options: object) -> None:
    check(subject, **options)  # type: ignore[arg-type]


@fuzz(0.08, subject=TRANSITIONS, **COMMON)
def test_transitions_in_low_precision(subject: Subject, **options: object) -> None:
    check(subject, **options)  # type: ignore[arg-type]
