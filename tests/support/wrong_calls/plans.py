"""Wrong uses of memory plans."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

import densenet_efficient as de

from .use import NOT_MODELS, WrongUse, converted, each, plain

GROUP = "functions"
SHAPE = (1, 3, 64, 64)


def plans() -> Iterator[WrongUse]:
    """plan and max_batch."""
    use = functools.partial(WrongUse, GROUP)
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
    yield from each(
        GROUP, "plan(dtype={!r})", lambda m, dtype: de.plan(m, SHAPE, dtype),
        (torch.int64, "fp32", None), TypeError,
        "dtype must be float64, float32, bfloat16 or float16, got", converted,
    )  # fmt: skip
    yield use(
        "plan of a plain model",
        lambda m: de.plan(m, SHAPE),
        TypeError,
        "model must be an EfficientDenseNet.*convert",
        plain,
    )
    yield from each(
        GROUP, "plan({!r})", lambda model: de.plan(model, SHAPE), NOT_MODELS, TypeError,
        "model must be.*got",
    )  # fmt: skip
    yield from each(
        GROUP, "max_batch(budget={!r})",
        lambda m, budget: de.max_batch(m, SHAPE[1:], torch.float32, budget),
        (0, -1, float("nan"), float("inf"), "12GB", None), ValueError,
        "budget must be a positive number of bytes, got", converted,
    )  # fmt: skip
    yield from each(
        GROUP, "max_batch(input_shape={!r})",
        lambda m, shape: de.max_batch(m, shape, torch.float32, 1e9),
        (SHAPE, None, (4, 64, 64), "3x64x64"), ValueError, "input_shape must", converted,
    )  # fmt: skip


USES = [*plans()]
