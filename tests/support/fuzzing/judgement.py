"""What counts as a wrong result.

In float64 ours is the plain module: every tensor to 1e-9 of the largest value at stake. The largest
of all results, because a batch norm over few values makes gradients in which nearly everything
cancels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

EXACT = 1e-9


def assert_equal_in_float64(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> None:
    """The same names, shapes, dtypes and, in float64, values. A gradient that PyTorch leaves out
    because nothing depends on the parameter may be zero here, as after a double backward."""
    missing = expected.keys() - got.keys()
    assert not missing, f"nothing came for {missing}"
    for name in got.keys() - expected.keys():
        assert name.endswith(".grad") and not got[name].any(), f"{name} came, PyTorch has none"
    finite = [v[v.isfinite()].abs().max() for v in expected.values() if v.isfinite().any()]
    stake = max([1.0, *map(float, finite)])
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, rtol=EXACT, atol=EXACT * stake, equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )  # fmt: skip
