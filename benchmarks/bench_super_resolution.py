"""ESRGAN's network (RRDBNet, 23 blocks) of spandrel next to the same converted, on the CPU.

    python benchmarks/bench_super_resolution.py           64 pixels along every side, batch 1
    python benchmarks/bench_super_resolution.py --blocks 3 --rounds 9

Outputs and all gradients must agree in float64 before anything is timed. Needs `pip install
spandrel`. Writes benchmarks/results/super-resolution-cpu.{json,md}.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import other_networks
from other_networks import Peer

import densenet_efficient
from densenet_efficient.bench.steps import MeasurementError
from densenet_efficient.torchvision_compat import import_torchvision


def main() -> int:
    parser = other_networks.parser(__doc__)
    parser.add_argument("--blocks", type=int, default=23)
    options = parser.parse_args()
    import_torchvision()  # which spandrel imports
    from spandrel.architectures.ESRGAN.__arch.RRDB import RRDBNet

    def original() -> nn.Module:
        torch.manual_seed(0)
        return RRDBNet(num_blocks=options.blocks)

    batch, size = options.batch or 1, options.size or 64
    return other_networks.run(
        "super-resolution-cpu",
        f"RRDBNet of spandrel, {options.blocks} blocks, {size} px, batch {batch}, fp32",
        [Peer("spandrel", original)],
        [Peer("ours", lambda: densenet_efficient.convert(original()))],
        (batch, 3, size, size),
        (1, 3, 10, 12),
        options,
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MeasurementError as error:
        sys.exit(f"bench_super_resolution: {error}")
