"""The DenseNets of other libraries: one file for each family.

Classes whose module's name is known are recognised by it, without an import of their library.
Classes that people copy into their own code are taught in one line:

    from densenet_efficient.conversion.libraries import d2l
    densenet_efficient.register_adapter(DenseBlock, d2l.dense_block)
"""

from __future__ import annotations

from ..adapters import Adapter, LayerAdapter, refusal, register_adapter
from . import cifar, d2l, mmpretrain, monai, pytorchcv, timm, tiramisu, torchvision

_CAMPPLUS = refusal(
    "CAM++ gates a convolution of its own between the bottleneck and the new channels, which no "
    "operator covers"
)
_CAMPPLUS_HOMES = (
    "speakerlab.models.campplus.layers",
    "funasr.models.campplus.components",
    "wespeaker.models.campplus",
    "modelscope.models.audio.sv.DTDNN_layers",
)

NAMED: dict[str, Adapter | LayerAdapter] = {
    f"{module.__name__.rpartition('.')[2]}.{name}": adapter
    for module in (torchvision, timm, monai, mmpretrain, pytorchcv, cifar, tiramisu, d2l)
    for name, adapter in vars(module).items()
    if isinstance(adapter, (Adapter, LayerAdapter)) and not name.startswith("_")
}
"""All adapters that can be registered for one's own classes, by "file.name"."""


def register() -> None:
    """Registers the classes that are recognised by name."""
    for module in (torchvision, timm, monai, mmpretrain, pytorchcv):
        for name, adapter in module.ADAPTERS.items():
            register_adapter(name, adapter)
    for home in _CAMPPLUS_HOMES:
        for name in ("CAMDenseTDNNBlock", "DenseTDNNBlock"):
            register_adapter(f"{home}.{name}", _CAMPPLUS)
