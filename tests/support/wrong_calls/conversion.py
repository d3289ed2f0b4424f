"""Wrong uses of conversion and of weights: what is refused leaves the model as it was."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import densenet_efficient as de
from tests.support.peer import DenseBlock

from .use import NOT_MODELS, WrongUse, converted, each, plain

GROUP = "conversion and weights"


class Reversed(DenseBlock):
    """New channels first."""

    def forward(self, init_features: Tensor) -> Tensor:
        """As torchvision's, but for the order."""
        features = [init_features]
        for layer in self.values():
            features.insert(0, layer(features))
        return torch.cat(features, 1)


class Stranger(nn.Sequential):
    """A block of an unknown library that somebody writes an adapter for."""


def changed(path: str, module: Callable[[], nn.Module]) -> nn.Module:
    """torchvision's network with another module at a path."""
    model = plain()
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module())
    return model


def _with(change: Callable[[nn.Module], object]) -> nn.Module:
    model = plain()
    change(model)
    return model


def _fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        model.get_parameter("features.denseblock1.denselayer1.conv1.weight").fill_(value)


LAYER = "features.denseblock1.denselayer1"
UNCONVERTIBLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "LeakyReLU": (
        lambda: changed("features.denseblock2.denselayer3.relu2", nn.LeakyReLU),
        "denseblock2.*denselayer3: relu2 is LeakyReLU",
    ),
    "SiLU": (lambda: changed(f"{LAYER}.relu1", nn.SiLU), "relu1 is SiLU; only ReLU"),
    "GroupNorm": (
        lambda: changed(f"{LAYER}.norm2", lambda: nn.GroupNorm(4, 16)),
        "denseblock1.*denselayer1: norm2 is GroupNorm",
    ),
    "LayerNorm": (lambda: changed(f"{LAYER}.norm1", lambda: nn.LayerNorm(8)), "norm1 is LayerNorm"),
    "lazy norm": (
        lambda: changed(f"{LAYER}.norm1", nn.LazyBatchNorm2d),
        "denselayer1.norm1 is lazy",
    ),
    "stride": (
        lambda: changed(f"{LAYER}.conv2", lambda: nn.Conv2d(16, 4, 3, stride=2)),
        "denselayer1: conv2 has groups 1, stride",
    ),
    "groups": (
        lambda: changed(f"{LAYER}.conv2", lambda: nn.Conv2d(16, 4, 3, padding=1, groups=4)),
        "conv2 has groups 4",
    ),
    "padding mode": (
        lambda: changed(
            f"{LAYER}.conv2", lambda: nn.Conv2d(16, 4, 3, padding=1, padding_mode="reflect")
        ),
        "padding mode 'reflect'",
    ),
    "linear": (lambda: changed(f"{LAYER}.conv1", lambda: nn.Linear(8, 16)), "conv1 is Linear"),
    "one more child": (lambda: changed(f"{LAYER}.attention", nn.Identity), "attention"),
    "a foreign layer": (
        lambda: changed(LAYER, lambda: nn.Conv2d(8, 4, 3, padding=1)),
        "denselayer1 is Conv2d",
    ),
    "no norm": (lambda: changed(f"{LAYER}.norm1", nn.Identity), "norm1 is Identity"),
    "a subclass": (
        lambda: changed("features.denseblock1", lambda: Reversed(2, 8, 4, 4, 0.0)),
        "Reversed.*unknown class.*register_adapter",
    ),
    "a forward of its own": (
        lambda: _with(lambda m: setattr(m.features.denseblock1, "forward", abs)),
        "denseblock1.*forward was replaced",
    ),
    "NaN": (lambda: _with(lambda m: _fill(m, float("nan"))), "not finite"),
    "infinity": (lambda: _with(lambda m: _fill(m, float("inf"))), "not finite"),
    "quantisation": (
        lambda: _with(lambda m: setattr(m.get_submodule(f"{LAYER}.conv1"), "qconfig", object())),
        "denselayer1.conv1 is quantised",
    ),
    "torch.fx": (lambda: torch.fx.symbolic_trace(plain()), "traced by torch.fx"),
    "no dense block": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3)),
        "nothing to convert in Sequential",
    ),
    "an empty model": (nn.Sequential, "nothing to convert in Sequential"),
}


def _unfit(error: Exception) -> Callable[[nn.Module], de.LayerParts]:
    def parts(layer: nn.Module) -> de.LayerParts:
        raise error

    return parts


def _stranger() -> nn.Module:
    return Stranger(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))


def _convert_with(parts: Any, model: nn.Module) -> None:
    """convert() with an adapter that is registered for its length."""
    from densenet_efficient.conversion import adapters

    de.register_adapter(Stranger, de.block_adapter(parts))
    try:
        de.convert(model)
    finally:
        del adapters._ADAPTERS[adapters.qualified_name(Stranger)]


def conversions() -> Iterator[WrongUse]:
    """convert, inspect_conversion, unconvert and adapters."""
    use = functools.partial(WrongUse, GROUP)
    for what, (model, reason) in UNCONVERTIBLE.items():
        yield use(f"convert: {what}", de.convert, de.ConversionError, f"(?s){reason}", model)
    for function in (de.convert, de.inspect_conversion, de.unconvert):
        yield from each(
            GROUP, function.__name__ + "({!r})", function, NOT_MODELS, TypeError,
            "model must be a torch.nn.Module, got",
        )  # fmt: skip
    yield from each(
        GROUP, "convert(memory={!r})", de.convert, ("least", None, 0), ValueError,
        "memory must be 'auto', 'recompute' or 'store', got", plain,
    )  # fmt: skip
    for error in (AttributeError("norm1"), KeyError("norm1"), IndexError("3"), TypeError("no")):
        yield use(
            f"an adapter that raises {error!r}",
            lambda m, e=error: _convert_with(_unfit(e), m),
            de.ConversionError,
            f"its adapter does not fit: {type(error).__name__}",
            _stranger,
        )
    yield use(
        "an adapter that returns nothing",
        lambda m: _convert_with(lambda layer: None, m),
        de.ConversionError,
        "its adapter does not fit",
        _stranger,
    )
    adapter = de.block_adapter(lambda layer: layer)  # type: ignore[arg-type,return-value]
    yield from each(
        GROUP, "register_adapter({!r})", lambda source: de.register_adapter(source, adapter),
        (3, None, "Block", nn.Sequential(), int), TypeError,
        "source must be a subclass of torch.nn.Module",
    )  # fmt: skip
    yield from each(
        GROUP, "register_adapter(Stranger, {!r})",
        functools.partial(de.register_adapter, Stranger), (None, "named", Stranger), TypeError,
        "adapter must be an Adapter",
    )  # fmt: skip
    for option in ("parts", "check", "layers", "with_input"):
        given = {"parts": lambda layer: layer, option: "norm1"}
        yield use(
            f"block_adapter({option}='norm1')",
            lambda g=given: de.block_adapter(**g),
            TypeError,
            f"{option} must be a function",
        )
    for value in ([], {}, {"a": 3}, {"a": nn.Identity()}, nn.Identity(), None):
        yield use(
            f"EfficientDenseBlock.from_layers({value!r})",
            lambda v=value: de.EfficientDenseBlock.from_layers(v),
            (ValueError if value == {} else TypeError),
            "layers",
        )


def _state(**changes: Any) -> dict[str, Any]:
    """The state dict of `plain`, with keys replaced; None takes them out."""
    state: dict[str, Any] = {**plain().state_dict()}
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del state[name]
        else:
            state[name] = value
    return state


def _file(name: str, content: bytes) -> None:
    """densenet121(weights=a damaged file); the file is removed again."""
    path = Path(name)
    path.write_bytes(content)
    try:
        de.densenet121(weights=os.fspath(path.absolute()))
    finally:
        path.unlink()


def weights() -> Iterator[WrongUse]:
    """load_weights, and `weights=` of the networks."""
    use = functools.partial(WrongUse, GROUP)
    for what, state, message in (
        ("nothing", {}, "state does not fit.*missing"),
        ("a missing key", _state(classifier__bias=None), "missing classifier.bias"),
        ("an unknown key", _state(extra=torch.zeros(1)), "unexpected extra"),
        (
            "another shape",
            _state(classifier__bias=torch.zeros(7)),
            r"classifier.bias: expected shape \[5\], got \[7\]",
        ),
        (
            "a list",
            _state(classifier__bias=[0.0] * 5),
            r"classifier.bias: expected shape \[5\], got list",
        ),
        (
            "None",
            _state() | {"classifier.bias": None},
            "classifier.bias: expected shape.*got NoneType",
        ),
        ("another network", de.densenet_cifar(10, 4).state_dict(), "state does not fit.*missing"),
    ):
        for name, build in (("plain", plain), ("converted", converted)):
            yield use(
                f"load_weights of {what} into a {name} model",
                lambda m, s=state: de.load_weights(m, s),
                ValueError,
                message,
                build,
            )
    yield from each(
        GROUP, "load_weights(model, {!r})", de.load_weights,
        (None, "weights.pth", 3, [("a", 1)], nn.Identity()), TypeError,
        "state must be a mapping.*got", plain,
    )  # fmt: skip
    yield use(
        "load_weights with keys that are no text",
        lambda m: de.load_weights(m, {1: torch.zeros(1)}),
        TypeError,
        "state must have names as keys, got 1",
        plain,
    )
    yield from each(
        GROUP, "load_weights({!r}, state)", lambda value: de.load_weights(value, {}), NOT_MODELS,
        TypeError, "model must be a torch.nn.Module, got",
    )  # fmt: skip
    for what, value, message in (
        (
            "another name",
            "IMAGENET1K_V9",
            "weights must be one of IMAGENET1K_V1.*got 'IMAGENET1K_V9'",
        ),
        ("a number", 5, "weights must be a torchvision weights entry.*got 5"),
        ("no file", "nowhere/x.pth", "weights: expected a file, got none at nowhere/x.pth"),
        ("a folder", Path("."), "weights: expected a file"),
        ("none published", None, "pretrained: expected without weights"),
    ):
        given = (
            {"weights": value} if value is not None else {"weights": "DEFAULT", "pretrained": True}
        )
        yield use(
            f"densenet121(weights): {what}",
            lambda g=given: de.densenet121(**g),
            ValueError,
            message,
        )
    yield use(
        "densenet264(weights='DEFAULT')",
        lambda: de.densenet264(weights="DEFAULT"),
        ValueError,
        "torchvision has none for densenet264",
    )
    for name, content in (("a.pth", b"no pickle"), ("b.safetensors", b"\x08"), ("c.pt", b"")):
        yield use(
            f"densenet121(weights={name!r}) of damaged bytes",
            functools.partial(_file, name, content),
            ValueError,
            "expected weights, got",
        )


USES = [*conversions(), *weights()]
