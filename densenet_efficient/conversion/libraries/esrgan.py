"""ESRGAN's residual dense block: five 3x3 convolutions with bias, LeakyReLU, no norm.

BasicSR, neosr   ResidualDenseBlock: conv1 .. conv5 and one lrelu for all
spandrel         ResidualDenseBlock_5C: conv1 .. conv4 are Sequentials with their own LeakyReLU,
                 conv5 is one without; `plus` adds conv1x1 (ESRGAN+)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...nn.classes import efficient_view
from ...nn.execution import Efficient
from ...nn.residual_dense_block import (
    ResidualDenseBlockExecution,
    ResidualParts,
    spec_of,
    standard_parts,
)
from ..adapters import Adapter
from ..checks import Unsupported, random_probe


def spandrel_parts(block: Any) -> ResidualParts:
    """Of spandrel's block."""
    layers = [block.conv1, block.conv2, block.conv3, block.conv4]
    kinds = [[type(child) for child in layer] for layer in layers]
    last = block.conv5
    if isinstance(last, nn.Sequential) and len(last) == 1:
        last = last[0]
    if any(len(kind) != 2 for kind in kinds) or isinstance(last, nn.Sequential):
        raise Unsupported(
            "its layers are no pairs of a convolution and an activation: norms, padding layers and "
            "other orders are not supported"
        )
    convolutions, activations = zip(*layers, strict=True)
    return ResidualParts((*convolutions, last), activations, block.conv1x1)


def _adapter(parts: Any) -> Adapter:
    def view(block: nn.Module, memory: str) -> Efficient:
        found = efficient_view(block, ResidualDenseBlockExecution)
        found._adopt(parts)
        problem = spec_of(found.parts())[1]
        if problem is not None:
            raise Unsupported(problem)
        return found

    def probe(block: nn.Module) -> Tensor:
        return random_probe(parts(block).convolutions[0].in_channels, 2)

    return Adapter(view, probe)


residual_dense_block = _adapter(standard_parts)
spandrel_residual_dense_block = _adapter(spandrel_parts)

ADAPTERS = {
    "basicsr.archs.rrdbnet_arch.ResidualDenseBlock": residual_dense_block,
    "neosr.archs.rrdbnet_arch.ResidualDenseBlock": residual_dense_block,
    "spandrel.architectures.__arch_helpers.block.ResidualDenseBlock_5C": (
        spandrel_residual_dense_block
    ),
}
