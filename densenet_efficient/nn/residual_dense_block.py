"""ESRGAN's residual dense block in one buffer: the drop-in module, and its execution.

Five convolutions on growing prefixes, LeakyReLU after the first four, no norm. PyTorch runs the
convolutions; what is ours is that no concatenation exists and that the buffer is all that is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core import eager
from ..core.residual_dense_block import LAYERS, ResidualDenseBlockFunction, ResidualSpec
from ..ops.dispatch import Dispatch
from . import execution, watch
from .execution import ORIGINAL, Efficient
from .layers import convolution_options
from .options import check_count


@dataclass(frozen=True)
class ResidualParts:
    """The modules of one block, whatever its class calls them.

    convolutions: five, in order. activations: LeakyReLUs after the first four. pointwise: ESRGAN+'s
    1x1 convolution of the input, or None. scale: of what is added to the input.
    """

    convolutions: tuple[nn.Conv2d, ...]
    activations: tuple[nn.LeakyReLU, ...]
    pointwise: nn.Conv2d | None = None
    scale: float = 0.2


def standard_parts(block: Any) -> ResidualParts:
    """Of a block with BasicSR's attribute names."""
    convolutions = (block.conv1, block.conv2, block.conv3, block.conv4, block.conv5)
    return ResidualParts(convolutions, (block.lrelu,) * (LAYERS - 1))


class ResidualDenseBlockExecution(Efficient):
    """The execution of a residual dense block, whatever holds its convolutions."""

    def _adopt(self, parts: Callable[[nn.Module], ResidualParts]) -> None:  # type: ignore[override]
        super()._adopt(parts=parts)

    def parts(self) -> ResidualParts:
        """The modules of the block."""
        return self._efficient.parts(self)  # type: ignore[misc]

    def _change(self) -> str | None:
        children = dict(self.named_children())
        return self._patch() or watch.change(children, self._efficient.structure)  # type: ignore[arg-type]

    def path(self, x: Tensor) -> Dispatch:
        """How this block would run on x, and why."""
        return self._decision(x)[0]

    def _decision(self, x: Tensor) -> tuple[Dispatch, ResidualSpec | None]:
        reason = execution.input_problem(x) or self._change()
        spec = None
        if reason is None:
            spec, reason = spec_of(self.parts())
        if reason is not None:
            return Dispatch(ORIGINAL, reason), None
        return Dispatch("fallback", "PyTorch's convolutions on one shared buffer"), spec

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape."""
        if eager.is_exporting():
            return self.original_class.forward(self, x)
        return self._efficient_forward(x)

    @torch.compiler.disable(reason="a residual dense block runs outside any graph")
    def _efficient_forward(self, x: Tensor) -> Tensor:
        chosen, spec = self._decision(x)
        if spec is None:
            return self._run_original(chosen, x)
        execution.record(self, "", chosen)
        parts = self.parts()
        parameters = [p for conv in parts.convolutions for p in (conv.weight, conv.bias)]
        plus = None if parts.pointwise is None else parts.pointwise.weight
        dims = len(spec.geometry[0].padding)
        execution.check_input(x, dims, spec.channels, parameters[0], "conv1")  # type: ignore[arg-type]
        dtype = execution.working_dtype(x)
        y, _ = ResidualDenseBlockFunction.apply(spec, dtype, x, *parameters, plus)
        return y


def spec_of(parts: ResidualParts) -> tuple[ResidualSpec | None, str | None]:
    """What a call is, or why the buffer cannot serve these modules. Reads no parameter."""
    if any(type(activation) is not nn.LeakyReLU for activation in parts.activations):
        return None, "an activation is no LeakyReLU"
    slopes = {activation.negative_slope for activation in parts.activations}
    if len(slopes) != 1 or min(slopes) < 0:
        return None, f"the LeakyReLUs' slopes are {sorted(slopes)}"
    channels = parts.convolutions[0].in_channels
    growth = parts.convolutions[0].out_channels
    geometry = []
    for index, conv in enumerate(parts.convolutions):
        options, problem = convolution_options(conv, f"conv{index + 1}")
        if problem is not None:
            return None, problem
        last = index == LAYERS - 1
        expected = (channels + index * growth, channels if last else growth)
        if (conv.in_channels, conv.out_channels) != expected:
            return None, (
                f"conv{index + 1} is from {conv.in_channels} to {conv.out_channels} channels, not "
                f"from {expected[0]} to {expected[1]}"
            )
        assert options is not None
        geometry.append(options)
    plus = parts.pointwise
    if plus is not None and (
        type(plus) is not nn.Conv2d
        or (plus.in_channels, plus.out_channels) != (channels, growth)
        or (plus.kernel_size, plus.stride, plus.groups) != ((1, 1), (1, 1), 1)
        or plus.padding != (0, 0)
        or plus.bias is not None
    ):
        return None, f"conv1x1 is no 1x1 convolution from {channels} to {growth} channels"
    return ResidualSpec(channels, growth, min(slopes), parts.scale, tuple(geometry)), None


class PlainResidualDenseBlock(nn.Module):
    """The block as BasicSR has it: children conv1 to conv5 (3x3, with bias) and lrelu."""

    def __init__(self, num_feat: int = 64, num_grow_ch: int = 32) -> None:
        check_count("num_feat", num_feat)
        check_count("num_grow_ch", num_grow_ch)
        super().__init__()
        for index in range(LAYERS):
            new = num_feat if index == LAYERS - 1 else num_grow_ch
            conv = nn.Conv2d(num_feat + index * num_grow_ch, new, 3, padding=1)
            nn.init.kaiming_normal_(conv.weight)
            with torch.no_grad():
                conv.weight.mul_(0.1)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            self.add_module(f"conv{index + 1}", conv)
        self.lrelu = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """[N, num_feat, H, W] -> the same shape."""
        features = x
        for index in range(1, LAYERS):
            new = self.lrelu(self.get_submodule(f"conv{index}")(features))
            features = torch.cat((features, new), 1)
        return self.get_submodule("conv5")(features) * 0.2 + x


class EfficientResidualDenseBlock(ResidualDenseBlockExecution, PlainResidualDenseBlock):
    """ESRGAN's residual dense block in one buffer: BasicSR's ``ResidualDenseBlock``, children, keys
    and initialisation.

    Args:
        num_feat: channels of input and output. num_grow_ch: new channels of each convolution.

    Kept for backward: one buffer of ``num_feat + 4 * num_grow_ch`` channels, a quarter of what the
    plain block keeps. Input and output ``[N, num_feat, H, W]``, contiguous or channels last;
    float64, float32, bfloat16, float16, and autocast.

    Raises:
        ValueError: bad options; wrong rank, channels or device.
        TypeError: a dtype that is not floating or differs from the weights'.
    """

    original_class = PlainResidualDenseBlock

    def __init__(self, num_feat: int = 64, num_grow_ch: int = 32) -> None:
        PlainResidualDenseBlock.__init__(self, num_feat, num_grow_ch)
        self._adopt(standard_parts)
