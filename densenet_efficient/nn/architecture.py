"""What a DenseNet is, apart from how it is executed: the checked options, the tree of modules
(torchvision's names and order), the initialisation, the head, and the networks that have a name.

`reference.DenseNet` and `models.EfficientDenseNet` are this class with different blocks. Huang et
al., "Densely Connected Convolutional Networks", arXiv 1608.06993: section 3 and table 1.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .options import check_block_config, check_compression, check_count, check_drop_rate

# name: growth_rate, block_config, num_init_features (table 1; 161 and 264_k48 are the wide ones)
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "densenet121": {
        "growth_rate": 32, "block_config": (6, 12, 24, 16), "num_init_features": 64,
    },
    "densenet161": {
        "growth_rate": 48, "block_config": (6, 12, 36, 24), "num_init_features": 96,
    },
    "densenet169": {
        "growth_rate": 32, "block_config": (6, 12, 32, 32), "num_init_features": 64,
    },
    "densenet201": {
        "growth_rate": 32, "block_config": (6, 12, 48, 32), "num_init_features": 64,
    },
    "densenet264": {
        "growth_rate": 32, "block_config": (6, 12, 64, 48), "num_init_features": 64,
    },
    "densenet264_k48": {
        "growth_rate": 48, "block_config": (6, 12, 64, 48), "num_init_features": 96,
    },
}  # fmt: skip


def cifar_block_config(depth: int, bottleneck: bool = True) -> tuple[int, int, int]:
    """The three blocks of the CIFAR network of a given depth: (depth - 4) / 6 layers each, or
    (depth - 4) / 3 without bottlenecks (section 3). ValueError where that is not a whole number."""
    depth = check_count("depth", depth)
    convolutions = 6 if bottleneck else 3
    layers, remainder = divmod(depth - 4, convolutions)
    if remainder or layers < 1:
        kind = "with" if bottleneck else "without"
        lower = max(layers, 1) * convolutions + 4
        raise ValueError(
            f"depth must be {convolutions} * N + 4 {kind} bottleneck layers "
            f"(nearest: {lower} or {lower + convolutions}), got {depth}"
        )
    return layers, layers, layers


class DenseNetBase(nn.Module):
    """The tree, the head and the options; subclasses supply the blocks and transitions.

    Children: `features` (conv0, norm0, relu0, pool0, denseblock1, transition1, ..., norm5) and
    `classifier`, as in torchvision, so state dicts are interchangeable.
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int = 4,
        drop_rate: float = 0.0,
        num_classes: int | None = 1000,
        memory_efficient: bool = False,
        *,
        small_inputs: bool = False,
        compression: float = 0.5,
        bottleneck: bool = True,
        in_channels: int = 3,
        global_pool: bool = True,
        init_mode: Literal["fan_in", "fan_out"] = "fan_in",
    ) -> None:
        growth_rate = check_count("growth_rate", growth_rate)
        block_config = check_block_config(block_config)
        num_init_features = check_count("num_init_features", num_init_features)
        bn_size = check_count("bn_size", bn_size)
        drop_rate = check_drop_rate(drop_rate)
        num_classes = check_count("num_classes", 0 if num_classes is None else num_classes, 0)
        compression = check_compression(compression)
        in_channels = check_count("in_channels", in_channels)
        if init_mode not in ("fan_in", "fan_out"):
            raise ValueError(f"init_mode must be 'fan_in' or 'fan_out', got {init_mode!r}")
        super().__init__()
        self.global_pool = bool(global_pool)
        self.num_classes = num_classes

        children: OrderedDict[str, nn.Module] = OrderedDict()
        if small_inputs:
            children["conv0"] = nn.Conv2d(in_channels, num_init_features, 3, padding=1, bias=False)
        else:
            children["conv0"] = nn.Conv2d(
                in_channels, num_init_features, 7, stride=2, padding=3, bias=False
            )
            children["norm0"] = nn.BatchNorm2d(num_init_features)
            children["relu0"] = nn.ReLU(inplace=True)
            children["pool0"] = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        channels = num_init_features
        for i, num_layers in enumerate(block_config, start=1):
            children[f"denseblock{i}"] = self._make_block(
                num_layers=num_layers,
                num_input_features=channels,
                bn_size=bn_size,
                growth_rate=growth_rate,
                drop_rate=drop_rate,
                memory_efficient=memory_efficient,
                bottleneck=bottleneck,
            )
            channels += num_layers * growth_rate
            if i < len(block_config):
                kept = max(int(channels * compression), 1)
                children[f"transition{i}"] = self._make_transition(channels, kept)
                channels = kept
        children["norm5"] = nn.BatchNorm2d(channels)
        self.features = self._make_features(children)
        self.num_features = channels
        self.classifier: nn.Module = self._make_classifier(num_classes)
        # The smallest side that every pooling leaves at least one pixel of.
        self.min_input_size = 2 ** (len(block_config) - 1) if small_inputs else (
            2 ** (len(block_config) + 1) - 3
        )  # fmt: skip
        initialise(self, init_mode)

    def _make_block(self, **options: Any) -> nn.Module:
        raise NotImplementedError

    def _make_transition(self, num_input_features: int, num_output_features: int) -> nn.Module:
        raise NotImplementedError

    def _make_features(self, children: OrderedDict[str, nn.Module]) -> nn.Module:
        return nn.Sequential(children)

    def _make_classifier(self, num_classes: int) -> nn.Module:
        return nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def reset_classifier(self, num_classes: int | None) -> None:
        """Replaces the classifier by a fresh one (None or 0: no classifier, features come out)."""
        num_classes = check_count("num_classes", 0 if num_classes is None else num_classes, 0)
        like = next(self.parameters())
        self.num_classes = num_classes
        self.classifier = self._make_classifier(num_classes).to(like.device, like.dtype)
        self.classifier.train(self.training)
        if isinstance(self.classifier, nn.Linear):
            nn.init.zeros_(self.classifier.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> the last feature map, after norm5 and its ReLU,
        [N, num_features, H', W']. ValueError where H or W is below `min_input_size`."""
        if not isinstance(x, Tensor):  # a tracer's stand-in, which has no shape to look at
            return F.relu(self.features(x))
        if x.dim() != 4:
            raise ValueError(
                f"input must be a batch of images [N, C, H, W], got shape {list(x.shape)}"
            )
        if min(x.shape[2], x.shape[3]) < self.min_input_size:
            raise ValueError(
                f"input must be at least {self.min_input_size} pixels high and wide for this "
                f"network, got {x.shape[2]} x {x.shape[3]}"
            )
        return F.relu(self.features(x))

    def forward_head(self, x: Tensor) -> Tensor:
        """The feature map -> logits [N, num_classes], or pooled features [N, num_features] without
        a classifier. Without global pooling: the same at every place, [N, C, H', W']."""
        if not self.global_pool:
            if isinstance(self.classifier, nn.Identity):
                return x
            return self.classifier(x.movedim(1, -1)).movedim(-1, 1)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_channels, H, W] -> what `forward_head` gives. Any floating dtype."""
        return self.forward_head(self.forward_features(x))


def initialise(model: nn.Module, mode: Literal["fan_in", "fan_out"] = "fan_in") -> None:
    """Kaiming normal convolutions, norms at 1 and 0, linear biases at 0, in the order of
    `model.modules()`: with mode "fan_in" and the same seed exactly torchvision's weights; "fan_out"
    is what the paper's CIFAR code draws."""
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(module.weight, mode=mode)
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
