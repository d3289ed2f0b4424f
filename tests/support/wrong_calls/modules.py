"""Wrong uses of constructors and of modules' calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

import densenet_efficient as de
from densenet_efficient import reference
from densenet_efficient.models import d2l, keras, slim

from .use import WrongUse, block, converted, each, options

NETWORK: dict[str, tuple[Any, ...]] = {
    "growth_rate": (0, -1, 2.5, "12", None, True),
    "block_config": ((), "66", (2, 0), (2, 1.5), None, 4),
    "num_init_features": (0, 8.0, None),
    "bn_size": (0, "4"),
    "drop_rate": (-0.1, 1.5, math.nan, "much", None),
    "num_classes": (-1, 2.5, "ten"),
    "compression": (0, 1.5, math.nan, None),
    "in_channels": (0, -3, None),
    "init_mode": ("normal", None),
    "output_stride": (3, 5, True, "8"),
    "initial_output_stride": (3, 8, "4"),
}
MEMORY = {"memory": ("least", None, 1)}


def constructors() -> Iterator[WrongUse]:
    """Options out of their range."""
    small = {"block_config": (2, 2), "growth_rate": 4, "num_init_features": 8}
    yield from options(
        "networks", "EfficientDenseNet", de.EfficientDenseNet, small, NETWORK | MEMORY
    )
    some = {key: NETWORK[key][:1] for key in NETWORK}
    yield from options("networks", "reference.DenseNet", reference.DenseNet, small, some)
    cifar = {"depth": (41, 0, 4, "100", None, 40.0), "growth_rate": (0, None, "12", 1.5)}
    given = {"depth": 40, "growth_rate": 12}
    yield from options("networks", "densenet_cifar", de.densenet_cifar, given, cifar | MEMORY)
    contrib = {
        "depth": (41, 0),
        "nb_dense_block": (0, 2.5),
        "growth_rate": (0, None),
        "reduction": (1, -0.5),
        "weight_decay": (-1, math.nan, "no"),
        "pooling": ("max",),
        "classes": (0,),
        "nb_layers_per_block": (0,),
    }
    yield from options("networks", "keras.DenseNet", keras.DenseNet, {"depth": 10}, contrib)
    shape = {"units_per_block": (2, 2), "growth_rate": 4}
    wrong = {"growth_rate": (0, None), "output_stride": (5,), "num_classes": (-1,)}
    yield from options("networks", "slim.densenet_X", slim.densenet_X, shape, wrong)
    book = {"growth_rate": (0,), "num_classes": (-1,), "in_channels": (0,)}
    yield from options("networks", "d2l.DenseNet", d2l.DenseNet, {"arch": (2, 2)}, book)
    fc = {"growth_rate": (0, None), "block_config": ((), "5"), "num_classes": (-1, 2.5)}
    yield from options("networks", "EfficientFCDenseNet", de.EfficientFCDenseNet, {}, fc)
    layer = {
        "num_layers": (0, -1, 1.5, "2", True, None),
        "num_input_features": (0, None),
        "bn_size": (0, 1.5),
        "growth_rate": (0, "4"),
        "drop_rate": (-0.1, 2, math.nan, None),
    }
    whole = dict(num_layers=2, num_input_features=8, bn_size=4, growth_rate=4, drop_rate=0.0)
    yield from options(
        "modules", "EfficientDenseBlock", de.EfficientDenseBlock, whole, layer | MEMORY
    )
    yield from options(
        "modules",
        "EfficientTransition",
        de.EfficientTransition,
        {"num_input_features": 8, "num_output_features": 4},
        {"num_input_features": (0, "8"), "num_output_features": (0, None), "drop_rate": (2,)},
    )
    yield from options(
        "modules",
        "EfficientResidualDenseBlock",
        de.EfficientResidualDenseBlock,
        {},
        {"num_feat": (0, "64"), "num_grow_ch": (0, 1.5)},
    )
    for name, build in (
        ("EfficientDenseNet", de.EfficientDenseNet),
        ("densenet121", de.densenet121),
    ):
        yield WrongUse(
            "networks", f"{name}(grow=3)", lambda build=build: build(grow=3), TypeError, "'grow'"
        )


def transition() -> torch.nn.Module:
    """From 8 to 4 channels."""
    return de.EfficientTransition(8, 4)


def residual() -> torch.nn.Module:
    """Of 8 channels."""
    return de.EfficientResidualDenseBlock(8, 4)


WRONG_INPUTS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("three dimensions", lambda: torch.zeros(8, 6, 6), ValueError, "4 dimensions.*got shape"),
    (
        "six dimensions",
        lambda: torch.zeros(1, 8, 6, 6, 1, 1),
        ValueError,
        "4 dimensions.*got shape",
    ),
    (
        "other channels",
        lambda: torch.zeros(2, 7, 6, 6),
        ValueError,
        r"8 channels, got shape \[2, 7",
    ),
    (
        "float64",
        lambda: torch.zeros(2, 8, 6, 6).double(),
        TypeError,
        "float32 like .*got .*float64",
    ),
    ("int64", lambda: torch.zeros(2, 8, 6, 6).long(), TypeError, "float64, float32.*got .*int64"),
    ("complex", lambda: torch.zeros(2, 8, 6, 6) * 1j, TypeError, "float64, float32.*got .*complex"),
    ("meta", lambda: torch.zeros(2, 8, 6, 6, device="meta"), ValueError, "on cpu.*got meta"),
    ("None", lambda: None, TypeError, "input must be a tensor.*got None"),
    ("text", lambda: "images", TypeError, "input must be a tensor.*got str"),
    (
        "array",
        lambda: torch.zeros(2, 8, 6, 6).numpy(),
        TypeError,
        "input must be a tensor.*ndarray",
    ),
]


def inputs() -> Iterator[WrongUse]:
    """What modules must not be called with."""
    for name, build in (("block", block), ("transition", transition), ("residual block", residual)):
        for what, x, error, message in WRONG_INPUTS:
            yield WrongUse(
                "modules", f"{name}({what})", lambda m, x=x: m(x()), error, message, build
            )
    for what, value in (("an empty list", []), ("a list with None", [None]), ("numbers", [1, 2])):
        yield WrongUse(
            "modules", f"block({what})", lambda m, v=value: m(v), TypeError, "input must be", block
        )
    small = dict(block_config=(2, 2), growth_rate=4, num_init_features=8)

    def own() -> torch.nn.Module:
        return de.EfficientDenseNet(**small)  # type: ignore[arg-type]

    for what, shape, message in (
        ("small images", (1, 3, 2, 64), "at least . pixels high and wide.*got 2 x 64"),
        ("an image alone", (3, 64, 64), r"batch of images \[N, C, H, W\], got shape"),
        ("other channels", (1, 4, 64, 64), "3 channels, got"),
    ):
        yield WrongUse(
            "networks",
            f"network({what})",
            lambda m, s=shape: m(torch.zeros(s)),
            ValueError,
            message,
            own,
        )
    for what, call, error, message in (
        ("reset_classifier(-1)", lambda m: m.reset_classifier(-1), ValueError, "num_classes must"),
        (
            "reset_classifier('a')",
            lambda m: m.reset_classifier("a"),
            ValueError,
            "num_classes must",
        ),
        (
            "forward_end_points(names=['none'])",
            lambda m: m.forward_end_points(torch.zeros(1, 3, 64, 64), ["none"]),
            ValueError,
            "names.*none",
        ),
        (
            "memory = 'least'",
            lambda m: setattr(m.features.denseblock1, "memory", "least"),
            ValueError,
            "memory must be 'auto', 'recompute' or 'store', got 'least'",
        ),
    ):
        yield WrongUse("networks", what, call, error, message, own)
    for what, call, error, message in (
        ("explain(None)", lambda m: de.explain(None, 1), TypeError, "module must be.*NoneType"),
        (
            "explain(shape)",
            lambda m: de.explain(m, (1, 3)),
            TypeError,
            "input must be a tensor.*tuple",
        ),
        (
            "explain(other channels)",
            lambda m: de.explain(m, torch.zeros(1, 4, 64, 64)),
            ValueError,
            "must have 3 channels, got shape",
        ),
    ):
        yield WrongUse("functions", what, call, error, message, converted)
    yield from each(
        "functions", "release({!r})", de.release, ("nowhere", 1.5, []), ValueError, "device.*got"
    )


USES = [*constructors(), *inputs()]
