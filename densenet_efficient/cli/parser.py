"""What all commands share: one parser class, the types of options, the options of a network."""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from ..models.catalogue import CATALOGUE
from ..models.networks import CIFAR, DENSE_NETWORKS, NETWORKS, NetworkSpec
from ..train.device import device_memory_bytes

__all__ = [
    "Budget",
    "Help",
    "Parser",
    "UsageError",
    "add_command",
    "budget",
    "count",
    "is_small",
    "json_option",
    "network_from",
    "network_options",
    "number",
    "print_json",
    "size_options",
    "whole_number",
]

CIFAR_NAMES = tuple(name for name, entry in CATALOGUE.items() if entry.network.small_inputs)
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS |= {"ki": 1024, "mi": 1024**2, "gi": 1024**3, "ti": 1024**4}
_SIZE = re.compile(r"(?P<number>\d+(\.\d*)?|\.\d+)\s*(?P<unit>%|([kmgt]i?)?b?)", re.IGNORECASE)


class UsageError(ValueError):
    """A wrong command line, in one line."""


class Help(argparse.RawDescriptionHelpFormatter):
    """Every option's default after its help, where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        shown = action.default not in (None, False, argparse.SUPPRESS)
        if shown and action.option_strings and text and "default" not in text:
            values = action.default if isinstance(action.default, list) else [action.default]
            text += f" (default: {' '.join(str(value) for value in values)})"
        return text


class Parser(argparse.ArgumentParser):
    """Raises a `UsageError` of one line instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message} (options: --help)")


def add_command(commands: Any, name: str, text: str) -> Parser:
    """A command of the program."""
    return commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        usage=f"{commands._prog_prefix} {name} [options]",
        formatter_class=Help,
    )


def count(text: str) -> int:
    """An option's type: 1, 2, ..."""
    return _integer(text, 1, "a positive integer")


def whole_number(text: str) -> int:
    """An option's type: 0, 1, 2, ..."""
    return _integer(text, 0, "an integer of at least 0")


def _integer(text: str, least: int, expected: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
    return value


def number(text: str) -> float:
    """An option's type: a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, got {text}")
    return value


@dataclass(frozen=True)
class Budget:
    """Memory as people write it. amount: bytes, or with `is_share` a share of a device's memory."""

    text: str
    amount: float
    is_share: bool = False

    def bytes_on(self, device: torch.device) -> float:
        """The budget in bytes."""
        return self.amount * device_memory_bytes(device) if self.is_share else self.amount


def budget(text: str) -> Budget:
    """An option's type: 12GB (10^9 bytes), 11.5GiB (2^30), 80% of the device's, or bytes.
    A device has no more than 100%."""
    found = _SIZE.fullmatch(text.strip())
    amount = float(found["number"]) if found else 0.0
    if not found or amount <= 0:
        raise argparse.ArgumentTypeError(
            f"expected a size such as 12GB, 11.5GiB, 80% or a number of bytes, got {text}"
        )
    unit = found["unit"].lower()
    if unit == "%":
        if amount > 100:
            raise argparse.ArgumentTypeError(
                f"expected at most 100% of the device's memory, got {text}"
            )
        return Budget(text, amount / 100, is_share=True)
    return Budget(text, amount * _UNITS[unit.removesuffix("b")])


def network_options(parser: argparse.ArgumentParser, default: str | None) -> None:
    """--model and the options that belong to it. default: None leaves the choice to the command."""
    group = parser.add_argument_group("network")
    chosen = "" if default else f" (default: {CIFAR}; densenet121 for --data imagefolder)"
    dense = DENSE_NETWORKS if default else ()  # without a default it is for a data set of classes
    group.add_argument(
        "--model", choices=(*NETWORKS, *CIFAR_NAMES, *dense), default=default, metavar="NAME",
        help=f"which DenseNet, one of those that `list` shows, or {CIFAR}{chosen}",
    )  # fmt: skip
    group.add_argument(
        "--depth", type=count, metavar="N", help=f"{CIFAR} only: layers (default: 100)"
    )
    group.add_argument(
        "--growth-rate",
        type=count,
        metavar="K",
        help=f"{CIFAR} only: channels that a layer adds (default: 12)",
    )
    group.add_argument(
        "--no-bottleneck", action="store_true",
        help=f"{CIFAR} only: plain layers without bottlenecks",
    )  # fmt: skip
    group.add_argument(
        "--compression", type=number, metavar="SHARE",
        help=f"{CIFAR} only: share of the channels that a transition keeps "
        "(default: 0.5; without bottlenecks 1)",
    )  # fmt: skip
    group.add_argument(
        "--drop-rate",
        type=number,
        metavar="P",
        help="dropout after the last convolution of every layer (default: 0; FC-DenseNets 0.2)",
    )
    group.add_argument(
        "--drop-everywhere", action="store_true",
        help="dropout after every convolution but the first, as in the paper",
    )  # fmt: skip


def network_from(
    options: argparse.Namespace, classes: int | None = None, channels: int = 3
) -> NetworkSpec:
    """What the options of `network_options` say. classes: None is what the papers train it on."""
    small = is_small(options.model)
    if classes is None:
        classes = 10 if small else 11 if options.model in DENSE_NETWORKS else 1000
    given = {
        "depth": options.depth,
        "growth_rate": options.growth_rate,
        "bottleneck": False if options.no_bottleneck else None,
        "compression": options.compression,
    }
    name = options.model
    published_drop_rate = CATALOGUE[name].network.drop_rate if name in CATALOGUE else 0.0
    if name in CIFAR_NAMES:
        for option, value in given.items():
            if value is not None:
                raise ValueError(f"{option}: expected only with model {CIFAR}, got it with {name}")
        published = CATALOGUE[name].network
        name, given = CIFAR, {option: getattr(published, option) for option in given}
    return NetworkSpec(
        name,
        **given,
        drop_rate=published_drop_rate if options.drop_rate is None else options.drop_rate,
        num_classes=classes,
        in_channels=channels,
        drop_everywhere=options.drop_everywhere,
    )


def is_small(model: str) -> bool:
    """Whether the network of that name is for CIFAR."""
    return model == CIFAR or model in CIFAR_NAMES


def size_options(parser: argparse.ArgumentParser, batch: int) -> None:
    """--batch and --image-size."""
    parser.add_argument(
        "--batch", "--batch-size", type=count, default=batch, metavar="N", help="images in a batch"
    )
    parser.add_argument(
        "--image-size", type=count, metavar="PIXELS",
        help=f"pixels a side (default: 224; {CIFAR} 32)",
    )  # fmt: skip


def json_option(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="for programs instead of people")


def print_json(found: Any) -> None:
    """Plain values as JSON; numbers that are not finite as null, which JSON does not have."""
    print(json.dumps(_finite(found), indent=2, allow_nan=False))


def _finite(found: Any) -> Any:
    if isinstance(found, float):
        return found if math.isfinite(found) else None
    if isinstance(found, dict):
        return {key: _finite(value) for key, value in found.items()}
    return [_finite(value) for value in found] if isinstance(found, (list, tuple)) else found
