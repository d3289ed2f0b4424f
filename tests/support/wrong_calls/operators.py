"""Wrong calls of the operators: a right call of each, and every kind of change of every argument.

What they leave untouched is every tensor's memory, which `wrong_arguments` compares.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from tests.support.wrong_arguments import REFUSAL, WrongCall, wrong_calls
from tools.op_cases import OPERATORS, dimensions, make

from .use import WrongUse

SIZES = {"M": 7, "C": 6, "K": 5, "N": 2, "H": 4, "W": 3}
EVERY = 5
"""Of all changes, so many apart: they rotate through the arguments and the kinds."""


def _refused(call: WrongCall) -> None:
    raise REFUSAL(call.refuse())


def uses() -> Iterator[WrongUse]:
    """Some wrong calls of every operator."""
    index = 0
    for op in OPERATORS:
        torch.manual_seed(0)
        case = make(op, tuple(SIZES[name] for name in dimensions(op)), torch.float32, before=2)
        for call in wrong_calls(case):
            index += 1
            if index % EVERY == 0:
                yield WrongUse(
                    "operators", f"{op}, {call.argument}: {call.what}",
                    functools.partial(_refused, call), REFUSAL, op,
                )  # fmt: skip


USES = [*uses()]
