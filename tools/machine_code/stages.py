"""The calls of a network's blocks whose launches are counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from densenet_efficient.ops.interface import CUDA_NAMES

from .compiler import Compiled
from .executed import Executed, execute, name_of
from .launches import Launchers, Shape

OPERATORS = (
    "norm_relu_conv1x1_forward",
    "norm_relu_conv1x1_backward",
    "norm_relu_conv3x3_forward",
    "norm_relu_conv3x3_backward",
)
STEM = "stem"
IMAGES = 512
# DenseNet-121 at 224 pixels: of each block the images' height and width, and the channels that its
# middle layer reads.
BLOCKS = {"block 1": (56, 160), "block 2": (28, 320), "block 3": (14, 640), "block 4": (7, 768)}


def calls(block: str) -> list[Shape]:
    """A middle layer's calls, with bottlenecks of 128 channels and 32 new features; those of the
    stem's convolution, of 64 channels."""
    if block == STEM:
        return [Shape(op, (IMAGES, 224, 224, 3, 64)) for op in CUDA_NAMES]
    side, channels = BLOCKS[block]
    flat, images = (IMAGES * side * side, channels, 128), (IMAGES, side, side, 128, 32)
    return [Shape(op, flat) if "1x1" in op else Shape(op, images, 128) for op in OPERATORS]


def stages(
    kernels: Sequence[Compiled], blocks: Sequence[str] = (STEM, *BLOCKS)
) -> Iterator[tuple[str, Executed]]:
    """What each persistent kernel of the blocks' calls executes, by the block's name."""
    by_name = {kernel.name: kernel for kernel in kernels}
    with Launchers((*OPERATORS, *CUDA_NAMES)) as launchers:
        for block in blocks:
            for shape in calls(block):
                for launch in launchers.launches(shape):
                    if launch.tiles:
                        yield block, execute(launch, by_name[name_of(launch)])
