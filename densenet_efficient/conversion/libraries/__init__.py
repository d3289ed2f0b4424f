"""The DenseNets of other libraries: one file for each family.

Classes whose module's name is known are recognised by it, without an import of their library.
Classes that people copy into their own code are taught in one line:

    from densenet_efficient.conversion.libraries import d2l
    densenet_efficient.register_adapter(DenseBlock, d2l.dense_block)
"""

from __future__ import annotations

from ..adapters import Adapter, LayerAdapter, register_adapter
from . import cifar, d2l, esrgan, mmpretrain, monai, pytorchcv, speech, timm, tiramisu, torchvision

NAMED: dict[str, Adapter | LayerAdapter] = {
    f"{module.__name__.rpartition('.')[2]}.{name}": adapter
    for module in (
        torchvision,
        timm,
        monai,
        mmpretrain,
        pytorchcv,
        speech,
        esrgan,
        cifar,
        tiramisu,
        d2l,
    )
    for name, adapter in vars(module).items()
    if isinstance(adapter, (Adapter, LayerAdapter)) and not name.startswith("_")
}
"""All adapters that can be registered for your own classes, by "file.name"."""


def register() -> None:
    """Registers the classes that are recognised by name."""
    for module in (torchvision, timm, monai, mmpretrain, pytorchcv, speech, esrgan):
        for name, adapter in module.ADAPTERS.items():
            register_adapter(name, adapter)
