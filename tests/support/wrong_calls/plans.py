"""Wrong uses of memory plans."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

import densenet_efficient as de

from .use import NOT_MODELS, WrongUse, converted, plain


def plans() -> Iterator[WrongUse]:
    """plan and max_batch."""
    use = functools.partial(WrongUse, "functions")
    for what, shape in (
        ("no shape", ()),
        ("three sizes", (3, 64, 64)),
        ("no images", (0, 3, 64, 64)),
        ("a negative size", (1, 3, -64, 64)),
        ("other channels", (1, 4, 64, 64)),
        ("None", None),
        ("a number", 4),
        ("text", "1x3x64x64"),
        ("texts", ("a", 3, 64, 64)),
        ("halves", (1.5, 3, 64, 64)),
    ):
        yield use(
            f"plan(input_shape): {what}",
            lambda m, s=shape: de.plan(m, s),
            ValueError,
            "input_shape must",
            converted,
        )
    for dtype in (torch.int64, "fp32", None):
        yield use(
            f"plan(dtype={dtype!r})",
            lambda m, d=dtype: de.plan(m, (1, 3, 64, 64), d),
            TypeError,
            "dtype must be float64, float32, bfloat16 or float16, got",
            converted,
        )
    yield use(
        "plan of a plain model",
        lambda m: de.plan(m, (1, 3, 64, 64)),
        TypeError,
        "model must be an EfficientDenseNet.*convert",
        plain,
    )
    for value in NOT_MODELS:
        yield use(
            f"plan({value!r})",
            lambda v=value: de.plan(v, (1, 3, 64, 64)),
            TypeError,
            "model must be.*got",
        )
    for budget in (0, -1, float("nan"), float("inf"), "12GB", None):
        yield use(
            f"max_batch(budget={budget!r})",
            lambda m, b=budget: de.max_batch(m, (3, 64, 64), torch.float32, b),
            ValueError,
            "budget must be a positive number of bytes, got",
            converted,
        )
    for shape in ((1, 3, 64, 64), None, (4, 64, 64), "3x64x64"):
        yield use(
            f"max_batch(input_shape={shape!r})",
            lambda m, s=shape: de.max_batch(m, s, torch.float32, 1e9),
            ValueError,
            "input_shape must",
            converted,
        )


USES = [*plans()]
