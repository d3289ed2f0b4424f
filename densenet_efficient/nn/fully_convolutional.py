"""What a fully convolutional DenseNet is, apart from how it is executed: options, tree, forward.

Jegou et al., "The One Hundred Layers Tiramisu: Fully Convolutional DenseNets for Semantic
Segmentation", arXiv 1611.09326: dense blocks on a way down with poolings and on a way up with
transposed convolutions. A block's output at a resolution is a skip connection to the block of that
resolution on the way up, and what goes up is a block's new features only.

    conv0 - denseblock1 ------------------- skip -------------------> denseblock5 - classifier
                 |                                                        |
            transition1 - denseblock2 ------ skip ------> denseblock4 -- up2   only what is new
                               |                              |                goes up
                          transition2 ---- denseblock3 ----- up1

`reference.FCDenseNet` and `models.EfficientFCDenseNet` are this class with different blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .architecture import Network
from .options import (
    check_block_config,
    check_choice,
    check_compression,
    check_count,
    check_drop_rate,
)

# name: growth_rate, block_config (tables 2 and 3 of the paper)
FC_CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "fc_densenet56": {"growth_rate": 12, "block_config": (4,) * 11},
    "fc_densenet67": {"growth_rate": 16, "block_config": (5,) * 11},
    "fc_densenet103": {
        "growth_rate": 16, "block_config": (4, 5, 7, 10, 12, 15, 12, 10, 7, 5, 4),
    },
}  # fmt: skip

UPSAMPLINGS = ("deconv", "upsampling", "subpixel")
POOLINGS = ("max", "average")


class Upsampling(nn.Module):
    """Twice the resolution: a transposed 3x3 convolution ("deconv"), the nearest pixel
    ("upsampling"), or convolution, rearranged channels, convolution ("subpixel")."""

    def __init__(
        self, kind: str, num_input_features: int, num_output_features: int, bias: bool, relu: bool
    ) -> None:
        super().__init__()
        self.kind = kind
        c, k = num_input_features, num_output_features
        self.num_output_features = c if kind == "upsampling" else k
        if kind == "deconv":
            self.conv = nn.ConvTranspose2d(c, k, kernel_size=3, stride=2, bias=bias)
        elif kind == "subpixel":
            if k % 4:
                raise ValueError(
                    "upsampling must be one of 'deconv', 'upsampling' where growth_rate times the "
                    f"layers of a block is no multiple of 4, got 'subpixel' with {k}"
                )
            self.conv1 = nn.Conv2d(c, k, kernel_size=3, padding=1, bias=bias)
            self.conv2 = nn.Conv2d(k // 4, k, kernel_size=3, padding=1, bias=bias)
        self.relu = nn.ReLU(inplace=True) if relu else nn.Identity()

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """[N, C, H, W] -> [N, K, *size]; a transposed convolution gives 2 H + 1 and 2 W + 1 pixels,
        of which the last ones are left out."""
        if self.kind == "upsampling":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.kind == "subpixel":
            x = F.pixel_shuffle(self.relu(self.conv1(x)), 2)
            return self.relu(self.conv2(x))
        return self.relu(self.conv(x)[:, :, : size[0], : size[1]])


class FCDenseNetBase(Network):
    """The tree, the options and the forward; subclasses supply the blocks and transitions.

    Children: conv0 (norm0, relu0), denseblock1, transition1, ..., up1, ..., classifier, the blocks
    numbered from the first to the last. The options are those of `models.EfficientFCDenseNet`.
    """

    def __init__(
        self,
        growth_rate: int = 16,
        block_config: Sequence[int] = (4, 5, 7, 10, 12, 15, 12, 10, 7, 5, 4),
        num_init_features: int = 48,
        drop_rate: float = 0.2,
        num_classes: int | None = 11,
        *,
        in_channels: int = 3,
        bottleneck: bool = False,
        bn_size: int = 4,
        compression: float = 1.0,
        pooling: str = "max",
        upsampling: str = "deconv",
        bias: bool = True,
        bias_up: bool = True,
        relu_up: bool = False,
        norm_first: bool = False,
        drop_transitions: bool = True,
        early_transition: bool = False,
        eps: float = 1e-5,
        memory_efficient: bool = False,
    ) -> None:
        growth_rate = check_count("growth_rate", growth_rate)
        block_config = check_block_config(block_config)
        if len(block_config) % 2 == 0 or len(block_config) < 3:
            raise ValueError(
                "block_config must list the blocks of the way down, the one between and those of "
                f"the way up, an odd number of at least 3, got {len(block_config)}"
            )
        channels = check_count("num_init_features", num_init_features)
        drop_rate = check_drop_rate(drop_rate)
        num_classes = check_count("num_classes", 0 if num_classes is None else num_classes, 0)
        in_channels = check_count("in_channels", in_channels)
        compression = check_compression(compression)
        check_choice("pooling", pooling, POOLINGS)
        check_choice("upsampling", upsampling, UPSAMPLINGS)
        super().__init__()
        self.num_classes, self.upsampling = num_classes, upsampling
        self.poolings = len(block_config) // 2

        def transition(channels: int) -> tuple[nn.Module, int]:
            kept = max(int(channels * compression), 1)
            made = self._make_transition(
                channels, kept, drop_rate=drop_rate if drop_transitions else 0.0,
                max_pool=pooling == "max", bias=bias, eps=eps,
            )  # fmt: skip
            return made, kept

        self.conv0 = nn.Conv2d(in_channels, channels, kernel_size=3, padding=1, bias=bias)
        if norm_first:
            self.norm0 = nn.BatchNorm2d(channels, eps=eps)
            self.relu0 = nn.ReLU(inplace=True)
        if early_transition:
            self.transition0, channels = transition(channels)
        skips: list[int] = []
        new = 0
        for i, num_layers in enumerate(block_config, start=1):
            goes_down, ends = i <= self.poolings, i == len(block_config)
            if i > self.poolings + 1:
                up = Upsampling(upsampling, new, new, bias_up, relu_up)
                self.add_module(f"up{i - self.poolings - 1}", up)
                channels = new + skips.pop()
            block = self._make_block(
                num_layers=num_layers, num_input_features=channels, bn_size=bn_size,
                growth_rate=growth_rate, drop_rate=drop_rate, bottleneck=bottleneck, bias=bias,
                eps=eps, with_input=goes_down or ends, memory_efficient=memory_efficient,
            )  # fmt: skip
            self.add_module(f"denseblock{i}", block)
            new = num_layers * growth_rate
            channels += new
            if goes_down:
                skips.append(channels)
                made, channels = transition(channels)
                self.add_module(f"transition{i}", made)
        if early_transition:
            up = Upsampling(upsampling, channels, growth_rate, bias_up, relu_up)
            self.add_module(f"up{self.poolings + 1}", up)
            channels = channels if upsampling == "upsampling" else growth_rate
        self.num_features = channels
        self.classifier: nn.Module = nn.Identity()
        if num_classes:
            self.classifier = nn.Conv2d(channels, num_classes, kernel_size=1, bias=bias)
        halvings = self.poolings + bool(early_transition)
        self.min_input_size: int = 2**halvings
        self._multiple = 1 if upsampling == "deconv" else 2**halvings
        _initialise(self)

    def child(self, name: str) -> Any:
        """The child of that name, or None."""
        return self._modules.get(name)

    def check_images(self, x: Any) -> None:
        """ValueError for images [N, C, H, W] that the network cannot take."""
        if not isinstance(x, Tensor):  # a tracer's stand-in, which has no shape to look at
            return
        if x.dim() != 4:
            raise ValueError(
                f"input must be a batch of images [N, C, H, W], got shape {list(x.shape)}"
            )
        height, width = x.shape[2:]
        if min(height, width) < self.min_input_size:
            raise ValueError(
                f"input must be at least {self.min_input_size} pixels high and wide for this "
                f"network, got {height} x {width}"
            )
        if height % self._multiple or width % self._multiple:
            raise ValueError(
                f"input must be a multiple of {self._multiple} pixels high and wide with "
                f"upsampling={self.upsampling!r}, got {height} x {width}"
            )

    def _first(self, x: Tensor) -> Tensor:
        """The first convolution."""
        return self.conv0(x)

    def _classify(self, x: Tensor) -> Tensor:
        """The logits of features."""
        return self.classifier(x)

    def _call(self, module: nn.Module, *inputs: Any) -> Tensor:
        """One child's output."""
        return module(*inputs)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [N, in_channels, H, W] -> the features that the classifier reads,
        [N, num_features, H, W]. ValueError for images that are too small, or that the upsampling
        cannot come back to."""
        self.check_images(x)
        whole = x.shape[2:]
        x = self._first(x)
        for name in ("norm0", "relu0", "transition0"):
            if name in self._modules:
                x = self._call(self.child(name), x)
        skips = []
        for i in range(1, self.poolings + 1):
            x = self._call(self.child(f"denseblock{i}"), x)
            skips.append(x)
            x = self._call(self.child(f"transition{i}"), x)
        x = self._call(self.child(f"denseblock{self.poolings + 1}"), x)
        for i in range(1, self.poolings + 1):
            skip = skips.pop()
            x = self._call(self.child(f"up{i}"), x, skip.shape[2:])
            x = self._call(self.child(f"denseblock{self.poolings + 1 + i}"), [x, skip])
        last = self.child(f"up{self.poolings + 1}")
        return x if last is None else self._call(last, x, whole)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_channels, H, W] -> logits of every pixel, [N, num_classes, H, W]; without
        classes the features. Any floating dtype; ValueError as in `forward_features`."""
        return self._classify(self.forward_features(x))


def _initialise(model: nn.Module) -> None:
    """He's uniform weights, as in the paper's code; norms at 1 and 0, biases at 0."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
