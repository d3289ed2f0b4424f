"""What counts as a wrong result in low precision: a NaN or an infinity where PyTorch has none and
float64's value is in the dtype's range, or a larger distance from float64 than PyTorch's own on the
same inputs, by the rule of `densenet_efficient.bench.accuracy`.

Errors of single draws, of the parameters and the input of one structure, are a matter of chance: a
value that rounding puts on the other side of a ReLU's zero changes a gradient by far more than
rounding does, and where gamma is 0 all of an output is a handful of numbers, whatever the input is.
So what is judged is the draw in the middle: a result is wrong where, in most draws, its error is
more than the rule's bound times PyTorch's own. A comparison in which that is so is made again over
three times as many draws, and it fails if, of `MOST`, those are more than half by more than chance
makes of a half: by `DEVIATIONS` standard deviations.

A tensor is compared where float64 says what it is: where, in most draws, parameters and input that
are disturbed by `DISTURBANCE` give it again, to a thousandth. That leaves out gradients which are
zero, of terms that all cancel, and what depends on which side of a ReLU's zero a constant channel
falls. And gradients are compared where PyTorch's are of the same function: where its ReLUs pass no
channel as a whole that they cut in float64, nor cut one as a whole that they do not cut there. A
constant channel of 1e4 in bfloat16 it takes to either side, whatever beta is, and a channel that
only its rounding makes constant it may cut: what is cut has no error.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from densenet_efficient.bench.accuracy import TOGETHER_BOUND, WORST_BOUND, root_mean_square

FEWEST, MOST = 3, 243
DEVIATIONS = 3.0
DISTURBANCE = 2.0**-40
ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Errors up to this part of a tensor are its float32 sums' rounding, whatever PyTorch's are."""
Floors = dict[str, float]


@dataclass(frozen=True)
class Precision:
    """dtype of the activations; autocast: to it, from an input in `given`, with float32 parameters;
    else module and input are in it."""

    dtype: torch.dtype
    autocast: bool = False
    given: torch.dtype | None = None

    def module(self, plain: nn.Module) -> nn.Module:
        """Casts the module, in place."""
        return plain.to(torch.float32 if self.autocast else self.dtype)

    def input(self, x: Tensor) -> Tensor:
        """x as it is handed in."""
        return x.to(self.given or self.dtype)

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        given = str(self.given).removeprefix("torch.")
        return f"{name} autocast of {given}" if self.autocast else name


PRECISIONS = [
    Precision(torch.float32),
    *(Precision(dtype) for dtype in (torch.bfloat16, torch.float16)),
    *(
        Precision(dtype, True, given)
        for dtype in (torch.bfloat16, torch.float16)
        for given in (dtype, torch.float32)
    ),
]


@dataclass(frozen=True)
class Draw:
    """The same tensors, by name, of ours, of PyTorch's module, of it in float64, and of that
    disturbed. alike: whether the gradients of the second and third are of one function."""

    ours: Mapping[str, Tensor]
    eager: Mapping[str, Tensor]
    exact: Mapping[str, Tensor]
    disturbed: Mapping[str, Tensor]
    alike: bool


Run = Callable[[int], Draw]
"""Of a seed."""


class Sides:
    """What the ReLUs of a module do with whole channels, call by call: 1 where one passes all of a
    channel, -1 where it cuts all, 0 where neither."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[Tensor] = []
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.register_forward_hook(self._note)

    def _note(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        passed = (output > 0).transpose(0, 1).flatten(1)
        self.calls.append(passed.all(1).int() - (~passed).all(1).int())

    def alike(self, exact: Sides) -> bool:
        """Whether here no channel is cut that is not cut in float64, nor one passed that is."""
        return all(
            ((here != -1) | (there == -1)).all() and ((here != 1) | (there != -1)).all()
            for here, there in zip(self.calls, exact.calls, strict=True)
        )


def disturb(model: nn.Module, x: Tensor) -> Tensor:
    """Changes every parameter, in place, and x, which it returns, by a part of about
    `DISTURBANCE`."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + DISTURBANCE * torch.randn_like(parameter))
        return x * (1 + DISTURBANCE * torch.randn_like(x))


def _scales(exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Each tensor's norm; of running statistics more, because a mean is as sure as the deviations
    are large, and a variance as the mean's rounding squared."""
    eps = torch.finfo(torch.float32).eps
    scales = {name: value.double().norm().item() for name, value in exact.items()}
    for name in exact:
        if name.endswith("running_mean"):
            of_var = name.replace("running_mean", "running_var")
            mean, var = scales[name], scales[of_var]
            scales[name] = math.hypot(mean, math.sqrt(var))
            scales[of_var] = var + eps * mean**2
    return {name: scale or 1.0 for name, scale in scales.items()}


def _floors(exact: Mapping[str, Tensor], dtype: torch.dtype, scales: Mapping[str, float]) -> Floors:
    """Errors below which nothing is asked: a tensor's float32 sums' rounding, and of a variance the
    square of what a layer's outputs, of this dtype and the mean's size, were rounded by."""
    floors = dict.fromkeys(exact, ROUNDING)
    for name in exact:
        if name.endswith("running_var"):
            mean = exact[name.replace("running_var", "running_mean")].double().norm().item()
            rounding = (torch.finfo(dtype).eps * mean) ** 2 / scales[name]
            floors[name] = max(ROUNDING, rounding)
    return floors


def _is_gradient(name: str) -> bool:
    return name == "x" or name.endswith(".grad")


def _error(value: Tensor, exact: Tensor, scale: float) -> float:
    return (value.double() - exact.double()).norm().item() / scale


Errors = tuple[float, float]
"""Of ours and of PyTorch's."""


class Comparison:
    """Errors of ours and of PyTorch's, draw by draw."""

    def __init__(self) -> None:
        self.draws: list[dict[str, Errors]] = []
        self.left_out: Counter[str] = Counter()

    def add(self, draw: Draw) -> None:
        """AssertionError where ours is not finite and PyTorch's is, or shapes or dtypes differ."""
        ours, eager, exact = draw.ours, draw.eager, draw.exact
        if not eager["y"].isfinite().all():
            return  # no loss comes of this: which gradients are finite is where a ReLU cut the NaN
        scales, errors = _scales(exact), {}
        floors = _floors(exact, eager["y"].dtype, scales)
        for name, value in eager.items():
            assert name in ours, f"nothing came for {name}"
            got = ours[name]
            assert (got.shape, got.dtype) == (value.shape, value.dtype), (
                f"{name} is {got.dtype} {list(got.shape)}, "
                f"PyTorch's {value.dtype} {list(value.shape)}"
            )
            right = exact[name].to(value.dtype)  # infinite where the dtype cannot hold it
            if not value.isfinite().all() or not right.isfinite().all():
                continue
            assert got.isfinite().all(), f"{name} is not finite, PyTorch's is"
            moved = _error(draw.disturbed[name], exact[name], 1.0)
            other = _is_gradient(name) and not draw.alike
            if other or moved > 1e-3 * exact[name].double().norm():
                self.left_out[name] += 1
                continue
            pair = (_error(side, exact[name], scales[name]) for side in (got, value))
            errors[name] = tuple(max(error, floors[name]) for error in pair)
        self.draws.append(errors)

    def problem(self, deviations: float = 0.0) -> str | None:
        """How ours errs more than PyTorch's in most draws, and by this many standard deviations
        more than in a half of them; None where it does not."""
        counts = Counter(name for errors in self.draws for name in errors)
        compared = [name for name in counts if counts[name] > self.left_out[name]]
        rules = [(name, WORST_BOUND, self._of(name)) for name in compared]
        rules.append(("all tensors together", TOGETHER_BOUND, self._together(compared)))
        for what, bound, pairs in rules:
            above = sum(ours > bound * eager for ours, eager in pairs)
            if above > (len(pairs) + deviations * math.sqrt(len(pairs))) / 2:
                ours, eager = (statistics.median(errors) for errors in zip(*pairs, strict=True))
                return (
                    f"{what}: in {above} of {len(pairs)} draws more than {bound} times PyTorch's "
                    f"error; medians {ours:.3e} and {eager:.3e}"
                )
        return None

    def _of(self, name: str) -> list[Errors]:
        return [errors[name] for errors in self.draws if name in errors]

    def _together(self, names: Collection[str]) -> list[Errors]:
        parts = [{n: errors[n] for n in names if n in errors} for errors in self.draws]
        return [
            (
                root_mean_square({name: pair[0] for name, pair in part.items()}),
                root_mean_square({name: pair[1] for name, pair in part.items()}),
            )
            for part in parts
            if part
        ]


def _numbers_of_draws() -> Iterator[int]:
    count = FEWEST
    while count <= MOST:
        yield count
        count *= 3


def assert_errs_no_more(run: Run, seed: int) -> None:
    """Compares over more and more draws until ours errs no more than PyTorch's does.
    AssertionError where it errs more over all of them."""
    comparison, done = Comparison(), 0
    for count in _numbers_of_draws():
        for index in range(done, count):
            comparison.add(run(seed + index))
        done = count
        if comparison.problem() is None:
            return
    problem = comparison.problem(DEVIATIONS)
    assert problem is None, problem
