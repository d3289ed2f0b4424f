"""What counts as a wrong result.

In float64 ours is the plain module: every tensor to 1e-9 of the largest value at stake. The largest
of all results, because a batch norm over few values makes gradients in which nearly everything
cancels; and where channels are constant, gradients inside the module may be 1e8 and cancel to what
they were rounded to, so that a tensor may also be as far off as `ROUNDING` of the largest of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

EXACT = 1e-9
ROUNDING = 16 * torch.finfo(torch.float64).eps


def largest_gradient(model: nn.Module, step: Callable[[nn.Module], object]) -> float:
    """Of all that a module and what it consists of put out, in one step."""
    largest = [0.0]

    def note(gradient: Tensor) -> None:
        if gradient.numel() and gradient.isfinite().all():
            largest.append(gradient.abs().max().item())

    def watch(module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(note)

    for module in model.modules():
        module.register_forward_hook(watch)
    step(model)
    return max(largest)


def assert_equal_in_float64(
    expected: Mapping[str, Tensor], got: Mapping[str, Tensor], inside: Callable[[], float]
) -> None:
    """The same names, shapes, dtypes and, in float64, values. A gradient that PyTorch leaves out
    because nothing depends on the parameter may be zero here, as after a double backward.
    inside: the largest gradient inside the plain module, asked for where a value differs."""
    missing = expected.keys() - got.keys()
    assert not missing, f"nothing came for {missing}"
    for name in got.keys() - expected.keys():
        assert name.endswith(".grad") and not got[name].any(), f"{name} came, PyTorch has none"
    finite = [v[v.isfinite()].abs().max() for v in expected.values() if v.isfinite().any()]
    stake = max([1.0, *map(float, finite)])
    bound, asked = EXACT * stake, False
    for name, value in expected.items():
        alike = (got[name].shape, got[name].dtype) == (value.shape, value.dtype)
        same = alike and torch.allclose(got[name], value, EXACT, bound, equal_nan=True)
        if not same and not asked:
            bound, asked = max(bound, ROUNDING * inside()), True
        torch.testing.assert_close(
            got[name], value, rtol=EXACT, atol=bound, equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )  # fmt: skip
