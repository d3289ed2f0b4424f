"""What a training step keeps for its backward pass, of the libraries' networks and of the same ones
converted, as a table:

    python -m tests.support.kept_memory
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from densenet_efficient import convert
from densenet_efficient.report.tables import table
from tests.support.conversion_comparison import outputs
from tests.support.libraries import load

BLOCKS = (6, 12, 24, 16)


def _address(tensor: Tensor) -> int:
    """Where the tensor's memory begins. Not data_ptr(), which ends the sharing of copy-on-write
    memory."""
    return torch._C._data_address(tensor) - tensor.storage_offset() * tensor.itemsize


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """The memory of all tensors that a forward pass saves, without parameters and buffers."""
    own = {_address(t) for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = _address(tensor)
        if address not in own:
            kept[address] = tensor  # alive, so that its address is not given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = outputs(model, x)
    assert held
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _encoder() -> nn.Module:
    sizes: dict[str, Any] = {"num_init_features": 64, "growth_rate": 32, "block_config": BLOCKS}
    return load("segmentation_models_pytorch").DenseNetEncoder(out_channels=[3], **sizes)


def _timm(name: str, **options: Any) -> nn.Module:
    return load("timm").create_model(name, pretrained=False, **options)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "torchvision densenet121": (lambda: load("torchvision").densenet121(), (4, 3, 128, 128)),
    "timm densenet121": (lambda: _timm("densenet121"), (4, 3, 128, 128)),
    "timm, features_only": (lambda: _timm("densenet121", features_only=True), (4, 3, 128, 128)),
    "timm densenetblur121d": (lambda: _timm("densenetblur121d"), (4, 3, 128, 128)),
    "MONAI DenseNet121, 1-D": (lambda: load("monai").DenseNet121(1, 1, 2), (8, 1, 2048)),
    "MONAI DenseNet121, 2-D": (lambda: load("monai").DenseNet121(2, 1, 2), (4, 1, 128, 128)),
    "MONAI DenseNet121, 3-D": (lambda: load("monai").DenseNet121(3, 1, 2), (2, 1, 48, 48, 48)),
    "SMP densenet121 encoder": (_encoder, (4, 3, 128, 128)),
    "mmpretrain DenseNet 121": (lambda: load("mmpretrain").DenseNet("121"), (4, 3, 128, 128)),
    "pytorchcv densenet121": (lambda: load("pytorchcv").densenet121(), (4, 3, 224, 224)),
}


def main() -> None:
    """Prints the table."""
    rows = []
    for name, (make, shape) in NETWORKS.items():
        torch.manual_seed(0)
        model, x = make(), torch.randn(shape)
        plain = kept_bytes(model, x)
        ours = kept_bytes(convert(model, memory="recompute"), x)
        size = " x ".join(str(n) for n in shape)
        row = (name, size, f"{plain / 1e6:.1f}", f"{ours / 1e6:.1f}", f"{ours / plain:.3f}")
        rows.append(row)
    print(
        table(["network", "input", "kept, MB", "converted, MB", "ratio"], rows, left=("network",))
    )


if __name__ == "__main__":
    main()
