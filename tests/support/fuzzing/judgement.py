"""What counts as a wrong result.

In float64 ours is the plain module: every tensor to 1e-9 of the largest value at stake. The largest
of all results, because a batch norm over few values makes gradients in which nearly everything
cancels; and where channels are constant, gradients inside the module may be 1e8 and cancel to what
they were rounded to, so that a tensor may also be as far off as `ROUNDING` of the largest of these.

A constant channel that a norm without beta brings to 0 stands at the ReLU's kink: whether PyTorch
lets its gradient through depends on what the mean was rounded to, 1e-14 on this side or on that.
There gradients are not compared; results and buffers are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

EXACT = 1e-9
ROUNDING = 16 * torch.finfo(torch.float64).eps
KINK = 1e-12  # of a ReLU: values of size 1, times 1 / sqrt(1e-5), are rounded by a tenth of it


class Inside(NamedTuple):
    """What happens inside the plain module in one step. largest: gradient of all that it and what
    it consists of put out. at_kink: whether a ReLU's input is 0 but for rounding."""

    largest: float
    at_kink: bool


def look_inside(model: nn.Module, step: Callable[[nn.Module], object]) -> Inside:
    """At one step of a module that nobody needs afterwards."""
    largest, at_kink = [0.0], []

    def note(gradient: Tensor) -> None:
        if gradient.numel() and gradient.isfinite().all():
            largest.append(gradient.abs().max().item())

    def watch(module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(note)

    def watch_kink(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        at_kink.append(bool((args[0].detach().abs() <= KINK).any()))

    for module in model.modules():
        module.register_forward_hook(watch)
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(watch_kink)
    step(model)
    return Inside(max(largest), any(at_kink))


def assert_equal_in_float64(
    expected: Mapping[str, Tensor], got: Mapping[str, Tensor], inside: Callable[[], Inside]
) -> None:
    """The same names, shapes, dtypes and, in float64, values. A gradient that PyTorch leaves out
    because nothing depends on the parameter may be zero here, as after a double backward. Gradients
    are what is called x, in whichever step, and what is called grad.
    inside: looks inside the plain module, asked where a value differs."""
    missing = expected.keys() - got.keys()
    assert not missing, f"nothing came for {missing}"
    for name in got.keys() - expected.keys():
        assert name.endswith(".grad") and not got[name].any(), f"{name} came, PyTorch has none"
    finite = [v[v.isfinite()].abs().max() for v in expected.values() if v.isfinite().any()]
    stake = max([1.0, *map(float, finite)])
    bound, found = EXACT * stake, None
    for name, value in expected.items():
        alike = (got[name].shape, got[name].dtype) == (value.shape, value.dtype)
        same = alike and torch.allclose(got[name], value, EXACT, bound, equal_nan=True)
        if not same and found is None:
            found = inside()
            bound = max(bound, ROUNDING * found.largest)
        is_gradient = name.rpartition(".")[2] in ("x", "grad")
        if alike and is_gradient and found is not None and found.at_kink:
            assert torch.equal(got[name].isfinite(), value.isfinite()), f"{name} is not finite"
            continue
        torch.testing.assert_close(
            got[name], value, rtol=EXACT, atol=bound, equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )  # fmt: skip
