"""The work of each operator on one layer's volumes: ours and the bare kernel of eager PyTorch, on
random tensors in the layout of training, with their bytes and FLOPs. See bench_operators.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from densenet_efficient.ops import compiled
from densenet_efficient.ops.interface import CUDA_NAMES
from tools.op_cases import Case, accumulates, make


@dataclass(frozen=True)
class Shape:
    """One layer's volumes: side of the map, channels C_l read of `total` in the buffer, growth;
    the bottleneck has 4 * growth channels."""

    name: str
    side: int
    channels: int
    total: int
    growth: int

    @property
    def bottleneck(self) -> int:
        return 4 * self.growth

    def sizes(self, op: str, batch: int) -> tuple[tuple[int, ...], dict[str, int]]:
        """The operator's sizes, and the channels of the buffers that its activations lie in."""
        side, k = self.side, self.bottleneck
        pixels, image = batch * side**2, (batch, side, side)
        if op == "channel_stats":
            return (pixels, self.growth), {"x": self.total}
        if op.startswith("norm_relu_conv1x1"):
            inner = {"y": k, "dz_y": k, "x": self.total, "dx": self.total}
            return (pixels, self.channels, k), inner
        if op.startswith("norm_relu_conv3x3"):
            inner = {"x": k, "dx": k, "y": self.total, "dy": self.total}
            return (*image, k, self.growth), inner
        if op in CUDA_NAMES:
            inner = {"x": 3, "y": self.total, "dy": self.total}
            return (batch, 2 * side, 2 * side, 3, self.total), inner
        half = self.total // 2
        if op.startswith("transition"):
            inner = {"x": self.total, "dx": self.total, "y": half, "dy": half}
            return (*image, self.total, half), inner
        inner = dict.fromkeys(("x", "dx", "y", "dy"), self.total)
        return (*image, self.total), inner


SHAPES = (
    Shape("121 block 1", 56, 160, 256, 32),
    Shape("121 block 2", 28, 320, 512, 32),
    Shape("121 block 3", 14, 640, 1024, 32),
    Shape("121 block 4", 7, 768, 1024, 32),
    Shape("BC-100-12 block 1", 32, 120, 216, 12),
)


@dataclass
class Work:
    """An operator on one layer's volumes. bare: eager PyTorch's kernel. size: the least bytes to
    move, each input read once and each output written once; flops: those of the products."""

    case: Case
    bare: Callable[[], Any]
    size: int
    flops: int

    def run(self) -> None:
        getattr(compiled, self.case.op)(*self.case.arguments.values())


def work(op: str, shape: Shape, batch: int, dtype: torch.dtype, device: torch.device | str) -> Work:
    """Reproducible: torch's seed is set."""
    torch.manual_seed(0)
    sizes, widths = shape.sizes(op, batch)
    case = make(op, sizes, dtype, widths=widths, device=device)
    return Work(case, BARE[op](case.arguments), least_bytes(case), flops(case))


def least_bytes(case: Case) -> int:
    moved = sum(case.sizes.get(name, 0) for name in ("x", "y", "dx", "dy", "dz_y", "weight"))
    return moved + (case.sizes["dx"] if accumulates(case.op, case.arguments) else 0)


def flops(case: Case) -> int:
    """Two for each product of an output's pixel and a weight; twice as many backward, where it has
    the gradients of both."""
    weight = case.arguments.get("dweight" if case.op.endswith("_weight") else "weight")
    if weight is None:
        return 0
    result = next(case.arguments[name] for name in ("dz_y", "dy", "y") if name in case.arguments)
    forward = 2 * math.prod(result.shape[:-1]) * weight.numel()
    return 2 * forward if case.op.endswith("backward") else forward


def _nchw(x: Tensor) -> Tensor:
    return x.contiguous().permute(0, 3, 1, 2)


Arguments = dict[str, Any]


def _channel_stats(a: Arguments) -> Callable[[], Any]:
    packed = a["x"].contiguous()
    return lambda: torch.var_mean(packed, 0)


def _conv1x1_forward(a: Arguments) -> Callable[[], Any]:
    packed, weight = a["x"].contiguous(), a["weight"]
    return lambda: packed @ weight.t()


def _conv1x1_backward(a: Arguments) -> Callable[[], Any]:
    packed, gradient, weight = a["x"].contiguous(), a["dz_y"], a["weight"]

    def bare() -> None:
        torch.mm(gradient, weight)
        torch.mm(gradient.t(), packed)

    return bare


def _conv3x3_forward(a: Arguments) -> Callable[[], Any]:
    packed = _nchw(a["x"])
    filters = a["weight"].contiguous(memory_format=torch.channels_last)
    return lambda: functional.conv2d(packed, filters, padding=1)


def _conv3x3_backward(a: Arguments) -> Callable[[], Any]:
    packed, gradient = _nchw(a["x"]), _nchw(a["dy"])
    filters = a["weight"].contiguous(memory_format=torch.channels_last)
    return lambda: torch.ops.aten.convolution_backward(
        gradient, packed, filters, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
        [True, True, False],
    )  # fmt: skip


def _transition_forward(a: Arguments) -> Callable[[], Any]:
    x, weight = a["x"].contiguous(), a["weight"]
    rows, image = x.flatten(0, 2), (*x.shape[:3], weight.shape[0])
    return lambda: functional.avg_pool2d((rows @ weight.t()).view(image).permute(0, 3, 1, 2), 2)


def _transition_backward(a: Arguments) -> Callable[[], Any]:
    rows, weight = a["x"].contiguous().flatten(0, 2), a["weight"]
    gradient = torch.randn_like(rows[:, : weight.shape[0]]).contiguous()

    def bare() -> None:  # eager convolves before it pools
        torch.mm(gradient, weight)
        torch.mm(gradient.t(), rows)

    return bare


def _stem_forward(a: Arguments) -> Callable[[], Any]:
    packed = _nchw(a["x"])
    return lambda: functional.max_pool2d(packed, 3, 2, 1)


def _stem_backward(a: Arguments) -> Callable[[], Any]:
    packed, gradient = _nchw(a["x"]), _nchw(a["dy"])
    _, winners = functional.max_pool2d(packed, 3, 2, 1, return_indices=True)
    return lambda: torch.ops.aten.max_pool2d_with_indices_backward(
        gradient, packed, [3, 3], [2, 2], [1, 1], [1, 1], False, winners
    )


def _stem_conv_forward(a: Arguments) -> Callable[[], Any]:
    packed = _nchw(a["x"])
    filters = a["weight"].contiguous(memory_format=torch.channels_last)
    return lambda: functional.conv2d(packed, filters, stride=2, padding=3)


def _stem_conv_backward_weight(a: Arguments) -> Callable[[], Any]:
    packed, gradient = _nchw(a["x"]), _nchw(a["dy"])
    filters = a["dweight"].to(packed.dtype, memory_format=torch.channels_last)
    return lambda: torch.ops.aten.convolution_backward(
        gradient, packed, filters, None, [2, 2], [3, 3], [1, 1], False, [0, 0], 1,
        [False, True, False],
    )  # fmt: skip


# The kernels that eager PyTorch runs for each operator's product or pooling, on packed tensors.
BARE: dict[str, Callable[[Arguments], Callable[[], Any]]] = {
    "channel_stats": _channel_stats,
    "norm_relu_conv1x1_forward": _conv1x1_forward,
    "norm_relu_conv1x1_backward": _conv1x1_backward,
    "norm_relu_conv3x3_forward": _conv3x3_forward,
    "norm_relu_conv3x3_backward": _conv3x3_backward,
    "transition_forward": _transition_forward,
    "transition_backward": _transition_backward,
    "stem_forward": _stem_forward,
    "stem_backward": _stem_backward,
    "stem_conv_forward": _stem_conv_forward,
    "stem_conv_backward_weight": _stem_conv_backward_weight,
}
LAYER, TRANSITION, STEM = (
    tuple(op for op in BARE if op.startswith(prefixes) and op not in CUDA_NAMES)
    for prefixes in (("channel_stats", "norm_relu"), "transition", "stem")
)
STEM_SHAPE = Shape("121 stem", 112, 64, 64, 32)
