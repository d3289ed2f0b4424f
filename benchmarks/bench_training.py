"""Training steps side by side: time and peak memory of ours and of what one would use instead.

    python benchmarks/bench_training.py                      DenseNet-121, 224 px, batch 8, CPU
    python benchmarks/bench_training.py --device cuda        three networks, batches of measurements
    python benchmarks/bench_training.py --device cuda --quick    the same in about three minutes

For each case: first the errors against float64 (ours must not exceed 1.2 times eager's
own, or nothing is timed), then all peers in turns within this process, then the peak memory of
each. Conventions: densenet_efficient/bench/steps.py.
Writes benchmarks/results/training-DEVICE.{json,md}.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from densenet_efficient.bench.comparison import compare, comparison_table
from densenet_efficient.bench.steps import DTYPES, PEERS, Case, MeasurementError
from densenet_efficient.bench.tables import write_results
from densenet_efficient.models.networks import NETWORKS, NetworkSpec

CPU_PEERS = ("eager", "checkpoint", "store", "auto", "recompute")
GPU_PEERS = ("eager", "checkpoint", "compile", "compile-budget", "store", "recompute")
BC_100_12 = NetworkSpec("densenet_cifar", depth=100, growth_rate=12, num_classes=10)
BC_190_40 = NetworkSpec("densenet_cifar", depth=190, growth_rate=40, num_classes=10)


def gpu_cases(device: str, quick: bool) -> list[tuple[Case, tuple[str, ...]]]:
    """The work of the project's goals. Compiling DenseNet-264 takes longer than all the rest
    together, compiling with a budget as long again: neither is part of the quick run."""
    light = ("eager", "checkpoint", "store", "recompute")
    graphs = (*light, "store-graph", "recompute-graph")
    one_compile = ("eager", "checkpoint", "compile", "store", "recompute")
    d121, d264 = NetworkSpec("densenet121"), NetworkSpec("densenet264")
    quick_cases = [
        (Case(BC_100_12, 64, 32, "bf16", device), graphs),
        (Case(d264, 256, 224, "bf16", device), light),
        (Case(d121, 512, 224, "bf16", device), one_compile),
    ]
    all_cases = [
        (Case(BC_100_12, 64, 32, "bf16", device), (*graphs, "compile")),
        (Case(BC_190_40, 64, 32, "bf16", device), graphs),
        (Case(d121, 128, 224, "fp32", device), light),
        (Case(d264, 256, 224, "bf16", device), light),
        (Case(d121, 512, 224, "bf16", device), GPU_PEERS),
    ]
    return quick_cases if quick else all_cases


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", choices=NETWORKS, help="one case of your own, with the options:")
    parser.add_argument("--depth", type=int, help="of densenet_cifar")
    parser.add_argument("--growth-rate", type=int, help="of densenet_cifar")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--contiguous", action="store_true", help="instead of channels_last")
    parser.add_argument(
        "--peers", nargs="+", metavar="PEER", help=f"some of {', '.join(PEERS)}, each also -graph"
    )
    parser.add_argument("--rounds", type=int, help="turns of each peer (9; quick: 5)")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--quick", action="store_true", help="fewer turns, fewer compiled peers")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def main() -> int:
    options = parse()
    on_gpu = options.device.startswith("cuda")
    if on_gpu and options.model is None:
        cases: list[tuple[Case, tuple[str, ...]]] = gpu_cases(options.device, options.quick)
    else:
        classes = 10 if options.model == "densenet_cifar" else 1000
        network = NetworkSpec(
            options.model or "densenet121",
            depth=options.depth,
            growth_rate=options.growth_rate,
            num_classes=classes,
        )
        size = options.image_size or network.default_image_size
        layout = not options.contiguous
        cases = [
            (Case(network, options.batch, size, dtype, options.device, layout), CPU_PEERS)
            for dtype in options.dtypes
        ]
    rounds = options.rounds or (5 if options.quick else 9)
    texts, figures = [], []
    for case, peers in cases:
        rows: list[dict[str, Any]] = compare(
            case,
            options.peers or peers,
            rounds=rounds,
            inner=3 if on_gpu else 1,
            memory=not options.no_memory,
        )
        figures.append({"case": case.describe(), "rounds": rounds, "peers": rows})
        texts.append(f"## {case.title}\n\n{comparison_table(rows)}")
        print(f"\n{texts[-1]}", flush=True)
        path = write_results(  # after each case: a run that is stopped has written the others
            options.output,
            f"training-{'cuda' if on_gpu else 'cpu'}",
            "Training steps side by side",
            {"cases": figures},
            "\n\n".join(texts),
            options.device,
        )
    print(f"\nwritten: {path} and .json")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, MeasurementError) as error:
        sys.exit(f"bench_training: {error}")
