"""Inputs and gradients that are not finite: the step that meets them answers as the plain module,
and no later step knows of it."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from densenet_efficient.core import arena
from densenet_efficient.nn.execution import Efficient

from .steps import SCENARIOS, Scenario, Subject, fill_scratch

VALUES = (float("nan"), float("inf"), -float("inf"))
# Of values that stay finite, next to the plain module's: rounding of the dtype.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}
PLACES = ("one value", "one channel", "one image", "everything")


def _spoiled(x: Tensor, place: str, value: float) -> Tensor:
    x = x.clone()
    {
        "one value": x[0, 0].view(-1)[:1],
        "one channel": x[:, 0],
        "one image": x[0],
        "everything": x,
    }[place].fill_(value)
    return x


def _step(
    module: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor
) -> dict[str, Tensor]:
    torch.manual_seed(1)
    module.zero_grad(set_to_none=True)
    y = call(x)
    y.backward(gradient)
    return {"y": y.detach(), **{n: b.clone() for n, b in module.named_buffers()}}


def _problem(subject: Subject, scenario: Scenario, x: Tensor, gradient: Tensor) -> str | None:
    """What is wrong with a step and with a clean one after it."""
    ours, other = subject.module, subject.untouched
    ours.load_state_dict(subject.before)
    got = _step(ours, ours, x, gradient)
    if isinstance(other, Efficient):  # a network's parts are compared one by one
        other.load_state_dict(subject.before)
        for name, wanted in _step(other, other._original, x, gradient).items():
            both = wanted.isfinite()
            if not torch.equal(got[name].isfinite(), both):
                return f"{name} is not finite in other places than the plain module's"
            near = TOLERANCES[scenario.dtype]
            alike = torch.allclose(got[name][both], wanted[both], rtol=near, atol=near)
            if not alike and not scenario.drops:
                return f"{name} differs from the plain module's"
    ours.load_state_dict(subject.before)
    fill_scratch(float("nan"))
    clean = subject.step(ours)
    arena.release()
    other.load_state_dict(subject.before)
    different = [n for n, value in subject.step(other).items() if not torch.equal(value, clean[n])]
    return f"the next step differs in {', '.join(different[:3])}" if different else None


def not_finite(places: Sequence[str] = PLACES) -> Iterator[tuple[str, int, list[str]]]:
    """For every scenario: its name, spoiled steps, and what was wrong."""
    for scenario in SCENARIOS:
        subject = Subject(scenario)
        cases = list(itertools.product(("input", "gradient"), places, VALUES))
        problems = []
        for spoiled, place, value in cases:
            x, gradient = subject.x, subject.gradient
            if spoiled == "input":
                x = _spoiled(x, place, value)
            else:
                gradient = _spoiled(gradient, place, value)
            with warnings.catch_warnings():  # that the original forward runs
                warnings.simplefilter("ignore")
                problem = _problem(subject, scenario, x, gradient)
            if problem is not None:
                where = f"{scenario.name}, {place} of the {spoiled} {value}"
                problems.append(f"{where}: {problem}")
        yield scenario.name, len(cases), problems
