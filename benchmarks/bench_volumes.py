"""Three-dimensional images: MONAI's DenseNet-121 next to the same network converted, on the CPU.

    python benchmarks/bench_volumes.py                 96 voxels along every side, batch 2
    python benchmarks/bench_volumes.py --size 64 --rounds 3

The original runs in contiguous and in channels-last memory; ratios are to its better one. Outputs
and all gradients must agree in float64 before anything is timed. Needs `pip install monai`.
Writes benchmarks/results/volumes-cpu.{json,md}.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import other_networks
from monai.networks.nets import DenseNet121
from other_networks import Peer

import densenet_efficient
from densenet_efficient.bench.steps import MeasurementError


def original() -> nn.Module:
    torch.manual_seed(0)
    return DenseNet121(spatial_dims=3, in_channels=1, out_channels=2)


def channels_last(value: Any) -> Any:
    return value.to(memory_format=torch.channels_last_3d)


def main() -> int:
    options = other_networks.parser(__doc__).parse_args()
    batch, size = options.batch or 2, options.size or 96
    return other_networks.run(
        "volumes-cpu",
        f"MONAI's DenseNet-121 in three dimensions, {size} voxels, batch {batch}, fp32",
        [Peer("monai", original), Peer("monai, channels_last_3d", original, channels_last)],
        [
            Peer(f"ours, {mode}", lambda mode=mode: densenet_efficient.convert(original(), mode))
            for mode in ("store", "recompute")
        ],
        (batch, 1, size, size, size),
        (2, 1, 64, 72, 64),
        options,
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MeasurementError as error:
        sys.exit(f"bench_volumes: {error}")
