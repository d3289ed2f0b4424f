"""FC-DenseNet103 of plain modules, the same with checkpointed layers, and ours, on the CPU.

    python benchmarks/bench_segmentation.py               224 pixels, batch 1, dropout 0.2
    python benchmarks/bench_segmentation.py --model fc_densenet56 --size 96 --batch 2

The paper trains on crops of this size. Outputs and all gradients must agree in float64, without
dropout, before anything is timed. The title has the peak that plan() predicts, the table the
measured one. Writes benchmarks/results/segmentation-cpu.{json,md}.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import other_networks
from other_networks import Peer

import densenet_efficient
from densenet_efficient.bench.steps import MeasurementError
from densenet_efficient.models.networks import DENSE_NETWORKS, NetworkSpec

EXECUTIONS = {
    "plain": "reference",
    "plain, checkpointed layers": "reference-checkpoint",
    "ours": "recompute",
}


def network(model: str, execution: str, drop_rate: float) -> nn.Module:
    """The same weights for every peer."""
    torch.manual_seed(0)
    return NetworkSpec(model, num_classes=11, drop_rate=drop_rate).build(execution)


def main() -> int:
    parser = other_networks.parser(__doc__)
    parser.add_argument("--model", choices=DENSE_NETWORKS, default=DENSE_NETWORKS[-1])
    options = parser.parse_args()
    plain, checkpointed, ours = (
        Peer(
            name,
            functools.partial(network, options.model, execution, 0.2),
            exact=functools.partial(network, options.model, execution, 0.0),
        )
        for name, execution in EXECUTIONS.items()
    )
    batch, size = options.batch or 1, options.size or 224
    planned = densenet_efficient.plan(ours.build(), (batch, 3, size, size))
    return other_networks.run(
        "segmentation-cpu",
        f"{options.model}, {size} px, batch {batch}, fp32, dropout 0.2; "
        f"planned peak of ours {planned.peak_bytes / 1e6:,.0f} MB",
        [plain, checkpointed],
        [ours],
        (batch, 3, size, size),
        (2, 3, 40, 33),
        options,
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MeasurementError as error:
        sys.exit(f"bench_segmentation: {error}")
