"""Every structure that `convert` knows, with a small network of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from densenet_efficient import register_adapter
from densenet_efficient.conversion.libraries import cifar, d2l, speech, tiramisu, torchvision
from tests.support import zoo, zoo_plain, zoo_speech
from tests.support.libraries import load
from tests.support.zoo import Net, growing

SMALL: dict[str, Any] = {"growth_rate": 4, "block_config": (2, 2), "bn_size": 2}


@dataclass(frozen=True)
class Case:
    """structure: what is converted. library: where the classes come from, "" if written after them
    in `zoo`. make: a network, float32. shape: of its input. blocks, transitions: how many of each
    are converted."""

    structure: str
    library: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (2, 3, 33, 40)
    blocks: int = 2
    transitions: int = 1

    @property
    def name(self) -> str:
        """For the test's identifier."""
        return f"{self.library or 'zoo'}: {self.structure}"


def _timm(**options: Any) -> nn.Module:
    home = load("timm").models.densenet
    return home.DenseNet(**{**SMALL, "num_classes": 5, **options})


def _timm_features_only() -> nn.Module:
    timm = load("timm")
    small = {**SMALL, "block_config": (2, 2, 2, 2)}
    return timm.create_model("densenet121", features_only=True, pretrained=False, **small)


def _monai(dims: int, dropout_prob: float = 0.0, **options: Any) -> nn.Module:
    home = load("monai")
    return home.DenseNet(dims, 2, 3, 8, dropout_prob=dropout_prob, **{**SMALL, **options})


def _torchvision(**options: Any) -> nn.Module:
    return load("torchvision").DenseNet(num_init_features=8, num_classes=5, **SMALL, **options)


def _encoder() -> nn.Module:
    home = load("segmentation_models_pytorch")
    small = {**SMALL, "block_config": (2, 2, 2, 2)}
    return home.DenseNetEncoder(out_channels=[3], depth=5, num_init_features=8, **small)


def _mmpretrain(**options: Any) -> nn.Module:
    arch = {"growth_rate": 4, "depths": [2, 2], "init_channels": 8}
    net = load("mmpretrain").DenseNet(arch, out_indices=[0, 1], **options)
    net.train()  # its own, which puts frozen stages in eval mode and returns nothing
    return net


def _pytorchcv(dropout_rate: float = 0.0) -> nn.Module:
    net = load("pytorchcv").DenseNet([[12, 16], [12, 16]], 8, dropout_rate, num_classes=4)
    net.features.final_pool = nn.AdaptiveAvgPool2d(1)
    return net


def _pytorchcv_cifar(bottleneck: bool) -> nn.Module:
    home = load("pytorchcv cifar")
    net = home.CIFARDenseNet([[12, 16], [12, 16]], 8, bottleneck, num_classes=4)
    net.features.final_pool = nn.AdaptiveAvgPool2d(1)
    return net


def _zoo(block: Callable[[int, int], nn.Module], transition: Any, **options: Any) -> Any:
    with_input = options.pop("with_input", True)
    return lambda: Net([growing(block, with_input)] * 2, transition, **options)


V, M = zoo.VeitBlock, zoo_plain.BaldassarreBlock
IMAGE = (2, 3, 9, 10)
CASES = [
    Case("1 torchvision", "torchvision", _torchvision),
    Case("1 with checkpoints", "torchvision", lambda: _torchvision(memory_efficient=True)),
    Case("1 encoder", "segmentation_models_pytorch", _encoder, blocks=4, transitions=3),
    Case("2 one dimension", "monai", lambda: _monai(1), (2, 2, 65)),
    Case("2 two dimensions", "monai", lambda: _monai(2), (2, 2, 33, 40)),
    Case("2 three dimensions", "monai", lambda: _monai(3), (2, 2, 17, 24, 20)),
    Case(
        "3 torchxrayvision",
        "torchxrayvision",
        lambda: load("torchxrayvision").DenseNet(**SMALL, num_init_features=8),
        (2, 1, 224, 224),
    ),
    Case("4 timm", "timm", _timm),
    Case("4 timm, deep stem", "timm", lambda: _timm(stem_type="deep")),
    Case(
        "4 timm, anti-aliased", "timm",
        lambda: _timm(aa_layer=load("timm").layers.BlurPool2d, aa_stem_only=False), transitions=0,
    ),
    Case("4 timm, with checkpoints", "timm", lambda: _timm(memory_efficient=True)),
    Case("4 timm, features_only", "timm", _timm_features_only, blocks=4, transitions=3),
    Case("7 mmpretrain", "mmpretrain", _mmpretrain),
    Case("7 mmpretrain, frozen", "mmpretrain", lambda: _mmpretrain(frozen_stages=1)),
    Case("10 pytorchcv", "pytorchcv", _pytorchcv),
    Case("10 bottleneck units", "pytorchcv", lambda: _pytorchcv_cifar(True), (2, 3, 32, 36)),
    Case("10 simple units", "pytorchcv", lambda: _pytorchcv_cifar(False), (2, 3, 32, 36)),
    Case("3 Sequential layers", "", _zoo(zoo.SequentialBlock3d, zoo.Transition3d,
         convolution=nn.Conv3d), (2, 3, 6, 5, 7)),
    Case("5 other names", "", _zoo(zoo.EluBlock, zoo.EluTransition), IMAGE),
    Case("6 several arguments", "", _zoo(zoo.VarargsBlock, zoo.EluTransition), IMAGE),
    Case("8 shared ReLU", "", _zoo(V, zoo.VeitTransition), IMAGE),
    Case("8 plain", "", _zoo(lambda c, k: V(c, k, False), zoo.VeitTransition), IMAGE),
    Case("8 no ReLU module", "", _zoo(zoo.bare_block(zoo.BareLayer), zoo.BareTransition), IMAGE),
    Case("9 bfortuner", "", _zoo(zoo_plain.TiramisuBlock, zoo.VeitTransition), IMAGE),
    Case("9 bfortuner, upsample", "", _zoo(lambda c, k: zoo_plain.TiramisuBlock(c, k, True),
         zoo.VeitTransition, with_input=False), IMAGE),
    Case("9 baldassarreFe", "", _zoo(M, zoo.VeitTransition, with_input=False), IMAGE),
    Case("9 baldassarreFe, bottleneck", "", _zoo(lambda c, k: M(c, k, True, True),
         zoo.VeitTransition), IMAGE),
    Case("11 d2l", "", zoo_plain.book_net, IMAGE),
    Case("12 UvA, newest first", "", _zoo(zoo_plain.UvaBlock, zoo_plain.UvaTransition), IMAGE),
    Case("12 kuangliu, newest first", "", _zoo(zoo.bare_block(zoo.NewestFirstLayer),
         zoo.BareTransition), IMAGE),
]  # fmt: skip
SOUND = {"convolution": nn.Conv1d}
CASES += [
    Case("15 CAM++", "", _zoo(zoo_speech.CamBlock, zoo_speech.Transit, **SOUND), (2, 3, 23),
         transitions=0),
    Case("15 with checkpoints", "", _zoo(lambda c, k: zoo_speech.CamBlock(c, k, True),
         zoo_speech.Transit, **SOUND), (2, 3, 23), transitions=0),
    Case("15 D-TDNN", "", _zoo(zoo_speech.TdnnBlock, zoo_speech.Transit, **SOUND), (2, 3, 23),
         transitions=0),
]  # fmt: skip
DROPOUT_CASES = [
    Case("1 torchvision", "torchvision", lambda: _torchvision(drop_rate=0.3)),
    Case("2 one dimension", "monai", lambda: _monai(1, 0.3), (2, 2, 65)),
    Case("2 two dimensions", "monai", lambda: _monai(2, 0.3), (2, 2, 33, 40)),
    Case("2 three dimensions", "monai", lambda: _monai(3, 0.3), (2, 2, 17, 24, 20)),
    Case("4 timm", "timm", lambda: _timm(proj_drop_rate=0.3)),
    Case("7 mmpretrain", "mmpretrain", lambda: _mmpretrain(drop_rate=0.3)),
    Case("10 pytorchcv", "pytorchcv", lambda: _pytorchcv(0.3)),
    Case("6 several arguments", "",
         _zoo(lambda c, k: zoo.VarargsBlock(c, k, 0.3), zoo.EluTransition), IMAGE),
    Case("8 in two places", "", _zoo(lambda c, k: V(c, k, True, 0.3), zoo.VeitTransition), IMAGE),
    Case("8 plain", "", _zoo(lambda c, k: V(c, k, False, 0.3), zoo.VeitTransition), IMAGE),
    Case("9 bfortuner", "",
         _zoo(lambda c, k: zoo_plain.TiramisuBlock(c, k, p=0.3), zoo.VeitTransition), IMAGE),
    Case("9 baldassarreFe", "", _zoo(lambda c, k: M(c, k, True, p=0.3), zoo.VeitTransition), IMAGE),
]  # fmt: skip


def register_zoo() -> None:
    """What a user would write for classes of one's own."""
    register_adapter(zoo.VarargsBlock, torchvision.dense_block)
    register_adapter(zoo.SequentialBlock3d, torchvision.dense_block)
    register_adapter(zoo.Transition3d, torchvision.transition)
    register_adapter(zoo.EluBlock, torchvision.libauc_dense_block)
    register_adapter(zoo.EluTransition, torchvision.libauc_transition)
    register_adapter(zoo.VeitBlock, cifar.andreasveit_dense_block)
    register_adapter(zoo.VeitTransition, cifar.andreasveit_transition)
    register_adapter(zoo.BareLayer, cifar.bamos_layer)
    register_adapter(zoo.NewestFirstLayer, cifar.kuangliu_layer)
    register_adapter(zoo.BareTransition, cifar.bamos_transition)
    register_adapter(zoo_plain.UvaBlock, cifar.uva_dense_block)
    register_adapter(zoo_plain.UvaTransition, cifar.uva_transition)
    register_adapter(zoo_plain.TiramisuBlock, tiramisu.bfortuner_dense_block)
    register_adapter(zoo_plain.BaldassarreBlock, tiramisu.baldassarre_dense_block)
    register_adapter(zoo_plain.BookBlock, d2l.dense_block)
    register_adapter(zoo_speech.CamBlock, speech.cam_dense_tdnn_block)
    register_adapter(zoo_speech.TdnnBlock, speech.dense_tdnn_block)


register_zoo()
