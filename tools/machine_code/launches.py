"""The launches of an operator at a shape, as the launcher itself makes them: grid, block, shared
memory and the kernel's parameters, from the launchers' own sources built for the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tools import op_cases
from tools.emulation import Device, Emulator, Launch

H200 = Device(multiprocessors=132, shared_bytes=227 << 10)


@dataclass(frozen=True)
class Shape:
    """One call of an operator; sizes as in tools/op_cases.py. stride: channels of the buffer that
    x, and dx where it is added to, are slices of."""

    op: str
    sizes: tuple[int, ...]
    stride: int | None = None


class Launchers:
    """Lists launches, for any number of shapes; a context manager."""

    def __init__(self, ops: Sequence[str]) -> None:
        self.emulator = Emulator([op_cases.kernel_file(op) for op in ops], sanitize=False)

    def __enter__(self) -> Launchers:
        return self

    def __exit__(self, *_: object) -> None:
        self.emulator.close()

    def launches(
        self, shape: Shape, device: Device = H200, dtype: torch.dtype = torch.bfloat16
    ) -> list[Launch]:
        widths = {} if shape.stride is None else dict.fromkeys(("x", "dx"), shape.stride)
        case = op_cases.make(shape.op, shape.sizes, dtype, widths=widths, device="meta")
        return self.emulator.call(case.op, *case.arguments.values(), device=device)
