"""Every kernel launch of a dense layer's training step on a GPU, by name, without a GPU.

    python -m tools.launches [--memory recompute] [--contiguous] [--growth 32]

A block's step runs on the CPU under autocast to bfloat16, with parameters in float32. Each of our
operators is listed with the launches that its CUDA launcher makes (`tools.emulation`), each of
PyTorch's with one. A layer's launches are those by which the step of a block grows with one more of
them; what is left is the block's own, whose launches serve several layers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections import Counter
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from densenet_efficient.core import eager, functions, layout, replay, specs, weights
from densenet_efficient.nn.dense_block import EfficientDenseBlock
from tools.emulation import Emulator

aten = torch.ops.aten

_NO_LAUNCH = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}
_NO_LAUNCH |= {"detach", "_lazy_clone", "promote_types"}  # the same memory, or none

_REAL = {"stats", "next_stats"}  # tables, one of them inside the other


class Launches(NamedTuple):
    """By name, forward and backward: of each layer, and what the block has besides."""

    layer: Counter[str]
    block: Counter[str]


class _Counting(TorchDispatchMode):
    """Counts what would be launched on a GPU."""

    def __init__(self, emulator: Emulator) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.way = "forward"
        self._emulator = emulator

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func._schema.name.partition("::")[2]
        if func.namespace == "densenet_efficient":
            named = zip(func._schema.arguments, args, strict=False)
            hollow = [value if of.name in _REAL else _hollow(value) for of, value in named]
            for launch in self._emulator.call(name, *hollow):
                self.found[f"{self.way}: {launch.kernel}"] += 1
        elif not (name in _NO_LAUNCH or _is_view(func)):
            self.found[f"{self.way}: PyTorch's {name}"] += 1
        return func(*args, **(kwargs or {}))


def _hollow(value: Any) -> Any:
    """Its layout alone: launches of such tensors are listed, and nothing runs."""
    if isinstance(value, list):
        return [_hollow(one) for one in value]
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _is_view(func: Any) -> bool:
    written = [r.alias_info for r in func._schema.returns]
    return bool(written) and all(a is not None and not a.is_write for a in written)


def of_block(
    emulator: Emulator,
    layers: int,
    *,
    memory: str = "store",
    growth: int = 32,
    memory_format: torch.memory_format = torch.channels_last,
) -> Counter[str]:
    """The launches of one training step of a block."""
    channels = 2 * growth
    block = EfficientDenseBlock(layers, channels, 4, growth, 0.0, memory=memory)
    block = block.to(memory_format=memory_format)  # type: ignore[call-overload]
    x = torch.randn(2, channels, 8, 8).bfloat16().to(memory_format=torch.channels_last)
    gradient = torch.randn(2, channels + layers * growth, 8, 8).bfloat16()
    gradient = gradient.to(memory_format=torch.channels_last)
    counting = _Counting(emulator)
    on_gpu, device = layout.row_length, torch.device("cuda")
    with (
        mock.patch.object(layout, "row_length", lambda c, dtype, _: on_gpu(c, dtype, device)),
        mock.patch.object(replay, "record", lambda *_: None),  # a program does the same
        mock.patch.object(weights, "are_shared", lambda device: True),
        mock.patch.object(specs, "keeps_norms", lambda device: True),
        mock.patch.object(eager, "unusual_mode", lambda: None),
        mock.patch.object(functions, "has_overflowed", lambda table: False),  # asked on CPUs only
    ):
        for mode in (contextlib.nullcontext(), counting):  # the first call looks at the modules
            block.zero_grad()
            counting.way = "forward"
            with mode:
                with torch.autocast("cpu", torch.bfloat16):
                    y = block(x)
                counting.way = "backward"
                y.backward(gradient)
    return +counting.found


def count(emulator: Emulator, layers: int = 4, **options: Any) -> Launches:
    """The launches of a layer, and what a block of so many layers has besides them."""
    more, less = (of_block(emulator, n, **options) for n in (layers + 1, layers))
    layer = more - less
    block = Counter(less)
    block.subtract({name: layers * times for name, times in layer.items()})
    return Launches(layer, block)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.launches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--memory", choices=("store", "recompute"), default="store")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--growth", type=int, default=32)
    parser.add_argument("--contiguous", action="store_true", help="weights not channels last")
    options = parser.parse_args(arguments)
    memory_format = torch.contiguous_format if options.contiguous else torch.channels_last
    with Emulator(sanitize=False) as emulator:
        found = count(
            emulator, options.layers,
            memory=options.memory, growth=options.growth, memory_format=memory_format,
        )  # fmt: skip
    for title, launches in (
        ("a layer", found.layer),
        (f"besides, a block of {options.layers} layers", found.block),
    ):
        print(f"{title}: {sum(launches.values())}")
        for name, times in launches.items():
            if times:
                print(f"  {times}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
