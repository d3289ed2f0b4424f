"""In float64 ours is the plain module, whatever it is made of and surrounded by."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from densenet_efficient.nn.execution import ORIGINAL, recording
from densenet_efficient.ops.dispatch import Dispatch
from tests.support.fuzzing.judgement import Inside, assert_equal_in_float64, look_inside
from tests.support.fuzzing.layouts import LAYOUTS, laid_out
from tests.support.fuzzing.profile import fuzz
from tests.support.fuzzing.structures import (
    NETWORKS,
    TRANSITIONS,
    Network,
    Subject,
    blocks,
    set_mode,
)
from tests.support.fuzzing.surroundings import (
    PROCEDURES,
    Procedure,
    Results,
    ordinary,
)

pytestmark = pytest.mark.filterwarnings("ignore")

FREEZING = st.lists(st.booleans(), max_size=3)
REFUSALS = (ValueError, RuntimeError)
Entries = list[tuple[nn.Module, str, Dispatch]]


def leaf(subject: Subject, seed: int, layout: str, wanted: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(subject.shape, generator=generator, dtype=torch.float64)
    return laid_out(x, layout).detach().requires_grad_(wanted)


def outcome(run: Procedure, model: nn.Module, x: Tensor) -> Results | Exception:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run(model, x)
    except REFUSALS as error:
        return error


def expected_buffers(once: Results, twice: Results, ours: nn.Module, entries: Entries) -> Results:
    """Of a checkpointed step: running statistics as of one forward pass, `once`, where our
    operators ran, which leave them alone in the second; as PyTorch leaves them, `twice`, in modules
    that ran their original forward."""
    names = {id(module): name for name, module in ours.named_modules()}
    originals = [
        names[id(module)] for module, part, how in entries if how.kind == ORIGINAL and not part
    ]
    within = tuple(f"{name}." if name else "" for name in originals)
    buffers = {name for name, _ in ours.named_buffers() if name.startswith(within)}
    return {name: twice[name] if name in buffers else value for name, value in once.items()}


def check(
    subject: Subject,
    procedure: str,
    *,
    training: bool,
    layout: str,
    wanted: bool,
    frozen: list[bool],
    seed: int,
) -> None:
    """One procedure on both; what PyTorch refuses ours refuses, unchanged."""
    wanted = wanted or "reentrant" in procedure  # which differentiates nothing without
    torch.manual_seed(seed)
    plain = subject.plain()
    ours = subject.ours(plain)
    for model in (plain, ours):
        set_mode(model, training, getattr(subject, "norms", ()))
        for index, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(not (frozen and frozen[index % len(frozen)]))
    before = copy.deepcopy(ours.state_dict())
    run = PROCEDURES[procedure]
    expected = outcome(run, copy.deepcopy(plain), leaf(subject, seed, layout, wanted))
    with recording() as entries:
        got = outcome(run, ours, leaf(subject, seed, layout, wanted))
    if isinstance(expected, Exception):
        assert isinstance(got, Exception), f"PyTorch says: {expected}"
        if procedure == "ordinary":
            for name, value in ours.state_dict().items():
                assert torch.equal(value, before[name]), f"{name} changed"
        return
    if isinstance(got, Exception):
        raise got
    if procedure.startswith("checkpoint"):
        once = ordinary(copy.deepcopy(plain), leaf(subject, seed, layout, wanted))
        expected = expected_buffers(once, expected, ours, entries)

    def inside() -> Inside:
        x = leaf(subject, seed, layout, True)
        return look_inside(copy.deepcopy(plain), lambda model: ordinary(model, x))

    assert_equal_in_float64(expected, got, inside)


COMMON = {
    "procedure": st.sampled_from(sorted(PROCEDURES)),
    "training": st.sampled_from([True, True, False]),
    "layout": st.sampled_from(LAYOUTS),
    "wanted": st.booleans(),
    "frozen": FREEZING,
    "seed": st.integers(0, 2**32 - 1),
}


@fuzz(0.58, subject=blocks(), **COMMON)
def test_blocks(subject: Subject, **options: object) -> None:
    check(subject, **options)  # type: ignore[arg-type]


@fuzz(0.10, subject=TRANSITIONS, **COMMON)
def test_transitions(subject: Subject, **options: object) -> None:
    check(subject, **options)  # type: ignore[arg-type]


@fuzz(0.12, subject=NETWORKS, **COMMON)
def test_networks(subject: Network, **options: object) -> None:
    check(subject, **options)  # type: ignore[arg-type]


def test_only_the_rounding_of_gradients_inside_is_allowed() -> None:
    """And these are looked for only where something differs."""
    right, asked = torch.ones(3, dtype=torch.float64), []

    def inside() -> Inside:
        asked.append(True)
        return Inside(1e8, at_kink=False)

    assert_equal_in_float64({"y": right}, {"y": right + 1e-10}, inside)
    assert not asked
    assert_equal_in_float64({"y": right}, {"y": right + 1e-7}, inside)
    with pytest.raises(AssertionError, match="y: Tensor-likes are not close"):
        assert_equal_in_float64({"y": right}, {"y": right + 1e-6}, inside)


@pytest.mark.parametrize("name", ["y", "x", "0.x", "norm.weight.grad"])
@pytest.mark.parametrize("at_kink", [True, False])
def test_only_gradients_at_a_kink_are_not_compared(name: str, at_kink: bool) -> None:
    right = torch.ones(3, dtype=torch.float64)

    def agrees(value: float) -> bool:
        try:
            assert_equal_in_float64(
                {name: right}, {name: right * value}, lambda: Inside(1.0, at_kink)
            )
        except AssertionError:
            return False
        return True

    assert agrees(1.0) and agrees(2.0) == (at_kink and name != "y")
    assert not agrees(float("inf")) and not agrees(float("nan"))


@pytest.mark.parametrize(("affine", "values"), [(True, 1), (False, 1), (False, 2)])
def test_constant_channels_without_beta_stand_at_a_kink(affine: bool, values: int) -> None:
    model = nn.Sequential(nn.BatchNorm2d(1, affine=affine), nn.ReLU()).double()
    if affine:
        nn.init.constant_(model[0].bias, 0.1)
    x = 1.541 + torch.arange(4.0, dtype=torch.float64).view(4, 1, 1, 1) % values
    found = look_inside(model, lambda model: model(x.requires_grad_()).sum().backward())
    assert found.at_kink == (not affine and values == 1)


def test_the_largest_gradient_inside_is_found() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.fill_(1e-6)
        model[1].weight.fill_(1e6)
    x = torch.ones(1, 1, dtype=torch.float64)
    found = look_inside(model, lambda model: model(x).sum().backward())
    assert found == Inside(pytest.approx(1e6), at_kink=False)
