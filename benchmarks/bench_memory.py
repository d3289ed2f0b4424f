"""Memory of a training step: against torchvision, against the plan, against depth and batch.

    python benchmarks/bench_memory.py                    all three parts, CPU, some minutes
    python benchmarks/bench_memory.py --part table       DenseNet-121 only
    python benchmarks/bench_memory.py --device cuda --quick

table  DenseNet-121, 224 px: peak and kept bytes of each peer, and what plan() said.
depth  DenseNet-BC, k = 12, 32 px, in the manner of Pleiss et al. (arXiv 1707.06990, figure 4):
       activation memory per image is the slope of the peak between two batches, which is free of
       what does not grow with the batch; a parabola through it tells how straight a line it is.
batch  the same network at depth 100, against the batch.

Every figure on the CPU comes from a process of its own; conventions in
densenet_efficient/bench/steps.py. Writes benchmarks/results/memory-DEVICE.{json,md,png}.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy

import densenet_efficient
from densenet_efficient.bench.steps import Case, MeasurementError, measure_memory
from densenet_efficient.bench.tables import markdown_table, megabytes, write_results
from densenet_efficient.models.networks import NetworkSpec

OURS = ("store", "auto", "recompute")
PEERS = ("eager", "checkpoint", *OURS)
# The two batches that each curve's slope is taken from: the others' fit into 16 GB at depth 400;
# ours are so large that what does not grow with the batch no longer moves the peak about.
CURVES = {"eager": (4, 8), "checkpoint": (8, 16), "recompute": (64, 128)}
LABELS = {
    "eager": "standard",
    "checkpoint": "checkpointed",
    "store": "ours, store",
    "auto": "ours, auto",
    "recompute": "ours, recompute",
}
DEPTHS = (100, 196, 298, 400)  # 6 N + 4


def bc(depth: int) -> NetworkSpec:
    return NetworkSpec("densenet_cifar", depth=depth, growth_rate=12, num_classes=10)


def table(device: str, batch: int, dtype: str) -> dict[str, Any]:
    """DenseNet-121 at 224 px: measured and planned."""
    case = Case(NetworkSpec("densenet121"), batch, 224, dtype, device)
    rows: list[dict[str, Any]] = []
    for peer in PEERS:
        row: dict[str, Any] = {"peer": peer, **measure_memory(case, peer, exact=True)}
        if peer in OURS:
            row["planned"] = planned_bytes(case, peer)
        rows.append(row)
    text = markdown_table(
        ["peer", "peak MB", "MB/image", "/ eager", "/ checkpoint", "kept MB", "plan() MB", "off"],
        [
            [
                LABELS[row["peer"]],
                megabytes(row["peak"]),
                megabytes(row["peak"] / batch),
                f"{row['peak'] / rows[0]['peak']:.3f}",
                f"{row['peak'] / rows[1]['peak']:.3f}",
                megabytes(row["kept"]),
                megabytes(row["planned"]) if "planned" in row else "-",
                f"{row['planned'] / row['peak'] - 1:+.1%}" if "planned" in row else "-",
            ]
            for row in rows
        ],
    )
    return {"case": case.describe(), "rows": rows, "text": f"## {case.title}\n\n{text}"}


def planned_bytes(case: Case, execution: str) -> int:
    """What plan() predicts for the case, in the network's own dtype or autocast's."""
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[case.dtype]
    size = case.image_size
    shape = (case.batch, case.network.in_channels, size, size)
    return densenet_efficient.plan(case.build(execution), shape, dtype).peak_bytes


def against_depth(device: str, dtype: str, depths: tuple[int, ...]) -> dict[str, Any]:
    """Activation bytes per image of each peer at each depth, and the parabola through them."""
    per_image: dict[str, list[float]] = {peer: [] for peer in CURVES}
    for depth in depths:
        for peer, (small, large) in CURVES.items():
            peaks = [
                measure_memory(Case(bc(depth), batch, 32, dtype, device), peer)["peak"]
                for batch in (small, large)
            ]
            per_image[peer].append((peaks[1] - peaks[0]) / (large - small))
    fits = {}
    for peer in CURVES:
        quadratic, linear, constant = numpy.polyfit(depths, per_image[peer], 2)
        share = abs(quadratic) * depths[-1] / abs(linear)
        fits[peer] = {"quadratic": quadratic, "linear": linear, "constant": constant}
        fits[peer]["quadratic_share"] = share
    rows = [
        [depth, *(f"{per_image[peer][i] / 1e6:.2f}" for peer in CURVES)]
        for i, depth in enumerate(depths)
    ]
    rows.append(
        [
            f"quadratic / linear term at {depths[-1]}",
            *(f"{fits[peer]['quadratic_share']:.2%}" for peer in CURVES),
        ]
    )
    text = markdown_table(["depth", *(f"{LABELS[peer]}, MB/image" for peer in CURVES)], rows)
    title = f"## Activation memory against depth: BC, k = 12, 32 px, {dtype}"
    return {
        "depths": depths,
        "bytes_per_image": per_image,
        "fits": fits,
        "text": f"{title}\n\n{text}",
    }


def against_batch(device: str, dtype: str, batches: tuple[int, ...]) -> dict[str, Any]:
    """Peak bytes of DenseNet-BC-100-12 at 32 px."""
    peaks = {
        peer: [
            measure_memory(Case(bc(100), batch, 32, dtype, device), peer)["peak"]
            for batch in batches
        ]
        for peer in CURVES
    }
    rows = [
        [batch, *(megabytes(peaks[peer][i]) for peer in CURVES)] for i, batch in enumerate(batches)
    ]
    text = markdown_table(["batch", *(f"{LABELS[peer]}, MB" for peer in CURVES)], rows)
    title = f"## Peak memory against the batch: BC-100-12, 32 px, {dtype}"
    return {"batches": batches, "peaks": peaks, "text": f"{title}\n\n{text}"}


def store(parts: dict[str, Any], options: argparse.Namespace, on_gpu: bool) -> Path:
    """Figure and tables of the parts measured so far."""
    suffix = "" if options.part == "all" else f"-{options.part}"
    name = f"memory-{'cuda' if on_gpu else 'cpu'}{suffix}"
    text = "\n\n".join(part["text"] for part in parts.values())
    if "depth" in parts or "batch" in parts:
        from tools.pictures.measured import curves

        curves(parts, options.output / f"{name}.png")
        text += f"\n\n![memory against depth and batch]({name}.png)"
    figures = {key: {k: v for k, v in part.items() if k != "text"} for key, part in parts.items()}
    title = "Memory of a training step"
    return write_results(options.output, name, title, figures, text, options.device)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--part", choices=("all", "table", "depth", "batch"), default="all")
    parser.add_argument("--batch", type=int, help="of the table (16; on a GPU 128)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="fp32; on a GPU bf16")
    parser.add_argument("--depths", type=int, nargs="+", help="each 6 N + 4, three or more")
    parser.add_argument("--quick", action="store_true", help="three depths, three batches")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    on_gpu = options.device.startswith("cuda")
    wanted = ("table", "depth", "batch") if options.part == "all" else (options.part,)
    dtype = options.dtype or ("bf16" if on_gpu else "fp32")
    parts: dict[str, Any] = {}
    for part in wanted:
        if part == "table":
            batch = options.batch or (128 if on_gpu else 16)
            parts[part] = table(options.device, batch, dtype)
        elif part == "depth":
            depths = tuple(
                options.depths or (DEPTHS[::2] + DEPTHS[-1:] if options.quick else DEPTHS)
            )
            parts[part] = against_depth(options.device, dtype, depths)
        else:
            batches = (16, 64, 128) if options.quick else (8, 16, 32, 64, 96, 128)
            parts[part] = against_batch(options.device, dtype, batches)
        print(f"\n{parts[part]['text']}", flush=True)
        path = store(parts, options, on_gpu)  # after each part: a run that is stopped keeps them
    print(f"\nwritten: {path} and .json")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, MeasurementError) as error:
        sys.exit(f"bench_memory: {error}")
