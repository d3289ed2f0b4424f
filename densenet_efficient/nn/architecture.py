"""What a DenseNet is, apart from how it is executed: the checked options, the tree of modules
(torchvision's names and order), the initialisation, the head, and the networks that have a name.

`reference.DenseNet` and `models.EfficientDenseNet` are this class with different blocks. Huang et
al., "Densely Connected Convolutional Networks", arXiv 1608.06993: section 3 and table 1.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
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


STEM = ("conv0", "norm0", "relu0", "pool0")
"""The children of `features` in front of the first block, those that there are."""


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


@dataclass(frozen=True)
class Strides:
    """initial: of the stem. poolings: how many of the transitions pool, the first ones."""

    initial: int
    poolings: int


def check_strides(
    output_stride: Any, initial_output_stride: Any, blocks: int, small_inputs: bool
) -> Strides:
    """What the two options say (None: 4, or 1 with small inputs, halved by every transition).
    ValueError where no number of pooling transitions reaches the output stride."""
    possible = (1,) if small_inputs else (2, 4)
    initial = possible[-1] if initial_output_stride is None else initial_output_stride
    if isinstance(initial, bool) or initial not in possible:
        kind = " with small_inputs" if small_inputs else ""
        raise ValueError(
            f"initial_output_stride must be {' or '.join(map(str, possible))}{kind}, got "
            f"{initial!r}"
        )
    reachable = [initial * 2**poolings for poolings in range(blocks)]
    if output_stride is None:
        return Strides(initial, blocks - 1)
    if isinstance(output_stride, bool) or output_stride not in reachable:
        raise ValueError(
            f"output_stride must be one of {', '.join(map(str, reachable))} for {blocks} blocks "
            f"after a stem of stride {initial}, got {output_stride!r}"
        )
    return Strides(initial, reachable.index(output_stride))


def plain_outputs(features: nn.Module, x: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
    """Runs a feature extractor's children in order and returns the outputs of those in `wanted`,
    of the last of the stem as "stem", and the last child's."""
    outputs: dict[str, Tensor] = {}
    children = list(features.named_children())
    last_of_stem = [name for name, _ in children if name in STEM][-1:]
    for name, child in children:
        x = child(x)
        keys = [name, *["stem"] * (name in last_of_stem)]
        outputs.update((key, x) for key in keys if key in wanted)
    outputs[children[-1][0]] = x
    return outputs


class Network(nn.Module):
    """A network of dense blocks and transitions, which a subclass makes of its own kinds."""

    def _make_block(self, **options: Any) -> nn.Module:
        """A dense block."""
        raise NotImplementedError(f"{type(self).__name__} must define _make_block")

    def _make_transition(
        self, num_input_features: int, num_output_features: int, **options: Any
    ) -> nn.Module:
        """A transition."""
        raise NotImplementedError(f"{type(self).__name__} must define _make_transition")


class DenseNetBase(Network):
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
        spatial_squeeze: bool = True,
        features_only: bool = False,
        output_stride: int | None = None,
        initial_output_stride: int | None = None,
        drop_everywhere: bool = False,
        bias: bool = False,
        eps: float = 1e-5,
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
        strides = check_strides(
            output_stride, initial_output_stride, len(block_config), small_inputs
        )
        super().__init__()
        self.global_pool = bool(global_pool)
        self.spatial_squeeze = bool(spatial_squeeze)
        self.features_only = bool(features_only)
        self.num_classes = num_classes = 0 if features_only else num_classes
        every = drop_rate if drop_everywhere else 0.0

        children: OrderedDict[str, nn.Module] = OrderedDict()
        if small_inputs:
            children["conv0"] = nn.Conv2d(in_channels, num_init_features, 3, padding=1, bias=bias)
        else:
            children["conv0"] = nn.Conv2d(
                in_channels, num_init_features, 7, stride=2, padding=3, bias=bias
            )
            children["norm0"] = nn.BatchNorm2d(num_init_features, eps=eps)
            children["relu0"] = nn.ReLU(inplace=True)
            if strides.initial == 4:
                children["pool0"] = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        channels = num_init_features
        dilation = 1
        for i, num_layers in enumerate(block_config, start=1):
            children[f"denseblock{i}"] = self._make_block(
                num_layers=num_layers,
                num_input_features=channels,
                bn_size=bn_size,
                growth_rate=growth_rate,
                drop_rate=drop_rate,
                memory_efficient=memory_efficient,
                bottleneck=bottleneck,
                bottleneck_drop_rate=every,
                dilation=dilation,
                bias=bias,
                eps=eps,
            )
            channels += num_layers * growth_rate
            if i < len(block_config):
                kept = max(int(channels * compression), 1)
                pools = i <= strides.poolings
                dilation *= 1 if pools else 2
                children[f"transition{i}"] = self._make_transition(
                    channels, kept, drop_rate=every, pool=pools, bias=bias, eps=eps
                )
                channels = kept
        children["norm5"] = nn.BatchNorm2d(channels, eps=eps)
        self.features = self._make_features(children)
        self.num_features = channels
        self.classifier: nn.Module = self._make_classifier(num_classes)
        # The smallest side that every pooling leaves at least one pixel of.
        self.min_input_size: int = (2**strides.poolings - 1) * strides.initial + 1
        self.output_stride: int = strides.initial * 2**strides.poolings
        initialise(self, init_mode)

    def _make_features(self, children: OrderedDict[str, nn.Module]) -> nn.Module:
        return nn.Sequential(children)

    def _make_classifier(self, num_classes: int) -> nn.Module:
        return nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    @property
    def feature_names(self) -> list[str]:
        """End points that `features_only` returns: the stem's before its pooling, every block's
        that a pooling follows, and "features"."""
        names = ["relu0"] if "pool0" in self.features._modules else []
        blocks = sum(name.startswith("denseblock") for name in self.features._modules)
        pooling = [i for i in range(1, blocks) if self._pools(i)]
        return [*names, *(f"denseblock{i}" for i in pooling), "features"]

    def _pools(self, i: int) -> bool:
        return not isinstance(self.features.get_submodule(f"transition{i}.pool"), nn.Identity)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """For each of `feature_names`: name, num_chs and reduction, as timm calls them."""
        entries, stride = [], self.output_stride
        for name in reversed(self.feature_names):
            before = {"relu0": "norm0", "features": "norm5"}
            default = f"transition{name.removeprefix('denseblock')}.norm"
            norm: Any = self.features.get_submodule(before.get(name, default))
            entries.append({"name": name, "num_chs": norm.num_features, "reduction": stride})
            stride //= 2
        return entries[::-1]

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
        self._check_images(x)
        return F.relu(self.features(x))

    def _check_images(self, x: Any) -> None:
        if not isinstance(x, Tensor):  # a tracer's stand-in, which has no shape to look at
            return
        if x.dim() != 4:
            raise ValueError(
                f"input must be a batch of images [N, C, H, W], got shape {list(x.shape)}"
            )
        if min(x.shape[2], x.shape[3]) < self.min_input_size:
            raise ValueError(
                f"input must be at least {self.min_input_size} pixels high and wide for this "
                f"network, got {x.shape[2]} x {x.shape[3]}"
            )

    def forward_end_points(
        self, x: Tensor, names: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """The outputs along the way, by name and in order: "stem", "denseblock1", "transition1",
        ..., "features" (after norm5 and its ReLU), all [N, C, H', W'], "pooled" [N, num_features],
        and with a classifier "logits" and "predictions" (their softmax).

        Args:
            x: images, as in `forward`.
            names: None: all. Of the stem's own outputs "relu0", before its pooling, can be asked
                for as well; the stem then runs in PyTorch's operators.

        Raises:
            ValueError: an unknown name; images as in `forward_features`.
        """
        children = [name for name in self.features._modules if name not in STEM]
        known = ["relu0", "stem", *children[:-1], "features", "pooled"]
        known += ["logits", "predictions"] * bool(self.num_classes)
        if "norm0" not in self.features._modules:
            known.remove("relu0")
        for name in () if names is None else names:
            if name not in known:
                raise ValueError(f"names: expected some of {', '.join(known)}, got {name!r}")
        wanted = set(known[known.index("stem") :] if names is None else names)
        self._check_images(x)
        run = getattr(self.features, "named_outputs", partial(plain_outputs, self.features))
        outputs = run(x, wanted)
        maps = outputs["features"] = F.relu(outputs.pop("norm5"))
        if wanted & {"pooled", "logits", "predictions"}:
            outputs["pooled"] = torch.flatten(F.adaptive_avg_pool2d(maps, (1, 1)), 1)
        if wanted & {"logits", "predictions"}:
            outputs["logits"] = self.forward_head(maps)
            outputs["predictions"] = outputs["logits"].softmax(1)
        return {name: y for name, y in outputs.items() if name in wanted}

    def forward_head(self, x: Tensor) -> Tensor:
        """The feature map -> logits [N, num_classes], or pooled features [N, num_features] without
        a classifier. Without global pooling: the same at every place, [N, C, H', W']; with it but
        without `spatial_squeeze` [N, C, 1, 1]."""
        if not self.global_pool:
            if isinstance(self.classifier, nn.Identity):
                return x
            return self.classifier(x.movedim(1, -1)).movedim(-1, 1)
        y = self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))
        return y if self.spatial_squeeze else y[:, :, None, None]

    def forward(self, x: Tensor) -> Any:
        """Images [N, in_channels, H, W] -> what `forward_head` gives; with `features_only` the list
        of the maps in front of each change of resolution, and the last. Any floating dtype."""
        if self.features_only:
            return list(self.forward_end_points(x, self.feature_names).values())
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
